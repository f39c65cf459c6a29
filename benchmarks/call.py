# ruff: noqa: BLE001
# T201, BLE001: a script that prints, and that reports what fails.
"""What a call costs once everything is loaded: ours, torch.compile's and eager's, in one run.

    python benchmarks/call.py                    # CPU, 32 layers of the toy decoder
    python benchmarks/call.py --device cuda --dtype bf16 --hidden 4096 --intermediate 14336 \
        --heads 32 --kv-heads 8 --vocabulary 32000
    python benchmarks/call.py --quick            # small enough for CI, no torch.compile

Microseconds are the least of many rounds (the machine's other users only ever add); whole models
are compared in interleaved rounds, so that a busy minute hits all of them, by median ratio.
Does not measure starts: that is `startup.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decoder import build_decoder, decoder_inputs
from startup import dtype_of, shape_of

import precast


def microseconds(
    call: Callable[[], Any], *, rounds: int = 40, calls: int = 200
) -> dict[str, float]:
    """Return the least and the median time of one call, over rounds of many."""
    call()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - begun) / calls)
    return {"least_us": min(seconds) * 1e6, "median_us": statistics.median(seconds) * 1e6}


def measure_stitched_call(num_pieces: int = 130) -> dict[str, float]:
    """Time the execution code around pieces that do nothing, weights bound as in a real model."""
    from torch.fx import Graph, GraphModule

    from precast.stitch import generate_execution_code

    graph = Graph()
    hidden = graph.placeholder("hidden")
    groups: dict[int, list[str]] = {}
    weights = {}
    for number in range(num_pieces):
        groups[number] = [f"weight_{number}_{i}" for i in range(2)]
        weights[number] = [graph.placeholder(name) for name in groups[number]]
    modules: dict[str, Any] = {}
    for number in range(num_pieces):
        piece = Graph()
        inputs = [piece.placeholder(name) for name in "xab"]
        piece.output((inputs[0],))
        modules[f"piece_{number}"] = GraphModule({}, piece)
        outputs = graph.call_module(f"piece_{number}", (hidden, *weights[number]))
        hidden = graph.call_function(sys.modules["operator"].getitem, (outputs, 0))
    graph.output((hidden,))
    execute = generate_execution_code(GraphModule(modules, graph), groups).compile()
    tensor = torch.ones(1)
    bound = [[tensor, tensor] for _ in range(num_pieces)]

    def no_op(inputs: list[Any]) -> tuple[Any]:
        return (inputs[0],)

    pieces = [no_op] * num_pieces
    return microseconds(lambda: execute(pieces, bound, tensor))


def three_tensors(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """A function as small as can be, so that what is around it shows."""
    return a * b + c


def measure_binding(cache: str) -> dict[str, Any]:
    """Time a call of three tensors whose compiled piece does nothing: all that is left is ours."""
    call = precast.compile(three_tensors, cache_dir=cache, progress=False)
    inputs = [torch.randn(5, 8) for _ in range(3)]
    with torch.inference_mode():
        call(*inputs)
    loaded = call.__precast__.dispatcher.loaded[0]
    done = [inputs[0]]
    for number, slot in enumerate(loaded.slots.slots):
        if slot is not None:
            loaded.slots.swap(number, lambda _: done, slot)
    bound = loaded.bound
    with torch.inference_mode():
        return {
            "whole": microseconds(lambda: call(*inputs)),
            "check": microseconds(lambda: loaded.check(*inputs)),
            "is_current": microseconds(bound.is_current),
            "entry": microseconds(lambda: bound.entry(*inputs)),
            "python_call": microseconds(lambda: no_operation(*inputs)),
        }


def no_operation(*inputs: Any) -> None:
    """What calling anything costs in Python."""


def measure_decoder(options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Compare whole decoders with one set of weights, call by call in turn."""
    shape = shape_of(options)
    eager = build_decoder(shape, device=options.device, dtype=dtype_of(options))
    shared = {id(tensor): tensor for tensor in (*eager.parameters(), *eager.buffers())}
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    ours = copy.deepcopy(eager, dict(shared))
    calls: dict[str, Callable[..., Any]] = {
        "eager": eager,
        "precast": precast.compile(ours, cache_dir=cache, progress=False),
    }
    if not options.quick:
        calls["torch.compile"] = torch.compile(copy.deepcopy(eager, dict(shared)))
    result: dict[str, Any] = {"layers": shape.layers}

    def rounds(num_tokens: int, count: int, kinds: dict[str, Callable[..., Any]]) -> dict[str, Any]:
        inputs = decoder_inputs(shape, num_tokens, device=options.device)
        host: dict[str, list[float]] = {name: [] for name in kinds}
        total: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(count):
            for name, call in kinds.items():
                synchronize()
                begun = time.perf_counter()
                call(*inputs)
                host[name].append(time.perf_counter() - begun)
                synchronize()
                total[name].append(time.perf_counter() - begun)
        found: dict[str, Any] = {}
        for name in kinds:
            found[name] = {
                "host_us": statistics.median(host[name]) * 1e6,
                "total_us": statistics.median(total[name]) * 1e6,
                "least_total_us": min(total[name]) * 1e6,
            }
            found[name]["against_precast"] = statistics.median(
                other / mine for other, mine in zip(total[name], total["precast"], strict=True)
            )
        return found

    with torch.inference_mode():
        inputs = decoder_inputs(shape, 17, device=options.device)
        for tensor in inputs:
            if not options.quick:
                torch._dynamo.mark_dynamic(tensor, 0)
        outputs = {name: call(*inputs) for name, call in calls.items()}
        result["largest_difference"] = max(
            (output - outputs["eager"]).float().abs().max().item() for output in outputs.values()
        )
        for num_tokens in options.tokens_per_call:
            rounds(num_tokens, 5, calls)
            result[f"{num_tokens} tokens"] = rounds(num_tokens, options.rounds, calls)
        dispatcher = ours._compiled_call_impl
        loaded = dispatcher.loaded[0]
        inputs = decoder_inputs(shape, 1, device=options.device)
        result["check"] = microseconds(lambda: loaded.check(ours, *inputs))
        result["is_current"] = microseconds(loaded.bound.is_current, calls=50)
        result["num_places"] = len(loaded.bound.binding._held_values)
        # The same call with pieces that do nothing: the native stretches and Precast remain.
        result["reasons"] = [reason["code"] for reason in precast.status(ours)["reasons"]]
        # Without the pieces and the native ops: what Precast itself costs at this depth.
        execution = loaded.assembly.execution
        result["execution_bytes"] = len(execution["source"])
    return result


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was measured and whether it is met."""
    judged = []

    def add(
        target: str, value: float | None, limit: float, unit: str, *, least: bool = False
    ) -> None:
        is_met = None if value is None else (value >= limit if least else value <= limit)
        judged.append(
            {"target": target, "limit": limit, "value": value, "unit": unit, "is_met": is_met}
        )

    stitched = results.get("stitched", {}).get("least_us")
    add("stitched call over 130 no-op pieces", stitched, 25.0, "us")
    whole = results.get("binding", {}).get("whole", {}).get("least_us")
    add("contract check and binding, three tensors", whole, 5.0, "us")
    decoder = results.get("decoder", {}).get("1 tokens", {})
    for name in ("torch.compile", "eager"):
        value = decoder.get(name, {}).get("against_precast")
        add(f"{name} against Precast, 1 token", value, 1.0, "x", least=True)
    return judged


def render(results: dict[str, Any]) -> str:
    """Return the results and the targets as markdown tables."""
    lines = ["| part | least us | median us |", "|---|---|---|"]
    parts = [("stitched call, 130 no-op pieces", results.get("stitched"))]
    parts += [(f"three tensors: {k}", v) for k, v in results.get("binding", {}).items()]
    decoder = results.get("decoder", {})
    parts += [(f"decoder: {k}", decoder.get(k)) for k in ("check", "is_current")]
    for name, value in parts:
        if isinstance(value, dict) and "least_us" in value:
            lines.append(f"| {name} | {value['least_us']:.2f} | {value['median_us']:.2f} |")
    lines += ["", "| call | way | host us | total us | least us | times Precast's |"]
    lines += ["|---|---|---|---|---|---|"]
    for key, kinds in decoder.items():
        if key.endswith("tokens"):
            for name, m in kinds.items():
                lines.append(
                    f"| {key} | {name} | {m['host_us']:.0f} | {m['total_us']:.0f} "
                    f"| {m['least_total_us']:.0f} | {m['against_precast']:.2f} |"
                )
    lines += ["", "| target | limit | measured | |", "|---|---|---|---|"]
    for j in judge(results):
        value = "not measured" if j["value"] is None else f"{j['value']:.2f} {j['unit']}"
        verdict = {True: "met", False: "**MISSED**", None: ""}[j["is_met"]]
        lines.append(f"| {j['target']} | {j['limit']:g} {j['unit']} | {value} | {verdict} |")
    lines += [f"\n{name}: {value['error']}" for name, value in results.items() if "error" in value]
    return "\n".join(lines)


def main() -> int:
    """Run, and print tables; 1 where a part failed or a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=1, default=[32])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--tokens-per-call", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cache", help="where Precast keeps artifacts; default: a fresh folder")
    parser.add_argument("--json", help="write everything there, after every part")
    parser.add_argument("--quick", action="store_true", help="4 layers, no torch.compile")
    parser.add_argument(
        "--parts", nargs="+", default=["stitched", "binding", "decoder"],
        choices=["stitched", "binding", "decoder"],
    )  # fmt: skip
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = [4], 50
    scratch = tempfile.mkdtemp(prefix="precast-call-")
    cache = options.cache or scratch
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache, "inductor")))
    results: dict[str, Any] = {}
    parts = {
        "stitched": measure_stitched_call,
        "binding": lambda: measure_binding(cache),
        "decoder": lambda: measure_decoder(options, cache),
    }
    try:
        for name in options.parts:
            try:
                with torch.inference_mode():
                    results[name] = parts[name]()
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {json.dumps(results[name])}", flush=True)
            if options.json:
                data = {"targets": judge(results), "results": results}
                Path(options.json).write_text(json.dumps(data, indent=1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print()
    print(render(results))
    has_failed = any("error" in result for result in results.values())
    return int(has_failed or any(j["is_met"] is False for j in judge(results)))


if __name__ == "__main__":
    sys.exit(main())
