# T201, BLE001: a script that prints, and that reports what fails.
"""Serving while pieces compile: what it costs the calls, and that nothing runs away.

    python benchmarks/progressive.py                       # 4 layers on the CPU
    python benchmarks/progressive.py --device cuda --dtype bf16 --hidden 4096 \
        --intermediate 14336 --heads 32 --kv-heads 8 --vocabulary 32000 --layers 4
    python benchmarks/progressive.py --quick               # small enough for CI

Each part runs in a process of its own, with fresh caches. *First answer*: from the first call to
its output, in fresh processes in turns; `precast.compile`, where a server sets its model up, is
shown apart.
*While compiling*: calls one after the other in one thread, from the first call until the first
piece lands. All processes that compile are stopped every other half second (SIGSTOP): calls beside
them are compared with calls in between, since a machine's speed drifts. From that is taken what
this process's own threads had of a core meanwhile, as if calls had stood still. All times until
the first piece landed contain the stops (`stopped_s`). On the CPU the calls leave one core free
(`--threads`). *Beside another*: the same with an unrelated process, which parses
Python: what the machine itself takes where its other core is busy.
*Around a swap*: the slowest call of those that met one, against the median of the two seconds
before it, whose slowest is shown too.
*Steady*: two models with the same pieces, one compiled behind and one blocking, called in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from startup import dtype_of, shape_of

from precast.background.usage import processes_of

PARTS = ("first", "serving", "hung", "killed")


# ---------------------------------------------------------------------------
# In a process of its own


def make(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return a model, its inputs, and what waits for the device."""
    import torch
    from decoder import build_decoder, decoder_inputs

    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    shape = shape_of(options)
    model = build_decoder(shape, device=options.device, dtype=dtype_of(options))
    inputs = decoder_inputs(shape, options.tokens, device=options.device)
    small = torch.ones(8, 8, device=options.device)
    (small @ small).sum().item()
    return model, inputs, torch.cuda.synchronize if options.device == "cuda" else lambda: None


def measure_first(options: argparse.Namespace) -> dict[str, Any]:
    """Time the first answer: eager, or served in progressive mode."""
    import torch

    import precast

    model, inputs, synchronize = make(options)
    set_up = time.perf_counter()
    if options.way == "progressive":
        precast.compile(model, mode="progressive", cache_dir=options.cache, progress=False)
    set_up_s = time.perf_counter() - set_up
    # A core that has just waited, for a disk say, computes slower for a while, by a quarter: more
    # than what is measured, and not of our making. So each process has kept its own busy before.
    warm_up = torch.ones(8, 8)
    busy_until = time.perf_counter() + 0.2
    while time.perf_counter() < busy_until:
        warm_up @ warm_up
    started = time.perf_counter()
    model(*inputs)
    synchronize()
    seconds = time.perf_counter() - started
    precast.release(model)
    return {"first_s": seconds, "set_up_s": set_up_s}


class Turns:
    """Stops and continues all processes that this one started, in turns. `look` between calls."""

    def __init__(self) -> None:
        self.turns: list[tuple[float, bool]] = []  # When each began, and whether they run in it.
        self._looked = 0.0
        self._num_signals = 0

    def look(self) -> None:
        """Change turns when it is time, and find the processes that were started meanwhile."""
        now = time.perf_counter()
        if not self.turns or now - self.turns[-1][0] >= 0.5:
            self.turns.append((now, not self.turns or not self.turns[-1][1]))
        elif now - self._looked < 0.05:
            return
        self._looked = now
        self._signal(signal.SIGCONT if self.turns[-1][1] else signal.SIGSTOP)

    def end(self) -> None:
        """Let them run."""
        self.turns.append((time.perf_counter(), True))
        self._signal(signal.SIGCONT)

    def ratio(self, calls: list[tuple[float, float]]) -> float | None:
        """Return calls a second beside the processes, times those with the processes stopped."""
        seconds = {True: 0.0, False: 0.0}
        counts = {True: 0, False: 0}
        for (start, is_running), (end, _) in itertools.pairwise(self.turns):
            seconds[is_running] += end - start
            counts[is_running] += sum(start <= begun < end for begun, _ in calls)
        if not self._num_signals or not counts[True] or not counts[False]:
            return None
        return counts[True] / seconds[True] / (counts[False] / seconds[False])

    def stopped_s(self) -> float:
        """Return how long the processes were stopped."""
        pairs = itertools.pairwise(self.turns)
        return sum(end - start for (start, is_running), (end, _) in pairs if not is_running)

    def _signal(self, number: signal.Signals) -> None:
        for pid in processes_of(os.getpid()) - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self._num_signals += 1


def cpu_of_other_threads() -> float:
    """Return the CPU seconds of this process's Python threads, but for the one that calls."""
    total_ns = 0
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            with contextlib.suppress(OSError):  # It has ended, or the kernel does not tell.
                path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
                total_ns += int(path.read_text().split()[0])
    return total_ns / 1e9


PARSING = """
import ast, argparse, os
os.nice(10)
text = open(argparse.__file__).read()
parent = os.getppid()
while os.getppid() == parent:
    ast.parse(text)
"""


class Caller:
    """Calls a model and keeps when each call began and ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self._inputs, self._synchronize = make(options)
        self._seconds = options.seconds
        self.calls: list[tuple[float, float]] = []

    def __call__(self) -> None:
        begun = time.perf_counter()
        self.model(*self._inputs)
        self._synchronize()
        self.calls.append((begun, time.perf_counter()))

    def rate(self, start: float, end: float) -> float:
        """Return calls a second."""
        return sum(start <= begun and ended <= end for begun, ended in self.calls) / (end - start)

    def rate_alone(self) -> float:
        """Call for a while with nothing beside."""
        self.calls.clear()
        started = time.perf_counter()
        while time.perf_counter() < started + self._seconds:
            self()
        return self.rate(started, time.perf_counter())

    def share_beside_another(self) -> float | None:
        """Call for a while beside an unrelated process."""
        self.calls.clear()
        turns = Turns()
        other = subprocess.Popen([sys.executable, "-c", PARSING])
        try:
            ends = time.perf_counter() + self._seconds
            while time.perf_counter() < ends:
                turns.look()
                self()
        finally:
            turns.end()
            other.kill()
            other.wait()
        return turns.ratio(self.calls)

    def around(self, swaps: list[float]) -> dict[str, float]:
        """Return the slowest calls around and shortly before swaps, times the median then."""
        around, shortly_before = [0.0], [0.0]
        for swap in swaps:
            earlier = [b - a for a, b in self.calls if swap - 2.2 < a < swap - 0.2]
            if not earlier:
                continue  # Calls that take seconds.
            usual = statistics.median(earlier)
            met = [b - a for a, b in self.calls if a - 2 * (b - a) <= swap <= b + (b - a)]
            around.append(max(met, default=0.0) / usual)
            shortly_before.append(max(earlier) / usual)
        return {"slowest_around_swap": max(around), "slowest_shortly_before": max(shortly_before)}


def measure_serving(options: argparse.Namespace) -> dict[str, Any]:
    """Call a model in a loop before, while and after it is compiled."""
    import precast
    from precast.events import CaptureFinished, ModelReady, SlotSwapped

    call = Caller(options)
    model = call.model
    for _ in range(10):
        call()
    # As servers do: a full collection, 60 ms with all of torch alive, falls due now and then.
    gc.collect()
    gc.freeze()
    before = call.rate_alone()
    median = statistics.median(b - a for a, b in call.calls)
    events: list[tuple[float, Any]] = []
    precast.compile(
        model,
        mode="progressive",
        cache_dir=options.cache,
        progress=False,
        revalidate="never",
        max_compile_time=options.timeout,
        listeners=[lambda event: events.append((time.perf_counter(), event))],
    )
    call.calls.clear()
    turns = Turns()
    cpu_before = cpu_of_other_threads()
    started = time.perf_counter()
    try:
        while not call.calls or not precast.wait(model, 0):
            turns.look()
            call()
            if any(type(event) is SlotSwapped for _, event in events):
                break
    finally:
        turns.end()
    own_share = (cpu_of_other_threads() - cpu_before) / (time.perf_counter() - started)
    besides = turns.ratio(call.calls)
    while not precast.wait(model, 0):
        call()
    ended = time.perf_counter()
    for _ in range(20):
        call()
    at = {kind: [t for t, event in events if type(event) is kind] for kind in
          (CaptureFinished, ModelReady, SlotSwapped)}  # fmt: skip
    found: dict[str, Any] = {
        "eager_ms": median * 1e3,
        "calls_per_s_before": before,
        # Until the first piece lands calls are eager: only those compare.
        "share": None if besides is None else besides * (1 - own_share),
        "share_beside_processes": besides,
        "own_share": own_share,
        "stopped_s": turns.stopped_s(),
        "compile_s": ended - started,
        "capture_s": at[CaptureFinished][0] - started if at[CaptureFinished] else None,
        "first_swap_s": at[SlotSwapped][0] - started if at[SlotSwapped] else None,
        **call.around(at[SlotSwapped]),
        "slowest_while": max(b - a for a, b in call.calls) / median,
        # To see what disturbs: calls in each half second, what happened when, calls that were slow.
        "calls_by_half_second": [
            round(call.rate(started + i / 2, started + (i + 1) / 2) / before, 3)
            for i in range(int((ended - started) * 2))
        ],
        "happened": [[round(t - started, 4), type(event).__name__] for t, event in events],
        "slow_calls": [
            [round(a - started, 4), (b - a) / median] for a, b in call.calls if b - a > 1.5 * median
        ][:100],
        **told_by(model),
        "imported": [n for n in ("torch._dynamo", "torch._inductor") if n in sys.modules],
    }
    found |= measure_steady(call, options)
    precast.release(model)
    return found | {
        "calls_per_s_after": call.rate_alone(),
        "beside_another": call.share_beside_another(),
    }


def told_by(model: Any) -> dict[str, Any]:
    """Return what `precast.status` tells of a model's pieces."""
    import precast

    status = precast.status(model)
    pieces = [piece for assembly in status["assemblies"] for piece in assembly["pieces"]]
    return {
        "compilers": sorted({piece["compiler"] for piece in pieces}),
        "reasons": status["reasons"]
        + [piece["reason"] for piece in pieces if piece["reason"] is not None][:2],
        "timing": [piece["timing"] for piece in pieces][:3],
    }


def measure_steady(ours: Caller, options: argparse.Namespace) -> dict[str, Any]:
    """Compare with a model that was compiled in blocking mode: the same pieces, from the cache."""
    import precast

    blocking = Caller(options)
    precast.compile(blocking.model, cache_dir=options.cache, progress=False, revalidate="never")
    blocking()
    blocking.calls.clear()
    ours.calls.clear()
    for number in range(2 * options.rounds):
        for call in (ours, blocking) if number % 2 else (blocking, ours):
            call()
    own_s, their_s = (statistics.median(b - a for a, b in c.calls) for c in (ours, blocking))
    return {"steady_ms": own_s * 1e3, "blocking_ms": their_s * 1e3, "steady_ratio": own_s / their_s}


def measure_planted(options: argparse.Namespace, name: str, **settings: Any) -> dict[str, Any]:
    """Have a small function compiled by a compiler of `planted.py`; return its events' times."""
    import planted
    import torch

    import precast

    events: list[tuple[float, str]] = []
    served = precast.compile(
        small_function,
        mode="progressive",
        compiler=getattr(planted, name)(),
        cache_dir=options.cache,
        progress=False,
        listeners=[lambda event: events.append((time.perf_counter(), type(event).__name__))],
        **settings,
    )
    x = torch.ones(4, 4)
    is_eager = torch.equal(served(x), small_function(x))
    is_done = precast.wait(served, options.timeout)
    return {
        "is_right": is_eager and is_done and torch.equal(served(x), small_function(x)),
        "events": events,
    }


def small_function(x: Any) -> Any:
    """Return what costs nothing to compile."""
    return (x * 2).relu() + 1


def measure_hung(options: argparse.Namespace) -> dict[str, Any]:
    """Time how long a compile that hangs is there, beyond what it may take."""
    limit_s = 3.0
    found = measure_planted(options, "Hung", max_compile_time=limit_s)
    happened = found.pop("events")
    at = {name: seconds for seconds, name in reversed(happened)}
    if "PieceFailed" not in at:
        raise RuntimeError(f"it did not fail: {[name for _, name in happened]}")
    return {**found, "over_s": at["PieceFailed"] - at["CompileStarted"] - limit_s}


def measure_killed(options: argparse.Namespace) -> dict[str, Any]:
    """Count how often a piece is begun whose worker is killed once."""
    found = measure_planted(options, "KilledOnce")
    names = [name for _, name in found.pop("events")]
    return {**found, "num_tries": names.count("CompileStarted"), "landed": "ModelReady" in names}


# ---------------------------------------------------------------------------
# All of it


def run_child(part: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a fresh process with a fresh cache."""
    scratch = tempfile.mkdtemp(prefix="precast-progressive-")
    # Not as a script: a child of the child must find this module under its name.
    program = "import sys, progressive; progressive.child(sys.argv[1:])"
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    cache = ["--cache", str(Path(scratch, "cache"))]
    arguments = [a for a in sys.argv[1:] if a != "--quick"] + options.quick_arguments
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments, "--child", part, "--way", way, *cache],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                # As where it is installed: imports find bytecode.
                "PYTHONPYCACHEPREFIX": options.bytecode,
                "PYTHONDONTWRITEBYTECODE": "",
                "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch, "inductor")),
            },
        )
        try:
            output, errors = process.communicate(timeout=options.timeout)
        except subprocess.TimeoutExpired:
            for pid in processes_of(process.pid):  # Those that are stopped would stay.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
            return {"error": f"not done after {options.timeout:g} s"}
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            return {"error": f"exit code {process.returncode}: {errors.strip()[-600:]}"}
        return dict(json.loads(lines[-1]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def child(arguments: list[str]) -> None:
    """Run one part in this process."""
    import torch

    options = parse(arguments)
    measure: dict[str, Any] = {
        "first": measure_first,
        "serving": measure_serving,
        "hung": measure_hung,
        "killed": measure_killed,
    }
    with torch.inference_mode():
        print(json.dumps(measure[options.child](options)), flush=True)


def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what one part measured; of first answers the medians."""
    if part != "first":
        return run_child(part, "", options)
    seconds: dict[str, list[float]] = {"eager": [], "progressive": []}
    set_up = []
    for _ in range(options.repeats):
        for way, so_far in seconds.items():
            found = run_child("first", way, options)
            if "error" in found:
                return found
            so_far.append(found["first_s"])
        set_up.append(found["set_up_s"])
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    return {
        **medians,
        "ratio": medians["progressive"] / medians["eager"],
        "set_up_s": statistics.median(set_up),
        "all": seconds,
    }


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was measured and whether it is met (None: not measured)."""
    judged: list[dict[str, Any]] = []

    def add(target: str, part: str, name: str, limit: float, *, least: bool = False) -> None:
        value = results.get(part, {}).get(name)
        is_met = None if value is None else value >= limit if least else value <= limit
        judged.append({"target": target, "limit": limit, "value": value, "is_met": is_met})

    add("first answer, times eager's", "first", "ratio", 1.1)
    add("eager throughput while compiling", "serving", "share", 0.9, least=True)
    add("slowest call around a swap, times the median", "serving", "slowest_around_swap", 3.0)
    add("steady after the swap, times blocking", "serving", "steady_ratio", 1.02)
    add("a hung compile is there beyond its limit, s", "hung", "over_s", 2.0)
    add("tries of a piece whose worker was killed once", "killed", "num_tries", 2)
    return judged


def render(results: dict[str, Any]) -> str:
    """Return the results and the targets as markdown tables."""
    lines = ["", "| target | limit | measured | |", "|---|---|---|---|"]
    for j in judge(results):
        value = "not measured" if j["value"] is None else f"{j['value']:.3g}"
        verdict = {True: "met", False: "**MISSED**", None: ""}[j["is_met"]]
        lines.append(f"| {j['target']} | {j['limit']:g} | {value} | {verdict} |")
    lines += [f"\n{name}: {value['error']}" for name, value in results.items() if "error" in value]
    beside = results.get("serving", {}).get("beside_another")
    if beside is not None:
        slowest = results["serving"]["slowest_shortly_before"]
        lines.append(f"\nCalls beside an unrelated process: {beside:.3g} of those without.")
        lines.append(f"Slowest call in the seconds before a swap: {slowest:.3g} times the median.")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=1, default=[4])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=max(1, cores - 1), help="of the calls")
    parser.add_argument("--seconds", type=float, default=10.0, help="of undisturbed calls")
    parser.add_argument("--rounds", type=int, default=200, help="of steady calls")
    parser.add_argument("--repeats", type=int, default=7, help="of first answers")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one process")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", help="write everything there, after every part")
    parser.add_argument("--quick", action="store_true", help="2 layers, fewer calls")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.quick_arguments = []
    if options.quick:
        options.repeats = 3
        options.quick_arguments = ["--layers", "2", "--seconds", "3", "--rounds", "50"]
    return options


def main() -> int:
    """Run, and print tables; 1 where a part failed or a target was missed."""
    options = parse()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="precast-bytecode-") as options.bytecode:
        run_child("killed", "", options)  # For the bytecode of what the others import.
        for part in options.parts:
            results[part] = run_part(part, options)
            print(f"{part}: {json.dumps(results[part])}", flush=True)
            if options.json:
                data = {"targets": judge(results), "results": results}
                Path(options.json).write_text(json.dumps(data, indent=1))
    print(render(results))
    has_failed = any(
        "error" in result or result.get("is_right") is False for result in results.values()
    )
    return int(has_failed or any(j["is_met"] is False for j in judge(results)))


if __name__ == "__main__":
    sys.exit(main())
