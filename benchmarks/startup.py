# T201, BLE001: a script that prints, and that reports what fails.
"""How long until a model answers: Precast, torch.compile and eager, a fresh process each time.

    python benchmarks/startup.py                               # 4 and 32 layers on the CPU
    python benchmarks/startup.py --layers 4 8 16 32 --repeats 5
    python benchmarks/startup.py --device cuda --dtype bf16 --hidden 4096 --intermediate 14336 \
        --heads 32 --kv-heads 8 --vocabulary 32000 --layers 4 32
    python benchmarks/startup.py --quick                       # small enough for CI

*Start*: from "model and inputs ready" to "first output", less one eager forward measured in the
same process afterwards. torch and `precast` are imported before the clock runs; what they import
while it runs counts. For torch.compile the imports of Dynamo and Inductor are timed apart and left
out of the comparison, which is to its advantage. One small matrix product before the clock wakes
up the device's libraries, and one garbage collection settles what building the model left to do
(90 ms with all of torch alive, whenever it falls due), for every way alike.

Does not measure calls: that is `call.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_WAYS = {"compile": "compile-cold", "mega": "compile-cold", "precast": "precast-cold"}
UNWANTED = ("torch._dynamo", "torch._inductor", "sympy", "triton")


# ---------------------------------------------------------------------------
# One start, in this process


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start a decoder one way in this process, which must be fresh; return what was measured."""
    imported = time.perf_counter()
    import torch

    if way.startswith("precast"):
        import precast
    import_s = time.perf_counter() - imported
    from decoder import build_decoder, decoder_inputs

    from precast.trial.memory import peak_memory_mb

    shape, dtype = shape_of(options), dtype_of(options)
    model = build_decoder(shape, device=options.device, dtype=dtype)
    inputs = decoder_inputs(shape, options.tokens, device=options.device)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    small = torch.ones(8, 8, device=options.device, dtype=dtype)
    (small @ small).sum().item()
    if options.awake:
        with torch.inference_mode():
            model(*inputs)
    gc.collect()  # What building the model owes the collector is not the start's to pay.
    result: dict[str, Any] = {"way": way, "layers": options.layers[0], "import_s": import_s}
    result["ready_rss_mb"] = peak_memory_mb()

    events: list[tuple[float, Any]] = []
    with torch.inference_mode():
        synchronize()
        started, cpu_started = time.perf_counter(), time.thread_time()
        call: Any = model
        if way in ("compile-cold", "compile-warm", "mega-warm"):
            import torch._dynamo
            import torch._inductor.compile_fx

            result["forced_import_s"] = time.perf_counter() - started
            if way == "mega-warm":
                loading = time.perf_counter()
                artifacts = Path(options.cache, "mega.bin").read_bytes()
                torch.compiler.load_cache_artifacts(artifacts)
                result["load_artifacts_s"] = time.perf_counter() - loading
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
            call = torch.compile(model)
        elif way == "precast-cold":
            precast.compile(
                model,
                cache_dir=options.cache,
                progress=False,
                listeners=[lambda event: events.append((time.perf_counter(), event))],
            )
        elif way == "precast-warm":
            precast.compile(model, cache_dir=options.cache)
        output = call(*inputs)
        synchronize()
        result["first_output_s"] = time.perf_counter() - started
        # What a busy machine does not lengthen: the main thread's own time on a core.
        result["first_output_cpu_s"] = time.thread_time() - cpu_started
        # From here on nothing is part of the start any more.
        result["unwanted_modules"] = [name for name in UNWANTED if name in sys.modules]
        result["rss_mb"] = peak_memory_mb()
        if options.device == "cuda":
            result["device_mb"] = torch.cuda.max_memory_reserved() / 2**20
        result["call_s"], _ = time_forward(call, inputs, synchronize)
        if way.startswith("precast"):
            status = precast.status(model)
            result |= read_status(status, started, events)
            precast.release(model)
        result["eager_s"], result["eager_cpu_s"] = time_forward(model, inputs, synchronize)
        reference = model(*inputs)
        result["largest_difference"] = (output.float() - reference.float()).abs().max().item()
        result["largest_value"] = reference.float().abs().max().item()
    if way == "compile-cold":
        saved = torch.compiler.save_cache_artifacts()
        if saved is not None:
            Path(options.cache, "mega.bin").write_bytes(saved[0])
    result["start_s"] = (
        result["first_output_s"] - result["eager_s"] - result.get("forced_import_s", 0.0)
    )
    result["start_cpu_s"] = result["first_output_cpu_s"] - result["eager_cpu_s"]
    return result


def time_forward(model: Any, inputs: Any, synchronize: Any) -> tuple[float, float]:
    """Return the median seconds of one forward, out of 15: by the clock, and of this thread."""
    seconds, cpu_seconds = [], []
    for _ in range(15):
        begun, cpu_begun = time.perf_counter(), time.thread_time()
        model(*inputs)
        synchronize()
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.thread_time() - cpu_begun)
    return statistics.median(seconds), statistics.median(cpu_seconds)


def read_status(
    status: dict[str, Any], started: float, events: list[tuple[float, Any]]
) -> dict[str, Any]:
    """Return what Precast says of its own start, as figures."""
    found: dict[str, Any] = {
        "is_warm": status["is_warm"],
        "reasons": [reason["code"] for reason in status["reasons"]],
    }
    for assembly in status["assemblies"]:
        found["pieces"] = len(assembly["pieces"])
        found["unique_pieces"] = assembly["unique_pieces"]
        found["eager_pieces"] = sum(piece["compiler"] == "eager" for piece in assembly["pieces"])
    at: dict[str, float] = {}
    compiled = 0
    worker_s = 0.0
    for moment, event in events:
        kind = type(event).__name__
        at[kind] = moment - started
        if kind == "PieceCompiled":
            compiled += 1
            worker_s += event.seconds
    if events:
        found["compiled_pieces"] = compiled
        found["worker_s"] = worker_s
        found["capture_s"] = at.get("CaptureFinished")
        if "PieceCompiled" in at and "PlanMade" in at:
            found["split_s"] = at["PlanMade"] - at["CaptureFinished"]
            found["compile_s"] = at["PieceCompiled"] - at["PlanMade"]
            found["rest_s"] = at["ModelReady"] - at["PieceCompiled"]
    return found


def shape_of(options: argparse.Namespace) -> Any:
    """Return the decoder's shape that the command line asks for."""
    from decoder import Shape

    return Shape(
        layers=options.layers[0],
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads,
        kv_heads=options.kv_heads,
        vocabulary=options.vocabulary,
    )


def dtype_of(options: argparse.Namespace) -> Any:
    """Return the dtype that the command line asks for."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]


# ---------------------------------------------------------------------------
# All starts, each in a process of its own


def run_child(
    way: str, layers: int, cache: Path, inductor_cache: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one start in a fresh process; return its result, or `error`."""
    command = [
        sys.executable,
        str(Path(__file__).absolute()),
        "--child",
        way,
        "--layers",
        str(layers),
    ]
    command += ["--cache", str(cache)]
    for name in (
        "device",
        "dtype",
        "hidden",
        "intermediate",
        "heads",
        "kv_heads",
        "vocabulary",
        "tokens",
    ):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.awake:
        command.append("--awake")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            str(Path(entry).absolute())
            for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if entry
        ),
        "TORCHINDUCTOR_CACHE_DIR": str(inductor_cache),
        "TRITON_CACHE_DIR": str(inductor_cache / "triton"),
    }
    # Installed packages have their bytecode, and so must this one: never compile it in a start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=cache.parent,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"way": way, "layers": layers, "error": f"longer than {options.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"way": way, "layers": layers, "error": done.stderr.strip()[-1500:]}
    return json.loads(lines[-1]) | {"process_s": time.perf_counter() - begun}


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every way at every depth; print each result as it comes."""
    results: list[dict[str, Any]] = []
    scratch = Path(options.scratch or tempfile.mkdtemp(prefix="precast-startup-"))
    scratch.mkdir(exist_ok=True)

    def run(way: str, layers: int, cache: Path, inductor_cache: Path, number: int) -> None:
        result = run_child(way, layers, cache, inductor_cache, options) | {"repeat": number}
        results.append(result)
        if "error" in result:
            write(results, options)
            last = result["error"].splitlines()[-1:] or [""]
            print(f"  {way:13} {layers:2} layers: FAILED {last[0]}", flush=True)
        else:
            print(
                f"  {way:13} {layers:2} layers: start {result['start_s'] * 1e3:10.1f} ms, "
                f"first output {result['first_output_s'] * 1e3:10.1f} ms, "
                f"peak {result['rss_mb']:.0f} MB",
                flush=True,
            )
            write(results, options)

    try:
        for layers in options.layers:
            for way in options.ways:
                if way == "vllm":
                    print("  vllm: " + why_no_vllm(), flush=True)
                    continue
                if way == "eager":
                    for number in range(options.repeats):
                        run("eager", layers, scratch, scratch / "unused", number)
                    continue
                filler = WARM_WAYS[way]
                # One folder a filler and depth: no piece is known from another depth.
                cache = scratch / (filler if options.share else f"{filler}-{layers}")
                cold = [r for r in results if (r["way"], r["layers"]) == (filler, layers)]
                if not cold:
                    cache.mkdir(exist_ok=True)
                    run(filler, layers, cache, cache / "inductor", 0)
                if any(
                    "error" in r for r in results if (r["way"], r["layers"]) == (filler, layers)
                ):
                    continue  # Nothing can be warm.
                if way == "mega" and not (cache / "mega.bin").exists():
                    print("  mega: torch saved no artifacts", flush=True)
                    continue
                for number in range(options.repeats):
                    inductor_cache = cache / "inductor"
                    if way == "mega":
                        inductor_cache = scratch / f"mega-{layers}-{number}"
                    run(f"{way}-warm", layers, cache, inductor_cache, number)
    finally:
        if options.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    return results


def why_no_vllm() -> str:
    """Say why vLLM is not among the results."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        return "not importable here, left out"
    return (
        "importable; its runner needs an engine's forward context: "
        "measure it with its own `benchmarks`, figures in docs"
    )


# ---------------------------------------------------------------------------
# What it comes to


def medians(results: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the median of every figure, by way and depth; other values from the first repeat."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            groups.setdefault((result["way"], result["layers"]), []).append(result)
    summary = {}
    for key, group in groups.items():
        summary[key] = {
            name: statistics.median(r[name] for r in group)
            if isinstance(value, float) and all(name in r for r in group)
            else value
            for name, value in group[0].items()
        }
        summary[key]["repeats"] = len(group)
        summary[key]["least_start_s"] = min(r["start_s"] for r in group)
        summary[key]["unwanted_modules"] = sorted({m for r in group for m in r["unwanted_modules"]})
    return summary


def judge(results: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each target with what was measured and whether it is met (None: not measured)."""
    found = medians(results)
    deep, flat = max(options.layers), min(options.layers)
    warm, warm_flat = found.get(("precast-warm", deep)), found.get(("precast-warm", flat))
    cold, eager = found.get(("precast-cold", deep)), found.get(("eager", deep))
    plain = found.get(("compile-warm", deep))
    cold_limit = 22.0 if options.device == "cuda" else 47.0
    judged: list[dict[str, Any]] = []

    def add(
        target: str, value: float | None, limit: float, unit: str, *, least: bool = False
    ) -> None:
        is_met = None if value is None else (value >= limit if least else value <= limit)
        judged.append(
            {"target": target, "limit": limit, "value": value, "unit": unit, "is_met": is_met}
        )

    add(f"warm start, {deep} layers", warm and warm["start_s"] * 1e3, 40.0, "ms")
    add(
        f"warm start beyond eager's own first output in a fresh process, {deep} layers",
        (warm["first_output_s"] - eager["first_output_s"]) * 1e3 if warm and eager else None,
        40.0,
        "ms",
    )
    add(
        f"a call of torch.compile against one of Precast, {deep} layers",
        plain["call_s"] / warm["call_s"] if plain and warm else None,
        1.0,
        "x",
        least=True,
    )
    add(
        f"times less than warm torch.compile, {deep} layers",
        plain["start_s"] / warm["start_s"] if plain and warm else None,
        200.0,
        "x",
        least=True,
    )
    add(
        f"warm start, {deep} layers against {flat}",
        warm["start_s"] / warm_flat["start_s"] if warm and warm_flat and deep > flat else None,
        2.0,
        "x",
    )
    add(
        "peak memory of a warm start above eager",
        warm["rss_mb"] - eager["rss_mb"] if warm and eager else None,
        30.0,
        "MB",
    )
    add(
        "modules of the compilers in the warm process",
        None if warm is None else float(len(warm["unwanted_modules"])),
        0.0,
        "",
    )
    add(
        f"pieces compiled, {deep} layers, away from 3",
        None if cold is None else float(abs(cold.get("compiled_pieces", 0) - 3)),
        0.0,
        "",
    )
    add(f"cold start, {deep} layers", cold and cold["first_output_s"], cold_limit, "s")
    return judged


def render(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the results and the targets as markdown tables."""
    lines = [
        "| way | layers | start ms (median) | least | CPU of the thread "
        "| first output ms | a call, then, ms | eager forward ms "
        "| imports s | peak MB | compiled pieces | capture / compile / rest s | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (way, layers), m in medians(results).items():
        steps = ""
        if m.get("compile_s") is not None:
            steps = (
                f"{m['capture_s']:.1f} / {m['compile_s']:.1f} / {m['split_s'] + m['rest_s']:.1f}"
            )
        lines.append(
            f"| {way} | {layers} | {m['start_s'] * 1e3:.1f} | {m['least_start_s'] * 1e3:.1f} "
            f"| {m['start_cpu_s'] * 1e3:.1f} "
            f"| {m['first_output_s'] * 1e3:.1f} | {m['call_s'] * 1e3:.2f} "
            f"| {m['eager_s'] * 1e3:.2f} "
            f"| {m.get('forced_import_s', 0.0):.1f} | {m['rss_mb']:.0f} "
            f"| {m.get('compiled_pieces', m.get('unique_pieces', ''))} | {steps} "
            f"| {m['largest_difference']:.1e} |"
        )
    lines += ["", "| target | limit | measured | |", "|---|---|---|---|"]
    for j in judge(results, options):
        value = "not measured" if j["value"] is None else f"{j['value']:.1f} {j['unit']}"
        verdict = {True: "met", False: "**MISSED**", None: ""}[j["is_met"]]
        lines.append(f"| {j['target']} | {j['limit']:g} {j['unit']} | {value} | {verdict} |")
    for failed in (r for r in results if "error" in r):
        end = failed["error"][-400:]
        lines += ["", f"{failed['way']} at {failed['layers']} layers failed: {end}"]
    return "\n".join(lines)


def write(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Keep the results so far, if a file was asked for."""
    if options.json:
        summary = [dict(m) for m in medians(results).values()]
        data = {"medians": summary, "targets": judge(results, options), "runs": results}
        Path(options.json).write_text(json.dumps(data, indent=1))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["eager", "precast", "compile", "mega", "vllm"],
        choices=["eager", "precast", "compile", "mega", "vllm"],
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one process")
    parser.add_argument("--scratch", help="keep all caches in this folder")
    parser.add_argument(
        "--share",
        action="store_true",
        help="one cache for all depths: only the first depth's cold start is one",
    )
    parser.add_argument("--json", help="write everything there, after every step")
    parser.add_argument(
        "--awake",
        action="store_true",
        help="run one eager forward before the clock, so that no start pays for the device's "
        "libraries and kernels",
    )
    parser.add_argument("--quick", action="store_true", help="2 and 4 layers, no torch.compile")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.repeats, options.ways = [2, 4], 1, ["eager", "precast"]
    return options


def main() -> int:
    """Run, and print tables; 1 where a step failed or a target was missed."""
    options = parse()
    if options.child:
        print(json.dumps(measure(options.child, options)), flush=True)
        return 0
    results = run_all(options)
    print()
    print(render(results, options))
    write(results, options)
    has_failed = any("error" in result for result in results)
    return int(has_failed or any(j["is_met"] is False for j in judge(results, options)))


if __name__ == "__main__":
    sys.exit(main())
