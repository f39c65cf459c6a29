from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from precast.graph.inputs import (
    edge_sizes,
    evaluate_size,
    fake_inputs,
    random_inputs,
    symbol_hints,
    zero_inputs,
    zero_sizes,
)
from precast.graph.piece import SymbolRange
from precast.graph.read import PieceTextError
from unit.compilers.example_pieces import TINY, spec


def test_fake_inputs_carry_the_specs() -> None:
    piece = replace(TINY, inputs=(spec("s0", 4), spec("(8*s0 + 1)", dtype="bfloat16")))
    mode, (first, second), symbols = fake_inputs(piece)

    hint = symbol_hints(piece)["s0"]
    assert first.fake_mode is mode
    assert second.dtype == torch.bfloat16
    assert (first.shape[0].node.hint, second.shape[0].node.hint) == (hint, 8 * hint + 1)
    assert str(first.shape[0].node.expr) == str(symbols["s0"].node.expr)
    assert not mode.shape_env.guards


def test_random_inputs_have_the_strides_of_the_spec() -> None:
    piece = replace(TINY, inputs=(spec("s0", 4, stride=(1, "s0")), spec(3, dtype="int64")))
    floats, integers = random_inputs(piece, {"s0": 6}, 1)

    assert (floats.shape, floats.stride()) == ((6, 4), (1, 6))
    assert set(integers.tolist()) <= {0, 1}
    assert torch.equal(floats, random_inputs(piece, {"s0": 6}, 1)[0])


def test_zero_inputs_have_the_strides_of_the_spec_and_take_what_is_known() -> None:
    inputs = (spec("s0", 4, stride=(1, "s0")), spec(3, dtype="int64"), spec(2, dtype="bfloat16"))
    weight = torch.ones(2, dtype=torch.bfloat16)
    floats, integers, known = zero_inputs(replace(TINY, inputs=inputs), {"s0": 6}, {2: weight})

    assert (floats.shape, floats.stride()) == ((6, 4), (1, 6))
    assert not floats.any()
    assert torch.equal(integers, torch.zeros(3, dtype=torch.int64))
    assert known is weight
    empty = zero_inputs(replace(TINY, inputs=inputs[:1]), {"s0": 0}, {})[0]
    assert (empty.shape, empty.stride()) == ((0, 4), (1, 0))


def test_edge_sizes_lie_within_the_ranges() -> None:
    symbols = {"s0": SymbolRange(low=3, high=64), "s1": SymbolRange(low=0, high=None)}
    piece = replace(TINY, inputs=(spec("s0", "s1"),), symbols=symbols, hints={"s0": 32, "s1": 32})
    rows = edge_sizes(piece)

    assert len(rows) <= 6
    assert all(size in symbols[name] for row in rows for name, size in row.items())
    assert {3, 64} <= {row["s0"] for row in rows}
    assert {1, 2, 3} <= {row["s1"] for row in rows}
    assert len(set(symbol_hints(piece).values())) == 2
    assert zero_sizes(piece) == [{"s0": 32, "s1": 0}]


def test_a_piece_without_symbols_has_one_assignment() -> None:
    assert edge_sizes(replace(TINY, inputs=(spec(2, 4),), outputs=(), symbols={})) == [{}]


def test_sizes_are_expressions_and_nothing_else() -> None:
    assert evaluate_size("max(8*s0 + 1, s1 // 2)", {"s0": 2, "s1": 100}) == 50
    with pytest.raises(PieceTextError):
        evaluate_size("__import__('os')", {})


def test_sizes_that_were_alike_stay_alike_on_request() -> None:
    """Two symbols may have to be equal although only the model's code says so."""
    ranges = {name: SymbolRange(low=0, high=None) for name in ("s0", "s1", "s2")}
    piece = replace(TINY, symbols=ranges, hints={"s0": 4, "s1": 12, "s2": 4})
    rows = edge_sizes(piece, keep_alike=True) + zero_sizes(piece, keep_alike=True)

    assert all(row["s0"] == row["s2"] for row in rows)
    assert {row["s1"] for row in rows} >= {1, 2, 3, 0}
    assert any(row["s0"] != row["s1"] for row in rows)
    assert any(row["s0"] != row["s2"] for row in edge_sizes(piece))


def test_sizes_stay_alike_only_within_their_ranges() -> None:
    ranges = {"s0": SymbolRange(low=0, high=None), "s1": SymbolRange(low=5, high=8)}
    piece = replace(TINY, symbols=ranges, hints={"s0": 6, "s1": 6})

    assert all(row["s1"] in ranges["s1"] for row in edge_sizes(piece, keep_alike=True))
