from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import torch

from precast.graph.inputs import (
    random_inputs,
)
from precast.graph.piece import Piece
from precast.graph.read import PieceTextError, eager_function, read_piece
from unit.compilers.example_pieces import GATED, MUTATING, TINY, spec


@pytest.mark.parametrize("piece", [GATED, MUTATING], ids=["gated", "mutating"])
def test_the_graph_and_the_function_compute_the_same(piece: Piece) -> None:
    ours, theirs = (random_inputs(piece, {"s0": 5}, 0) for _ in range(2))
    outputs = read_piece(piece)(*ours)

    assert isinstance(outputs, tuple)
    for mine, other in zip(outputs, eager_function(piece)(*theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_arguments_keep_their_kinds() -> None:
    text = """def piece(a0):
    s0 = a0.size(0)
    v0 = torch.full((s0, 2), float("-inf"), dtype=torch.float16, device=torch.device('cpu'))
    v1 = operator.getitem(a0, (..., slice(None, -1, None), None))
    v2 = torch.sub(a0, 1.5, **{'alpha': -2})
    v3 = torch.ops.aten.add.Tensor(a0, 1)
    return (v0, v1, v2, v3)
"""
    nodes = {node.name: node for node in read_piece(replace(TINY, text=text)).graph.nodes}

    assert nodes["v0"].args[1] == float("-inf")
    assert nodes["v0"].kwargs == {"dtype": torch.float16, "device": torch.device("cpu")}
    assert nodes["v1"].args[1] == (..., slice(None, -1, None), None)
    assert nodes["v2"].kwargs == {"alpha": -2}
    assert nodes["v3"].target is torch.ops.aten.add.Tensor
    assert nodes["s0"].op == "call_method"


@pytest.mark.parametrize(
    "statement",
    [
        "import os",
        "v0 = [x for x in a0]",
        "v0 = torch.no_such_function(a0)",
        "v0 = torch.add(a0, open('x'))",
        "v0, v1 = torch.max(a0, 0)",
        "v0 = torch._inductor.compile(a0)",
        "v0 = torch.add(a0, unknown)",
    ],
)
def test_what_is_not_in_the_language_is_refused_with_its_line(statement: str) -> None:
    text = f"def piece(a0):\n    {statement}\n    return (a0,)\n"
    with pytest.raises(PieceTextError, match="line 2"):
        read_piece(replace(TINY, text=text))


def test_tracebacks_show_the_text() -> None:
    text = "def piece(a0):\n    v0 = a0.view(7, 7)\n    return (v0,)\n"
    with pytest.raises(RuntimeError) as caught:
        eager_function(replace(TINY, text=text))(torch.ones(2, 4))

    assert "v0 = a0.view(7, 7)" in "".join(traceback.format_exception(caught.value))


def test_autocast_is_active_in_the_function() -> None:
    text = "def piece(a0):\n    v0 = torch.matmul(a0, a0)\n    return (v0,)\n"
    piece = replace(TINY, text=text, inputs=(spec(4, 4),), autocast=("cpu", "bfloat16"))

    assert eager_function(piece)(torch.ones(4, 4))[0].dtype == torch.bfloat16
