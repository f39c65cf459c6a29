from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from precast.compilers.eager import EagerAdaptor
from precast.compilers.verify import EagerRefusedError, VerifyMismatchError, verify_from_text
from precast.graph.inputs import edge_sizes
from precast.graph.piece import Piece
from unit.compilers.example_pieces import GATED, MUTATING, TINY, spec


@pytest.mark.parametrize("piece", [GATED, MUTATING], ids=["gated", "mutating"])
def test_eager_agrees_with_itself(piece: Piece) -> None:
    adaptor = EagerAdaptor()
    run = adaptor.load(adaptor.compile(piece, "").details, {}, None)
    result = verify_from_text(piece, run, edge_sizes(piece), "eager")

    assert result.max_abs_error == 0
    assert len(result.sizes) == len(edge_sizes(piece))


WRONG = {
    "value": lambda x: [x + 1.0 + 1e-3],
    "one element": lambda x: [(x + 1.0).index_fill(0, torch.tensor([0]), 9.0)],
    "dtype": lambda x: [(x + 1.0).double()],
    "shape": lambda x: [(x + 1.0)[None]],
    "strides": lambda x: [(x + 1.0).t().contiguous().t()],
    "nan": lambda x: [(x + 1.0) * float("nan")],
    "number of outputs": lambda x: [x + 1.0, x],
    "mutation": lambda x: [x.add_(1.0).clone()],
    "aliasing": lambda x: [x.add_(1.0)],
}


@pytest.mark.parametrize("kind", WRONG)
def test_every_kind_of_difference_is_found(kind: str) -> None:
    with pytest.raises(VerifyMismatchError, match="s0=3"):
        verify_from_text(TINY, lambda inputs: WRONG[kind](*inputs), [{"s0": 3}], "planted")


def test_a_lost_mutation_is_found() -> None:
    text = """def piece(a0):
    v0 = a0.add_(1.0)
    v1 = a0.sum(-1)
    return (v1,)
"""
    piece = replace(TINY, text=text, outputs=(spec("s0"),), mutated=(0,))
    with pytest.raises(VerifyMismatchError, match="input 0"):
        verify_from_text(piece, lambda inputs: [(inputs[0] + 1.0).sum(-1)], [{"s0": 3}], "planted")


def test_nan_equals_nan() -> None:
    text = "def piece(a0):\n    v0 = torch.sqrt(a0)\n    return (v0,)\n"
    piece = replace(TINY, text=text)
    verify_from_text(piece, lambda inputs: [inputs[0].sqrt()], [{"s0": 9}], "planted")


def test_rounding_less_than_eager_is_no_error() -> None:
    """Fused code keeps float32 where eager rounds to bfloat16 at each step."""
    text = """def piece(a0):
    v0 = torch.exp(a0)
    v1 = torch.sub(v0, 1.0)
    v2 = torch.mul(v1, v1)
    v3 = torch.sub(v2, v1)
    return (v3,)
"""
    piece = replace(TINY, text=text, inputs=(spec("s0", 4, dtype="bfloat16"),))

    def fused(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        grown = inputs[0].float().exp() - 1.0
        return [(grown * grown - grown).bfloat16()]

    verify_from_text(piece, fused, [{"s0": 64}], "planted")


def test_sizes_that_eager_refuses_say_nothing() -> None:
    """
    Two inputs may have to be of one length although only the model's code says so.
    """
    text = "def piece(a0):\n    v0 = a0.narrow(0, 0, 5)\n    return (v0,)\n"
    piece = replace(TINY, text=text)

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [inputs[0].narrow(0, 0, 5)]

    assert verify_from_text(piece, run, [{"s0": 3}, {"s0": 9}], "planted").sizes == ({"s0": 9},)
    with pytest.raises(EagerRefusedError, match="s0=3"):
        verify_from_text(piece, run, [{"s0": 3}], "planted")
