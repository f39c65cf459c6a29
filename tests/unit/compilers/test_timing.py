from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from precast.compilers import timing
from precast.compilers.timing import how_much_slower, time_piece
from precast.graph.piece import Piece
from precast.graph.read import eager_function
from unit.compilers.example_pieces import TINY, spec


def row(
    compiled: float, eager: float, best: float | None = None, turns: int = 25, slower: int = 25
) -> dict[str, Any]:
    return {
        "sizes": {},
        "compiled_s": compiled,
        "eager_s": eager,
        "compiled_best_s": compiled if best is None else best,
        "eager_best_s": eager,
        "num_turns": turns,
        "slower_turns": slower,
    }


def test_code_is_slower_only_where_everything_says_so() -> None:
    assert how_much_slower(None) is None
    assert how_much_slower([]) is None
    assert how_much_slower([row(1.0, 1.0)]) is None
    assert how_much_slower([row(1.1, 1.0)]) is None, "noise"
    assert how_much_slower([row(2.0, 1.0), row(0.9, 1.0)]) is None, "faster at one size"
    assert how_much_slower([row(2.0, 1.0, best=1.0)]) is None, "its best run is as good"
    assert how_much_slower([row(2.0, 1.0, slower=15)]) is None, "now and then"
    assert how_much_slower([row(2.0, 1.0, turns=5, slower=5)]) is None, "too few turns"
    assert how_much_slower([{**row(2.0, 1.0), "calm_turns": 5}]) is None, "a busy machine"
    assert how_much_slower([row(2e-6, 1e-6), row(3e-6, 1e-6)]) == ("2 µs where eager takes 1 µs")


def test_a_piece_is_timed_at_two_sizes_and_soon_done() -> None:
    run = eager_function(TINY)

    def slow(inputs: Any) -> Any:
        time.sleep(0.002)
        return run(*inputs)

    started = time.perf_counter()
    rows = time_piece(TINY, slow, [{"s0": 7}, {"s0": 1}, {"s0": 64}])
    assert time.perf_counter() - started < 30
    assert [found["sizes"] for found in rows] == [{"s0": 7}, {"s0": 1}]
    assert all(found["compiled_best_s"] >= 0.002 for found in rows)
    assert time_piece(TINY, slow, []) == []


def test_turns_that_waited_for_a_processor_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is left the figures are; where too little is left there is no judgement."""
    run = eager_function(TINY)
    waited_s = 0.0
    num_runs = 0

    def busy(inputs: Any) -> Any:
        nonlocal waited_s, num_runs
        num_runs += 1
        if num_runs % most:
            time.sleep(0.004)
            waited_s += 0.004
        return run(*inputs)

    monkeypatch.setattr(timing, "_waited_s", lambda: waited_s)
    most = 3
    [some] = timing.time_piece(TINY, busy, [{"s0": 7}])
    assert 3 <= some["num_turns"] == some["calm_turns"] < 10
    assert some["compiled_s"] < 0.004
    most, num_runs = 1000, 0
    [none] = timing.time_piece(TINY, busy, [{"s0": 7}])
    assert none["calm_turns"] == 0
    assert none["compiled_best_s"] >= 0.004
    assert how_much_slower([none]) is None
    assert how_much_slower([{**none, "calm_turns": none["num_turns"]}]) is not None


def test_a_busy_machine_is_noticed() -> None:
    """Two threads of which each wants the same processor."""
    before = timing._waited_s()
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})  # Threads that are made from here on, too.
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.perf_counter() + 20
        while timing._waited_s() <= before + 0.01 and time.perf_counter() < deadline:
            sum(range(100_000))
    finally:
        child.kill()
        child.wait()
        os.sched_setaffinity(0, processors)
    assert timing._waited_s() > before + 0.01


def test_a_piece_that_counts_on_begins_anew_each_time() -> None:
    """
    As a static cache does: the counter says where to write, and soon would be outside.
    """
    piece = Piece(
        text="""def piece(a0, a1, a2):
    v0 = a1.index_copy_(0, a2, a0)
    v1 = a2.add_(1)
    return (v0,)
""",
        inputs=(spec(1, 8), spec(3, 8), spec(1, dtype="int64")),
        outputs=(spec(3, 8),),
        symbols={},
        mutated=(1, 2),
    )
    run = eager_function(piece)
    [found] = time_piece(piece, lambda inputs: run(*inputs), [{}])
    assert found["num_turns"] >= 3
