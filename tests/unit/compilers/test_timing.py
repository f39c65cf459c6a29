from __future__ import annotations

import time
from typing import Any

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
    assert how_much_slower([row(2e-6, 1e-6), row(3e-6, 1e-6)]) == ("2 µs where eager takes 1 µs")


def test_a_piece_is_timed_at_two_sizes_and_soon_done() -> None:
    run = eager_function(TINY)

    def slow(inputs: Any) -> Any:
        time.sleep(0.002)
        return run(*inputs)

    started = time.perf_counter()
    timing = time_piece(TINY, slow, [{"s0": 7}, {"s0": 1}, {"s0": 64}])
    assert time.perf_counter() - started < 5
    assert [found["sizes"] for found in timing] == [{"s0": 7}, {"s0": 1}]
    assert all(found["compiled_best_s"] >= 0.002 for found in timing)
    assert time_piece(TINY, slow, []) == []


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
    [timing] = time_piece(piece, lambda inputs: run(*inputs), [{}])
    assert timing["num_turns"] >= 3
