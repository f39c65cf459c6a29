"""What the command line takes to answer, and what statistics cost a start.

    python benchmarks/cli.py             # commands over a cache of 50 models, and the statistics
    python benchmarks/cli.py --models 500

A command is a fresh process, timed from outside, so that Python's own start counts. Statistics are
measured by the events of a warm start, with the listener and without; calls emit no events.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from precast.cache import CacheStorage, DiskCache
from precast.events import AssemblyLoaded, CacheHit, Emit, Listeners, ModelReady, PieceLoaded
from precast.graph.key import Key
from precast.monitoring.counter import CompilationCounter
from precast.monitoring.stats import StatsListener

COMMANDS = ("stats", "cache ls", "explain --last", "doctor --quick", "--version")


def fill(root: Path, num_models: int) -> None:
    """Publish that many models of three pieces each, without compiling anything."""
    storage = CacheStorage([DiskCache(root)], lambda event: None, time.perf_counter)
    for number in range(num_models):
        records = []
        for piece in range(3):
            key = Key({"kind": "piece", "text": f"{number} {piece}", "torch": "2.13.0"})
            payload = {"kind": "piece", "compiler": "aot_inductor", "seconds": 10.0}
            stored = storage.publish(
                key.digest, {**payload, "parts": key.parts}, {"model.so": os.urandom(65536)}
            )
            records.append({"key": key.digest, "compiler": "eager", "files": stored["files"]})
        key = Key({"kind": "assembly", "model": str(number), "torch": "2.13.0"})
        contract = {"checks": [[place, "type", "x" * 20] for place in range(400)]}
        storage.publish(
            f"{key.digest}-0",
            {"kind": "assembly", "model": f"Model{number}", "parts": key.parts}
            | {"pieces": records, "contract": contract, "seconds": 30.0},
            {},
        )


def warm_start(emit: Emit, number: int) -> None:
    """Emit what a warm start of three pieces emits."""
    emit(CacheHit(f"key-{number}", "disk", 0.0002, 50_000))
    for piece in range(3):
        emit(PieceLoaded("Model", f"piece-{piece}", "cache", 0.001, 10.0))
    emit(AssemblyLoaded("Model", f"key-{number}", 0.02, 33, 3, 30.0))
    emit(ModelReady("Model", 0.02, 33, 3, 33, 0, 3, 30.0, True))


def time_starts(folder: Path, num_starts: int) -> dict[str, float]:
    """Return the median seconds of a start's events with statistics and with a counter alone."""

    def seconds(make: Callable[[], Emit]) -> float:
        times = []
        for number in range(num_starts):
            begun = time.perf_counter()
            warm_start(Listeners([make()]), number)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def make_stats() -> StatsListener:
        return StatsListener(str(folder), lambda misses: None)

    return {"with_s": seconds(make_stats), "without_s": seconds(CompilationCounter)}


def time_command(command: str, root: Path, repeats: int) -> dict[str, float]:
    """Return the median seconds of a command as a process of its own, and its CPU seconds.

    The second is the steadier one where others use the machine.
    """
    times, cpu_times = [], []
    for _ in range(repeats + 1):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "precast", *command.split()],
            env={**os.environ, "PRECAST_CACHE_DIR": str(root)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        times.append(time.perf_counter() - begun)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_times.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    # The first reads files that were read by nobody yet.
    return {"wall_s": statistics.median(times[1:]), "cpu_s": statistics.median(cpu_times[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fill(root, options.models)
        starts = time_starts(root / "v1" / "stats", 200)
        found: dict[str, Any] = {
            "models": options.models,
            "commands": {
                command: time_command(command, root, options.repeats) for command in COMMANDS
            },
            "statistics_of_a_warm_start_us": (starts["with_s"] - starts["without_s"]) * 1e6,
        }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for command, took in found["commands"].items():
        wall_ms, cpu_ms = took["wall_s"] * 1e3, took["cpu_s"] * 1e3
        print(f"precast {command:16} {wall_ms:6.0f} ms, {cpu_ms:.0f} ms of CPU")
    print(f"statistics of a warm start: {found['statistics_of_a_warm_start_us']:.0f} us")


if __name__ == "__main__":
    main()
