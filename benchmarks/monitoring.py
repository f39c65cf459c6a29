# T201: a script that prints.
"""What monitoring costs: a call with it against one that nothing could watch, and the import.

    python benchmarks/monitoring.py            # CPU: three tensors, and 4 layers of the toy decoder
    python benchmarks/monitoring.py --quick    # fewer rounds

Ways to serve one loaded model, called in turn, many short rounds. A way's time is given as the
least of all rounds (the machine's other users only ever add) and as their median, each also as
times that of `none`; the median there is that of the rounds' ratios.

- `none`: no event reaches anybody, and the call cannot be watched: as if monitoring did not exist.
- `default`: as `precast.compile` leaves it. A call of a ready model emits no event.
- `metrics`: with a `MetricsCollector` as a listener.
- `watched`: and one call in 100 timed; `each call`: every one.

Listeners work at starts: the time in all default ones is measured apart, in a warm start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from call import three_tensors
from decoder import build_decoder, decoder_inputs
from startup import shape_of

import precast
from precast.events import Listeners

WAYS = ("none", "default", "metrics", "watched", "each call")


class Served:
    """One compiled model that is called in several ways: same code, same weights, same memory."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._dispatcher = getattr(model, "_compiled_call_impl", None) or (
            model.__precast__.dispatcher
        )
        self._session = self._dispatcher.compiled.session
        self._default = self._session.emit
        self._metrics = precast.MetricsCollector()
        self._fixed = None if isinstance(model, torch.nn.Module) else fixed(self._dispatcher)

    def arrange(self, way: str) -> Callable[..., Any]:
        """Return what is to be called, with whoever listens and watches."""
        self._metrics.unwatch(self._model)
        if way == "none":
            self._session.emit = lambda event: None
            return self._fixed or self._model
        listeners = self._default._listeners
        with_metrics = () if way == "default" else (self._metrics,)
        self._session.emit = Listeners((*listeners, *with_metrics))
        if way in ("watched", "each call"):
            self._metrics.watch(self._model, every=100 if way == "watched" else 1)
        return self._model


def fixed(dispatcher: Any) -> Callable[..., Any]:
    """Return what serves a function's calls, as it would be if nobody could ever watch them."""
    serve = dispatcher.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return None
        return serve(*args, **kwargs)

    return call


def compare(served: Served, inputs: Any, rounds: int, num_calls: int) -> dict[str, Any]:
    """Return of each way the microseconds of a call, and its ratio to `none`."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        # Another one begins each round: what runs first finds another machine.
        first = number % len(WAYS)
        for way in (*WAYS[first:], *WAYS[:first]):
            call = served.arrange(way)
            call(*inputs)
            started = time.perf_counter()
            for _ in range(num_calls):
                call(*inputs)
            seconds[way].append((time.perf_counter() - started) / num_calls)
    return {
        way: {
            "least_us": min(taken) * 1e6,
            "median_us": statistics.median(taken) * 1e6,
            "least_against_none": min(taken) / min(seconds["none"]),
            "against_none": statistics.median(
                mine / none for mine, none in zip(taken, seconds["none"], strict=True)
            ),
        }
        for way, taken in seconds.items()
    }


def listeners_in_a_warm_start(make: Callable[[], Any], inputs: Any, cache: str) -> dict[str, Any]:
    """Return what the default listeners take of a warm start, in this process."""
    told_s: list[float] = []
    emit = Listeners.__call__

    def timed(self: Listeners, event: Any) -> None:
        started = time.perf_counter()
        emit(self, event)
        told_s.append(time.perf_counter() - started)

    starts, shares = [], []
    for _ in range(15):
        model = precast.compile(make(), cache_dir=cache, progress=False, revalidate="never")
        told_s.clear()
        Listeners.__call__ = timed  # type: ignore[method-assign]
        try:
            started = time.perf_counter()
            model(*inputs)
            starts.append(time.perf_counter() - started)
        finally:
            Listeners.__call__ = emit  # type: ignore[method-assign]
        shares.append(sum(told_s) / starts[-1])
        precast.release(model)
    return {
        "events": len(told_s),
        "start_ms": statistics.median(starts) * 1e3,
        "share": statistics.median(shares),
    }


def import_ms(module: str, repeats: int) -> float:
    """Return the median time to import a module in a fresh process."""
    program = (
        "import time; started = time.perf_counter(); "
        f"import {module}; print((time.perf_counter() - started) * 1e3)"
    )
    command = [sys.executable, "-c", program]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(repeats)
    )


def main() -> int:
    """Run, and print tables; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", help="write everything there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    rounds, layers = (100 if options.quick else options.rounds), 4
    shape = shape_of(
        argparse.Namespace(
            layers=[layers], hidden=256, intermediate=688, heads=4, kv_heads=4, vocabulary=512
        )
    )
    torch.set_num_threads(1)  # Threads that wait for a busy core would be all that is measured.
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache, torch.inference_mode():
        tensors = [torch.randn(5, 8) for _ in range(3)]
        tokens = decoder_inputs(shape, 1, device="cpu")
        eager = build_decoder(shape, device="cpu", dtype=torch.float32)
        state = eager.state_dict()

        def make_decoder() -> Any:
            model = build_decoder(shape, device="cpu", dtype=torch.float32)
            model.load_state_dict(state)
            return model

        kinds = {
            "three tensors": (lambda: three_tensors, tensors, rounds, 200),
            f"decoder, {layers} layers, 1 token": (make_decoder, tokens, rounds, 2),
        }
        for name, (make, inputs, count, num_calls) in kinds.items():
            model = precast.compile(make(), cache_dir=cache, progress=False, revalidate="never")
            model(*inputs)
            served = Served(model)
            compare(served, inputs, 10, num_calls)
            results[name] = compare(served, inputs, count, num_calls)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
        results["warm start"] = listeners_in_a_warm_start(make_decoder, tokens, cache)
    results["import ms"] = {
        module: import_ms(module, 5 if options.quick else 15)
        for module in ("precast", "precast.monitoring.metrics")
    }
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    print("| call | way | least us | median us | times `none`, least | median |")
    print("|---|---|---|---|---|---|")
    for name in kinds:
        for way, found in results[name].items():
            print(
                f"| {name} | {way} | {found['least_us']:.2f} | {found['median_us']:.2f} "
                f"| {found['least_against_none']:.4f} | {found['against_none']:.4f} |"
            )
    start = results["warm start"]
    print(
        f"\nDefault listeners took {start['share']:.1%} of a warm start of "
        f"{start['start_ms']:.1f} ms, for {start['events']} events."
    )
    print("\n| import | median ms |\n|---|---|")
    for module, taken in results["import ms"].items():
        print(f"| `{module}` | {taken:.1f} |")
    print("\n| target | limit | measured | |\n|---|---|---|---|")
    targets = [
        (f"default settings, {name}", 1.01, results[name]["default"]["least_against_none"], "x")
        for name in kinds
    ]
    targets.append(("import precast", 50.0, results["import ms"]["precast"], "ms"))
    for target, limit, value, unit in targets:
        verdict = "met" if value <= limit else "**MISSED**"
        print(f"| {target} | {limit:g} {unit} | {value:.4g} {unit} | {verdict} |")
    return int(any(value > limit for _, limit, value, _ in targets))


if __name__ == "__main__":
    sys.exit(main())
