"""Whether compiled code is worth running: a piece timed beside its own text, run eager.

Measured where pieces are compiled, in a process of low priority that shares the machine: so both
are run in turns, and compiled code counts as slower only where its median, its best time and most
single turns say so, at all sizes that were tried. When in doubt it is kept.

Turns in which a thread had to wait for a processor say nothing, however many there are: code that
runs in several threads then waits for the last of them, a hundred times as long as it takes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from precast.compilers.interface import CompiledCallable
    from precast.graph.piece import Piece

#: How many times eager's time compiled code may take.
SLOWER = 1.15

_BUDGET_S = 0.3  # For one piece, all sizes together.
_MOST_ROUNDS = 25
_FEWEST_ROUNDS = 3
_FEWEST_TO_JUDGE = 10
_MOST_TURNS = 0.8  # The share of turns in which compiled code has to be slower.
_MOST_WAITED = 0.1  # The share of a run for which threads may wait for a processor, together.


_TASKS = Path("/proc/self/task")


class _Turn(NamedTuple):
    """One run of each; `is_calm`: no thread of either had to wait for a processor."""

    first_s: float
    second_s: float
    is_calm: bool


def time_piece(
    piece: Piece, compiled: CompiledCallable, sizes: Sequence[Mapping[str, int]]
) -> list[dict[str, Any]]:
    """Return the seconds of one call, compiled and eager, at up to two sets of sizes.

    `compiled_s` and `eager_s` are medians, `…_range_s` where the true ones lie with
    95 % confidence.

    Args:
        piece: Gives the inputs, and runs eager.
        compiled: The same, compiled and verified.
        sizes: Those at which it was verified; the first are typical.
    """
    import torch

    from precast.graph.inputs import random_inputs
    from precast.graph.read import eager_function

    if not sizes:
        return []
    smallest = min(sizes, key=lambda row: sum(row.values()))
    rows = [dict(sizes[0])] + [dict(smallest)] * (smallest != sizes[0])
    eager = eager_function(piece)
    on_device = piece.device == "cuda"
    found = []
    known: dict[int, torch.Tensor] = {}
    for row in rows:
        # A piece may write into its inputs: kept apart, or one run would feed the other.
        inputs = random_inputs(piece, row, 0, None if piece.mutated else known)
        written = [(inputs[i], inputs[i].clone()) for i in piece.mutated]

        def restore(written: Any = written) -> None:
            # A piece that counts on, where a static cache is full say, would soon leave it.
            for tensor, before in written:
                tensor.copy_(before)

        def run_compiled(inputs: Any = inputs) -> None:
            compiled(list(inputs))

        def run_eager(inputs: Any = inputs) -> None:
            eager(*inputs)

        with torch.no_grad():
            turns = _in_turns(run_compiled, run_eager, restore, _BUDGET_S / len(rows), on_device)
        calm = [turn for turn in turns if turn.is_calm]
        used = calm if len(calm) >= _FEWEST_ROUNDS else turns
        ours, theirs = [turn.first_s for turn in used], [turn.second_s for turn in used]
        found.append(
            {
                "sizes": row,
                "compiled_s": statistics.median(ours),
                "eager_s": statistics.median(theirs),
                "compiled_best_s": min(ours),
                "eager_best_s": min(theirs),
                "compiled_p90_s": _p90(ours),
                "eager_p90_s": _p90(theirs),
                "compiled_range_s": _range_of_median(ours),
                "eager_range_s": _range_of_median(theirs),
                "num_turns": len(used),
                "calm_turns": len(calm),
                "slower_turns": sum(
                    one > SLOWER * other for one, other in zip(ours, theirs, strict=True)
                ),
            }
        )
    return found


def _range_of_median(seconds: Sequence[float]) -> list[float] | None:
    """Return between which two measurements the true median lies, with 95 % confidence.

    By their ranks (a sign test turned round), which asks nothing of how times are spread. None:
    there are too few for that, five or less.
    """
    ordered, n = sorted(seconds), len(seconds)
    # The chance that at most `rank` of n lie below the median has to stay under 2.5 %.
    chance, rank = 0.0, -1
    while rank < n // 2:
        chance += math.comb(n, rank + 1) / 2**n
        if chance > 0.025:
            break
        rank += 1
    return [ordered[rank], ordered[n - 1 - rank]] if rank >= 0 else None


def how_much_slower(timing: Sequence[Mapping[str, Any]] | None) -> str | None:
    """Say how much slower than eager compiled code is; None: it is not, or nothing is known."""
    if not timing or any(
        row["compiled_s"] <= SLOWER * row["eager_s"]
        or row["compiled_best_s"] <= SLOWER * row["eager_best_s"]
        or row.get("calm_turns", row["num_turns"]) < _FEWEST_TO_JUDGE
        or row["slower_turns"] < _MOST_TURNS * row["num_turns"]
        for row in timing
    ):
        return None
    row = timing[0]
    return f"{row['compiled_s'] * 1e6:.0f} µs where eager takes {row['eager_s'] * 1e6:.0f} µs"


def _p90(seconds: Sequence[float]) -> float:
    return sorted(seconds)[int(0.9 * (len(seconds) - 1))]


def _in_turns(
    first: Callable[[], None],
    second: Callable[[], None],
    restore: Callable[[], None],
    budget_s: float,
    on_device: bool,
) -> list[_Turn]:
    """Return the seconds of each run of two functions, run in turns after one warm-up each.

    `restore` is called before each run and not timed.
    """
    clock = _device_seconds if on_device else _seconds

    def measure(run: Callable[[], None]) -> tuple[float, bool]:
        restore()
        waited_s = _waited_s()
        seconds = clock(run)
        return seconds, _waited_s() - waited_s <= _MOST_WAITED * seconds

    deadline = time.perf_counter() + budget_s
    measure(first)
    measure(second)
    turns: list[_Turn] = []
    while len(turns) < _MOST_ROUNDS:
        # Each begins every other turn: what runs second finds its inputs in the caches.
        if len(turns) % 2:
            one, other = measure(first), measure(second)
        else:
            other, one = measure(second), measure(first)
        turns.append(_Turn(one[0], other[0], one[1] and other[1]))
        if time.perf_counter() > deadline and len(turns) >= _FEWEST_ROUNDS:
            break
    return turns


def _waited_s() -> float:
    """Return for how long threads of this process have waited for a processor, all together.

    0 where the kernel does not say.
    """
    total_ns = 0
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        # A thread that has ended meanwhile, or a kernel that keeps no such figures.
        with contextlib.suppress(OSError, ValueError, IndexError):
            total_ns += int((task / "schedstat").read_text().split()[1])
    return total_ns / 1e9


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _device_seconds(run: Callable[[], None]) -> float:
    """Time by the device's own clock, what it waits for its host included."""
    import torch

    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(started.elapsed_time(ended)) / 1e3
