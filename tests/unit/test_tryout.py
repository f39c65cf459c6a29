"""New code is run once before calls run it, on numbers that do no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from precast import tryout
from precast.compilers.eager import eager_call
from precast.graph.piece import Piece
from precast.graph.read import eager_function
from precast.tryout import run_once
from unit.compilers.example_pieces import GATED, spec

DIVIDES = Piece(
    text="""def piece(a0, a1):
    v0 = operator.floordiv(a0, a1)
    return (v0,)
""",
    inputs=(spec(8, dtype="int64"), spec(8, dtype="int64")),
    outputs=(spec(8, dtype="int64"),),
    symbols={},
)


class Code:
    """Stands for a piece's compiled code, and keeps what it was run with."""

    def __init__(self, piece: Piece) -> None:
        self.inputs: list[Any] = []
        self._eager = eager_function(piece)

    def __call__(self, inputs: list[torch.Tensor]) -> Any:
        self.inputs.append(inputs)
        return self._eager(*inputs)


def test_it_runs_with_the_models_weights_at_a_small_size() -> None:
    code = Code(GATED)
    weight = torch.randn(256, 64)
    run_once(GATED, code, eager_call(GATED), {1: weight})
    assert code.inputs[0][1] is weight
    assert code.inputs[0][0].shape == (1, 64)


def test_numbers_that_eager_refuses_are_not_tried() -> None:
    """torch 2.11 and 2.12 end the process where their compiled code divides an integer by 0."""
    code = Code(DIVIDES)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_once(DIVIDES, code, eager_call(DIVIDES), {})
    assert not code.inputs


def test_on_a_gpu_zeros_at_usual_sizes_are_tried_and_no_more_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piece = replace(GATED, hints={"s0": 37})
    weights = {1: torch.randn(256, 64), 2: torch.randn(256), 3: torch.randn(64, 256)}
    monkeypatch.setattr(tryout, "_wake", lambda: None)
    for most, expected in ((1 << 24, [37]), (64 * 36, [1]), (10, [])):
        monkeypatch.setattr(tryout, "_MOST_ELEMENTS", most)
        code = Code(piece)
        tryout._run_on_gpu(piece, code, weights)
        assert [inputs[0].shape[0] for inputs in code.inputs] == expected
        assert not any(inputs[0].any() for inputs in code.inputs)
        assert all(inputs[1] is weights[1] for inputs in code.inputs)
