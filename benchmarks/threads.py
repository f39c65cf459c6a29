# T201: a script that prints.
"""Several threads in one model, and the rest of a server meanwhile: ours, torch.compile and eager.

    python benchmarks/threads.py            # a wide layer twice, on the CPU
    python benchmarks/threads.py --quick

*Together*: calls a second of several threads that call one model, against one thread's; torch
itself uses one thread a call. *Standing still*: the longest time that a thread which only looks
at the clock did not get on, while one call ran, against the time of the call. 1 is a server that
answers nobody meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import precast


def build(width: int) -> torch.nn.Module:
    """Return two wide layers: one piece, most of it in products of matrices."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
    )
    return layers.eval().requires_grad_(False)


def calls_per_second(model: Any, x: torch.Tensor, num_threads: int, seconds: float) -> float:
    """Let threads call a model, each with inputs of its own; return how often all of them did."""
    barrier = threading.Barrier(num_threads)

    def serve(_: int) -> float:
        mine, done = x.clone(), 0
        with torch.inference_mode():
            barrier.wait()
            started = time.perf_counter()
            while time.perf_counter() < started + seconds:
                model(mine)
                done += 1
        return done / (time.perf_counter() - started)

    with ThreadPoolExecutor(num_threads) as threads:
        return sum(threads.map(serve, range(num_threads)))


def standing_still(model: Any, x: torch.Tensor) -> float:
    """Return the longest pause of another thread during one call, over the time of the call."""
    times: list[float] = []

    def call() -> None:
        with torch.inference_mode():
            times.append(time.perf_counter())
            model(x)
            times.append(time.perf_counter())

    thread = threading.Thread(target=call)
    seen = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        seen.append(time.perf_counter())
    longest = max(after - before for before, after in itertools.pairwise(seen))
    return longest / (times[1] - times[0])


def main() -> None:
    """Measure all ways in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls, each time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write everything there")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 0.2
    torch.set_num_threads(1)
    eager = build(options.width)
    x = torch.randn(options.rows, options.width)
    with tempfile.TemporaryDirectory(prefix="precast-threads-") as cache:
        models: dict[str, Any] = {"eager": eager}
        models["precast"] = precast.compile(
            copy.deepcopy(eager), cache_dir=cache, progress=False, revalidate="never"
        )
        models["torch.compile"] = torch.compile(copy.deepcopy(eager), dynamic=True)
        figures: dict[str, dict[str, list[float]]] = {
            name: {"alone": [], "together": [], "still": []} for name in models
        }
        with torch.inference_mode():
            for model in models.values():
                torch.testing.assert_close(model(x), eager(x))
        large = x.repeat(32, 1)
        for _ in range(options.rounds):
            for name, model in models.items():
                found = figures[name]
                alone = calls_per_second(model, x, 1, options.seconds)
                found["alone"].append(alone)
                together = calls_per_second(model, x, options.threads, options.seconds)
                found["together"].append(together / alone)
                found["still"].append(standing_still(model, large))
        pieces = precast.status(models["precast"])["assemblies"][0]["pieces"]
    medians = {
        name: {kind: statistics.median(values) for kind, values in found.items()}
        for name, found in figures.items()
    }
    print(f"compiled by {', '.join(sorted({piece['compiler'] for piece in pieces}))}\n")
    print(f"| way | calls/s, 1 thread | {options.threads} threads, times that | standing still |")
    print("|---|---|---|---|")
    for name, found in medians.items():
        print(f"| {name} | {found['alone']:.0f} | {found['together']:.2f} | {found['still']:.2f} |")
    if options.json:
        Path(options.json).write_text(json.dumps({"medians": medians, "all": figures}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
