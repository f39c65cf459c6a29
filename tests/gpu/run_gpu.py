# ruff: noqa: T201, BLE001, RUF005
# T201, BLE001: a script that prints, and that goes on whatever one step does.
"""Everything that a GPU can show, in one go: equality with eager, warm starts, benchmarks.

    PYTHONPATH=src CXX=/usr/bin/g++ CC=/usr/bin/gcc python tests/gpu/run_gpu.py

Runs without a network, from the root of the repository, in less than nine minutes. Every step is a
process of its own with a time limit, and one that fails stops no other. Prints a table as it goes
and writes it to `$OUT/gpu.json` and `$OUT/gpu.md` (the current folder without `OUT`) after each.
`--only sanity llama` runs some steps, `--budget` changes how long the whole may take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
BENCHMARKS = ROOT / "benchmarks"
UNWANTED = ("torch._dynamo", "torch._inductor", "sympy", "triton")
EIGHT_B = [
    "--device",
    "cuda",
    "--dtype",
    "bf16",
    "--hidden",
    "4096",
    "--intermediate",
    "14336",
    "--heads",
    "32",
    "--kv-heads",
    "8",
    "--vocabulary",
    "32000",
]


# ---------------------------------------------------------------------------
# Steps that run in a process of their own; each returns what it found, or raises


def compare(name: str, ours: Any, eager: Any, tolerance: float) -> dict[str, Any]:
    """Return the largest difference, or raise where it is beyond the tolerance."""
    import torch

    assert ours.shape == eager.shape, f"{name}: shape {ours.shape}, eager {eager.shape}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager {eager.dtype}"
    assert ours.stride() == eager.stride(), f"{name}: stride {ours.stride()}, {eager.stride()}"
    difference = (ours.float() - eager.float()).abs().max().item() if ours.numel() else 0.0
    torch.testing.assert_close(
        ours, eager, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}"
    )
    return {"case": name, "difference": difference}


def summary(status: dict[str, Any]) -> dict[str, Any]:
    """Return what matters of a model's status."""
    pieces = [piece for a in status["assemblies"] for piece in a["pieces"]]
    return {
        "is_warm": status.get("is_warm"),
        "assemblies": len(status["assemblies"]),
        "unique_pieces": [a["unique_pieces"] for a in status["assemblies"]],
        "pieces": len(pieces),
        "compilers": sorted({piece["compiler"] for piece in pieces}),
        "piece_reasons": sorted({str(p["reason"]) for p in pieces if p["reason"]})[:3],
        "reasons": [f"{r['code']}: {r['message'][:200]}" for r in status["reasons"]],
    }


def make_small(device: str = "cuda") -> Any:
    """Return a small module that also writes into a cache which it is handed."""
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 96)
            self.norm = nn.LayerNorm(96)
            self.second = nn.Linear(96, 64)

        def forward(self, x: Any, cache: Any, position: Any) -> Any:
            y = self.second(torch.nn.functional.gelu(self.norm(self.first(x))))
            cache.index_copy_(0, position, y.sum(0, keepdim=True))
            return y + x, cache.sum(0)

    torch.manual_seed(0)
    return Small().to(device).eval().requires_grad_(False)


def small_inputs(size: int, kind: str = "plain") -> tuple[Any, ...]:
    """Return inputs of a batch size: plain, misaligned by one element, or non-contiguous."""
    import torch

    torch.manual_seed(size)
    x = torch.randn(size, 64, device="cuda")
    if kind == "misaligned":
        x = torch.randn(size * 64 + 1, device="cuda")[1:].view(size, 64)
    elif kind == "non-contiguous":
        x = torch.randn(64, size, device="cuda").t()
    elif kind == "strided":
        x = torch.randn(size, 128, device="cuda")[:, ::2]
    cache = torch.zeros(8, 64, device="cuda")
    return x, cache, torch.tensor([size % 8], device="cuda")


def step_sanity(cache: str, *, is_second: bool = False) -> dict[str, Any]:
    """A small module at many sizes and layouts, with a cache that it writes into."""
    import torch

    import precast

    model = make_small()
    torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()
    found: dict[str, Any] = {"cases": [], "failures": []}
    inputs = small_inputs(17)
    with torch.inference_mode():
        torch.cuda.synchronize()
        begun = time.perf_counter()
        precast.compile(model, cache_dir=cache)
        model(*inputs)
        torch.cuda.synchronize()
        found["first_output_ms"] = (time.perf_counter() - begun) * 1e3
        found["unwanted_modules"] = [name for name in UNWANTED if name in sys.modules]
        found |= summary(precast.status(model))
        cases = [("plain", size) for size in (1, 2, 3, 17)]
        if not is_second:
            cases += [
                (kind, size)
                for kind in ("misaligned", "non-contiguous", "strided")
                for size in (3, 17)
            ]
            cases += [("plain", 0)]
        for kind, size in cases:
            name = f"{kind} {size}"
            try:
                ours_in, eager_in = small_inputs(size, kind), small_inputs(size, kind)
                ours = model(*ours_in)
                eager = type(model).forward(model, *eager_in)
                for label, a, b in (
                    ("output", ours[0], eager[0]),
                    ("sum", ours[1], eager[1]),
                    ("cache", ours_in[1], eager_in[1]),
                ):
                    found["cases"].append(compare(f"{name} {label}", a, b, 2e-5))
            except Exception as error:
                found["failures"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        with torch.no_grad():
            model.first.weight = torch.nn.Parameter(model.first.weight * 2, requires_grad=False)
        a, b = small_inputs(17), small_inputs(17)
        found["cases"].append(
            compare("replaced weight", model(*a)[0], type(model).forward(model, *b)[0], 2e-5)
        )
    found["status"] = summary(precast.status(model))
    precast.release(model)
    found["largest_difference"] = max(case["difference"] for case in found["cases"])
    found["num_cases"] = len(found.pop("cases"))
    if is_second:
        assert found["is_warm"], "the second process was not warm"
        assert not found["unwanted_modules"], f"imported {found['unwanted_modules']}"
    assert not found["failures"], json.dumps(found)
    return found


def step_sanity_warm(cache: str) -> dict[str, Any]:
    """The same in a second process: warm, and without any module of the compilers."""
    return step_sanity(cache, is_second=True)


def step_llama(cache: str) -> dict[str, Any]:
    """A tiny transformers llama with `generate()` and a static cache: the tokens of eager."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import precast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().cuda().requires_grad_(False)
    prompt = torch.randint(2, 1000, (2, 11), device="cuda")

    def generate() -> Any:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )

    with torch.inference_mode():
        eager = generate()
        precast.compile(model, cache_dir=cache)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        ours = generate()
        torch.cuda.synchronize()
        first_s = time.perf_counter() - begun
        begun = time.perf_counter()
        generate()
        torch.cuda.synchronize()
        second_s = time.perf_counter() - begun
        status = summary(precast.status(model))
        precast.release(model)
        generate()
        begun = time.perf_counter()
        generate()
        torch.cuda.synchronize()
        eager_s = time.perf_counter() - begun
    same = int((ours == eager).sum().item())
    found = {
        "first_generate_s": first_s,
        "second_generate_s": second_s,
        "eager_generate_s": eager_s,
        "same_tokens": f"{same} of {eager.numel()}",
        **status,
    }
    assert torch.equal(ours, eager), json.dumps(found)
    return found


def step_bert(cache: str) -> dict[str, Any]:
    """A BERT of MiniLM's shape with random weights, batch and length dynamic."""
    import torch
    from transformers import BertConfig, BertModel

    import precast

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=30522,
    )
    model = BertModel(config).eval().cuda().requires_grad_(False)
    found: dict[str, Any] = {"differences": {}}

    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = torch.randint(1, 30000, (batch, length), device="cuda")
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    sizes = [(4, 12), (1, 1), (1, 7), (2, 3), (3, 17), (16, 64)]
    with torch.inference_mode():
        cases = [inputs(*size) for size in sizes]
        eager = [model(**case).last_hidden_state for case in cases]
        precast.compile(model, cache_dir=cache)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model(**cases[0])
        torch.cuda.synchronize()
        found["first_output_ms"] = (time.perf_counter() - begun) * 1e3
        for size, case, expected in zip(sizes, cases, eager, strict=True):
            ours = model(**case).last_hidden_state
            mask = case["attention_mask"].bool()
            compared = compare(str(size), ours[mask], expected[mask], 2e-3)
            found["differences"][str(size)] = compared["difference"]
        found |= summary(precast.status(model))
        precast.release(model)
    return found


def step_progressive(cache: str) -> dict[str, Any]:
    """A decoder served while it is compiled behind, then looked at twice; what both cost."""
    import torch

    import precast

    sys.path.insert(0, str(BENCHMARKS))  # A child must be able to import the model's class.
    from decoder import Shape, build_decoder, decoder_inputs

    shape = Shape(layers=4, hidden=2048, intermediate=5632, heads=16, kv_heads=16)
    model = build_decoder(shape, device="cuda", dtype=torch.bfloat16)
    inputs = decoder_inputs(shape, 64, device="cuda")
    found: dict[str, Any] = {"weights_mb": sum(p.nbytes for p in model.parameters()) / 2**20}

    def serve(**settings: Any) -> Any:
        """Call until nothing is left to do; return the last output and the most that others took.

        A child with a context of its own shows as memory that is no longer free.
        """
        precast.compile(model, mode="progressive", cache_dir=f"{cache}-progressive", **settings)
        free = least = torch.cuda.mem_get_info()[0]
        begun, num_calls = time.perf_counter(), 0
        while not num_calls or not precast.wait(model, 0):
            compare(f"call {num_calls}", model(*inputs), expected, 0.25)
            num_calls += 1
            least = min(least, torch.cuda.mem_get_info()[0])
        return {
            "largest_difference": compare("landed", model(*inputs), expected, 0.25)["difference"],
            "calls_meanwhile": num_calls,
            "seconds": time.perf_counter() - begun,
            "others_mb": (free - least) / 2**20,
            **summary(precast.status(model)),
        }

    with torch.inference_mode():
        expected = model(*inputs)
        torch.cuda.synchronize()
        found["cold"] = serve(revalidate="never")
        # One child, before the stored assembly may serve.
        found["looked at twice"] = serve(revalidate="always")
        found["not_revalidated"] = precast.status(model)["not_revalidated"]
        precast.release(model)
    # `torch.testing`, which compares here, imports sympy for itself.
    found["unwanted_modules"] = [n for n in UNWANTED if n in sys.modules and "_" in n]
    assert not found["unwanted_modules"], json.dumps(found)
    assert found["not_revalidated"] is None, json.dumps(found)
    assert found["cold"]["compilers"] != ["eager"], json.dumps(found)
    assert found["looked at twice"]["is_warm"], json.dumps(found)
    return found


PYTHON_STEPS: dict[str, Callable[[str], dict[str, Any]]] = {
    "sanity": step_sanity,
    "sanity-warm": step_sanity_warm,
    "llama": step_llama,
    "llama-warm": step_llama,
    "bert": step_bert,
    "bert-warm": step_bert,
    "progressive": step_progressive,
}


# ---------------------------------------------------------------------------
# The parent: a plan, a time limit a step, and a report after each


class Report:
    """What was found so far, printed and written after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = time.perf_counter()
        self.steps: list[dict[str, Any]] = []
        self.benchmarks: dict[str, str] = {}
        self.machine = describe_machine()
        print(json.dumps(self.machine), flush=True)

    def add(self, step: dict[str, Any]) -> None:
        """Keep and show one step's outcome."""
        step["at_s"] = round(time.perf_counter() - self.started, 1)
        self.steps.append(step)
        print(f"== {step['step']}: {step['outcome']} in {step['seconds']:.1f} s", flush=True)
        print(json.dumps(step.get("found", step.get("error", ""))), flush=True)
        if step["outcome"] != "ok" and step.get("error"):
            print(step["error"], flush=True)
        self.write()

    def write(self) -> None:
        """Write both files anew."""
        data = {"machine": self.machine, "steps": self.steps}
        (self.folder / "gpu.json").write_text(json.dumps(data, indent=1))
        (self.folder / "gpu.md").write_text(self.render())

    def render(self) -> str:
        """Return everything as markdown."""
        lines = [f"Machine: {json.dumps(self.machine)}", "", "| step | outcome | seconds | found |"]
        lines.append("|---|---|---|---|")
        for step in self.steps:
            found = step.get("found")
            text = json.dumps(found) if found is not None else step.get("error", "")[-300:]
            if step["step"] in self.benchmarks:
                text = "see below"
            text = text.replace("|", "/").replace("\n", " ")
            lines.append(
                f"| {step['step']} | {step['outcome']} | {step['seconds']:.1f} | {text[:1500]} |"
            )
        for name, table in self.benchmarks.items():
            lines += ["", f"## {name}", "", table]
        return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """Return hardware and versions; imports torch without touching the device."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "cxx": os.environ.get("CXX", ""),
    }
    for name in ("triton", "transformers"):
        try:
            from importlib.metadata import version

            found[name] = version(name)
        except Exception:
            found[name] = None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found["gpu"] = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        found["gpu"] = None
    return found


def run_process(
    command: list[str], environment: dict[str, str], limit_s: float
) -> tuple[int | None, str, str]:
    """Run a command in a group of its own; end the whole group at the limit. None: out of time."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=error, cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        out.seek(0)
        error.seek(0)
        return code, out.read(), error.read()


def run_python_step(
    name: str, cache: Path, environment: dict[str, str], limit_s: float
) -> dict[str, Any]:
    """Run one of `PYTHON_STEPS` in a fresh process."""
    begun = time.perf_counter()
    command = [
        sys.executable,
        str(Path(__file__).absolute()),
        "--step",
        name,
        "--cache",
        str(cache),
    ]
    code, out, error = run_process(command, environment, limit_s)
    step: dict[str, Any] = {"step": name, "seconds": time.perf_counter() - begun}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if code == 0 and lines:
        return step | {"outcome": "ok", "found": json.loads(lines[-1])}
    outcome = f"no end in {limit_s:.0f} s" if code is None else f"FAILED ({code})"
    return step | {"outcome": outcome, "error": (out + error)[-3000:]}


def run_benchmark_step(
    name: str, command: list[str], environment: dict[str, str], limit_s: float, report: Report
) -> dict[str, Any]:
    """Run a benchmark script, and keep its tables and its JSON whatever happens to it."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.json")
        code, out, error = run_process([*command, "--json", str(data)], environment, limit_s)
        found = json.loads(data.read_text()) if data.exists() else None
    outcome = {0: "ok", 1: "done, something missed or failed", None: f"no end in {limit_s:.0f} s"}
    step: dict[str, Any] = {
        "step": name,
        "seconds": time.perf_counter() - begun,
        "outcome": outcome.get(code, f"FAILED ({code})"),
        "error": error[-2000:],
        "found": None if found is None else {k: v for k, v in found.items() if k != "runs"},
    }
    report.benchmarks[name] = out
    print(out, flush=True)
    if found is not None:
        step["runs"] = found.get("runs", found.get("results"))
    return step


def main() -> int:
    """Run the plan; 0 where every step that ran was fine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=list(PYTHON_STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", help="names of steps, as the report shows them")
    parser.add_argument("--budget", type=float, default=525.0, help="seconds for everything")
    options = parser.parse_args()
    if options.step:
        try:
            print(json.dumps(PYTHON_STEPS[options.step](options.cache)), flush=True)
        except BaseException:
            traceback.print_exc(limit=-8)
            return 1
        return 0

    folder = Path(os.environ.get("OUT", "."))
    scratch = Path(tempfile.mkdtemp(prefix="precast-gpu-"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "CXX": os.environ.get("CXX", "/usr/bin/g++"),
        "CC": os.environ.get("CC", "/usr/bin/gcc"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "HF_HUB_OFFLINE": "1",
        "PRECAST_DISABLE": "",
        "PYTHONFAULTHANDLER": "1",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    report = Report(folder)
    startup = [sys.executable, str(BENCHMARKS / "startup.py"), *EIGHT_B]
    call = [sys.executable, str(BENCHMARKS / "call.py"), *EIGHT_B]
    # Awake: one eager forward before the clock, so that no way pays for CUDA's own start.
    startup += ["--scratch", str(scratch / "startup"), "--share", "--awake"]
    caches = scratch / "startup"
    # The important ones first: what the budget does not cover is left out, and says so.
    plan: list[tuple[str, float, list[str] | None]] = [
        ("sanity", 150, None),
        ("sanity-warm", 40, None),
        ("progressive", 150, None),
        (
            "startup-precast",
            200,
            [*startup, "--ways", "precast", "eager", "--layers", "32", "4", "--repeats", "2"]
            + ["--timeout", "120"],
        ),
        ("llama", 100, None),
        ("llama-warm", 45, None),
        ("call", 170, [*call, "--rounds", "60", "--cache", str(caches / "precast-cold")]),
        ("bert", 90, None),
        ("bert-warm", 45, None),
        (
            "startup-compile",
            200,
            [*startup, "--ways", "compile", "mega", "--layers", "32", "--repeats", "1"]
            + ["--timeout", "130"],
        ),
    ]
    (caches / "precast-cold").mkdir(parents=True)
    try:
        for name, limit_s, command in plan:
            if options.only and name not in options.only:
                continue
            left = options.budget - (time.perf_counter() - report.started)
            if left < 20:
                report.add({"step": name, "seconds": 0.0, "outcome": "left out: no time"})
                continue
            limit = min(limit_s, left)
            try:
                if command is None:
                    cache = scratch / name.removesuffix("-warm")
                    step = run_python_step(name, cache, environment, limit)
                else:
                    step = run_benchmark_step(name, command, environment, limit, report)
            except Exception:
                step = {"step": name, "seconds": 0.0, "outcome": "FAILED"}
                step["error"] = traceback.format_exc(limit=-4)
            report.add(step)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        report.write()
    print("\n" + report.render(), flush=True)
    return int(any(step["outcome"] != "ok" for step in report.steps))


if __name__ == "__main__":
    sys.exit(main())
