# ruff: noqa: BLE001
# T201, BLE001: a script that prints, and that reports what fails.
"""What each built-in pass gains: call time, memory, equal texts; and what running passes costs.

    python benchmarks/passes.py                  # CPU, a small decoder and a Llama
    python benchmarks/passes.py --device cuda    # the layers of an 8B model, bf16
    python benchmarks/passes.py --quick          # small enough for CI

Each pass alone is compared with no pass, call by call in turn, so that a busy minute hits both; the
figure is the median of the ratios of neighbouring calls. "Merged linear layers" is compared at 1
and 8 tokens. Overhead is the time of all passes that run on pieces (they are off by default),
checks included, against compiling the same pieces.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from decoder import build_decoder, decoder_inputs
from startup import dtype_of, shape_of

import precast
from precast.compilers.job import CompileJob
from precast.passes.chosen import choose, load_pass
from precast.passes.pass_manager import PostGradPassManager

ON_PIECES = ("no_ops", "clean_up", "in_place")
CANONICAL = ("canonical_norm", "canonical_residual", "activation_and_multiply")
ALONE = ("merge_linears", *ON_PIECES, *CANONICAL)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory_of(model: torch.nn.Module, device: str) -> int:
    """Return the bytes that the parameters take; on a GPU all that is allocated."""
    if device == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def compiled(model: Any, inputs: Sequence[Any], passes: Sequence[str], cache: str) -> Any:
    """Compile a model with passes, and run it once."""
    precast.compile(model, cache_dir=cache, passes=tuple(passes), progress=False)
    model(*inputs)
    return precast.status(model)["assemblies"][0]


def compare(
    build: Callable[[], Any],
    make_inputs: Callable[[int], Sequence[Any]],
    passes: Sequence[str],
    options: argparse.Namespace,
    cache: str,
) -> dict[str, Any]:
    """Compare a model with some passes with the same one without, at each number of tokens."""
    plain, changed = build(), build()
    before = memory_of(changed, options.device)
    base = compiled(plain, make_inputs(17), (), cache)
    after_base = memory_of(changed, options.device)
    found = compiled(changed, make_inputs(17), passes, cache)
    result: dict[str, Any] = {
        "compiled_pieces": sum(piece["compiler"] != "eager" for piece in found["pieces"]),
        "pieces": len(found["pieces"]),
        "different": {"without": base["unique_pieces"], "with": found["unique_pieces"]},
        "memory_bytes": {"before": before, "after": memory_of(changed, options.device)},
        "memory_ratio": memory_of(changed, options.device) / after_base,
    }
    for num_tokens in options.tokens_per_call:
        inputs = make_inputs(num_tokens)
        result["largest_difference"] = (
            (plain(*inputs) - changed(*inputs)).float().abs().max().item()
        )
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(options.rounds + 5):
            for name, model in (("without", plain), ("with", changed)):
                synchronize(options.device)
                begun = time.perf_counter()
                model(*inputs)
                synchronize(options.device)
                if number >= 5:
                    seconds[name].append(time.perf_counter() - begun)
        result[f"{num_tokens} tokens"] = {
            "without_us": statistics.median(seconds["without"]) * 1e6,
            "with_us": statistics.median(seconds["with"]) * 1e6,
            "ratio": statistics.median(
                mine / other
                for mine, other in zip(seconds["with"], seconds["without"], strict=True)
            ),
        }
    for model in (plain, changed):
        precast.release(model)
    return result


def llama(options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[int], Sequence[Any]]]:
    """A Llama of transformers with random weights, that gives logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=min(options.layers[0], 8),
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        use_cache=False,
    )

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(config)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def build() -> Any:
        torch.manual_seed(0)
        with torch.inference_mode(False), torch.device(options.device):
            model = Logits().eval().requires_grad_(False).to(dtype_of(options))
        return model

    def make_inputs(num_tokens: int) -> Sequence[Any]:
        return (torch.arange(num_tokens, device=options.device)[None] % options.vocabulary,)

    return build, make_inputs


def measure_overhead(
    build: Callable[[], Any], inputs: Sequence[Any], options: argparse.Namespace, cache: str
) -> dict[str, Any]:
    """Time the passes on a model's pieces against compiling them."""
    from precast.graph.piece import Piece

    jobs: list[Piece] = []
    model = build()
    precast.compile(model, cache_dir=str(Path(cache, "overhead")), passes=ON_PIECES, progress=False)
    session = model._compiled_call_impl.compiled.session
    submit = session.manager._submit

    def note(job: CompileJob) -> Any:
        if job.is_reported:
            jobs.append(Piece.from_json(job.piece))
        return submit(job)

    session.manager._submit = note
    model(*inputs)
    compile_s = precast.status(model)["assemblies"][0]["compile_seconds"]
    manager = PostGradPassManager(load_pass(name) for name in ON_PIECES)
    manager.start(jobs[0])  # A worker has been warm for long when its first job comes.
    begun = time.perf_counter()
    for piece in jobs:
        manager.start(piece)
    passes_s = time.perf_counter() - begun
    precast.release(model)
    return {"compile_s": compile_s, "passes_s": passes_s, "ratio": passes_s / compile_s}


def count_texts(options: argparse.Namespace) -> dict[str, Any]:
    """Count the different pieces of several architectures of one size, each pass on and off."""
    import transformers

    from precast.capture.dynamo import capture_call
    from precast.config import CompilationConfig
    from precast.drawing import cut_and_write, pack_nothing
    from precast.owner import find_forward

    def texts(name: str, passes: Sequence[str]) -> set[str]:
        config = getattr(transformers, f"{name}Config")(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            vocab_size=128,
            use_cache=False,
            pad_token_id=0,
        )
        model = getattr(transformers, f"{name}Model")(config).eval().requires_grad_(False)
        function: Any = find_forward(model)
        capture = capture_call(
            function,
            model,
            (),
            {"input_ids": torch.arange(17)[None], "use_cache": False},
            dynamic_shapes=None,
            name=name,
        )
        assert capture is not None
        _, written, _, _ = cut_and_write(
            capture.graph_module,
            ranges=capture.ranges,
            sources=capture.sources,
            arguments=capture.entry.arguments,
            weights=capture.weights,
            config=CompilationConfig(),
            emit=lambda _: None,
            name=name,
            passes=choose(tuple(passes)),
            may_pack=pack_nothing,
        )
        return {found.piece.text for found in written.values()}

    counts: dict[str, Any] = {}
    for label, passes in (("none", ()), *((n, (n,)) for n in CANONICAL), ("all", CANONICAL)):
        found: dict[str, int] = {}
        union: set[str] = set()
        for name in options.architectures:
            try:
                mine = texts(name, passes)
            except Exception as error:
                found[name] = -1
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                continue
            found[name] = len(mine)
            union |= mine
        counts[label] = {"each": found, "together": len(union)}
    return counts


def rows_of(result: dict[str, Any], device: str) -> list[tuple[str, str, str, bool]]:
    """Return what was to be reached, what was, and whether it is enough."""
    rows: list[tuple[str, str, str, bool]] = []
    for model, by_pass in result["calls"].items():
        for name, found in by_pass.items():
            for tokens, figures in found.items():
                if not tokens.endswith("tokens"):
                    continue
                ratio = figures["ratio"]
                is_merge = name == "merge_linears" and device == "cuda" and model == "decoder"
                limit = 0.95 if is_merge else 1.03
                rows.append(
                    (f"{model}, {name}, {tokens}", f"<= {limit}", f"{ratio:.3f}", ratio <= limit)
                )
            if name == "merge_linears":
                ratio = found["memory_ratio"]
                rows.append((f"{model}, {name}, memory", "<= 1.01", f"{ratio:.4f}", ratio <= 1.01))
    ratio = result["overhead"]["ratio"]
    rows.append(("passes on pieces / compiling them", "<= 0.02", f"{ratio:.4f}", ratio <= 0.02))
    if "texts" in result:
        texts = {label: found["together"] for label, found in result["texts"].items()}
        for label in ("all", *CANONICAL):
            rows.append(
                (
                    f"different pieces, {label}",
                    f"< {texts['none']}",
                    str(texts[label]),
                    texts[label] < texts["none"],
                )
            )
    return rows


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--layers", type=int, nargs=1)
    for name in ("hidden", "intermediate", "heads", "kv-heads", "vocabulary"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tokens-per-call", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--passes", nargs="+", default=list(ALONE), choices=ALONE)
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=["Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Phi3", "Gemma"],
    )
    parser.add_argument("--cache", help="where Precast keeps artifacts; default: a fresh folder")
    parser.add_argument("--json", help="write everything there, after every part")
    parser.add_argument("--quick", action="store_true", help="2 layers, merged layers only")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.layers = options.layers or [32 if on_gpu else 4]
    sizes = (4096, 14336, 32, 8, 32000) if on_gpu else (1024, 2816, 16, 4, 512)
    for name, size in zip(
        ("hidden", "intermediate", "heads", "kv_heads", "vocabulary"), sizes, strict=True
    ):
        setattr(options, name, getattr(options, name) or size)
    if options.quick:
        options.layers, options.passes, options.rounds = [2], ["merge_linears"], 10
    cache = options.cache or tempfile.mkdtemp(prefix="precast-passes-")
    result: dict[str, Any] = {"torch": torch.__version__, "options": vars(options), "calls": {}}

    def keep() -> None:
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1))

    shape = shape_of(options)

    def build() -> Any:
        with torch.inference_mode(False):
            return build_decoder(shape, device=options.device, dtype=dtype_of(options))

    def make_inputs(num_tokens: int) -> Sequence[Any]:
        return decoder_inputs(shape, num_tokens, device=options.device)

    models: dict[str, Any] = {"decoder": (build, make_inputs)}
    try:
        models["llama"] = llama(options)
    except ImportError as error:
        print(f"no transformers model: {error}", file=sys.stderr)
    with torch.inference_mode():
        result["overhead"] = measure_overhead(build, make_inputs(17), options, cache)
        keep()
        for model_name, (build_one, inputs_of) in models.items():
            by_pass = result["calls"][model_name] = {}
            for name in options.passes:
                by_pass[name] = compare(build_one, inputs_of, (name,), options, cache)
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
                keep()
    if "llama" in models and not options.quick:
        result["texts"] = count_texts(options)
        keep()
    width = max(len(row[0]) for row in rows_of(result, options.device))
    for what, target, measured, is_reached in rows_of(result, options.device):
        print(f"{what:<{width}}  {target:>9}  {measured:>8}  {'' if is_reached else 'missed'}")
    if not options.cache:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
