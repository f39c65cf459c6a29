from __future__ import annotations

import operator
from typing import Any

import torch

from precast.config import CompilationConfig
from precast.drawing import cut_and_write, pack_nothing
from precast.events import Event, FellBack
from precast.passes.chosen import NO_PASSES
from unit.split.test_plan import trace


def nameless(x: torch.Tensor) -> torch.Tensor:
    return x * 2


nameless.__module__ = "torch"  # No name leads to it, though it is torch's.


def test_an_operator_without_text_leaves_its_piece_alone() -> None:
    """It runs natively, and what is before and behind it is compiled."""

    def draw(g: Any, s: Any, x: Any) -> Any:
        y = g.call_function(torch.sin, (g.call_function(torch.exp, (x,)),))
        y = g.call_function(nameless, (y,))
        return g.call_function(operator.add, (g.call_function(torch.cos, (y,)), 1))

    module = trace(draw)
    events: list[Event] = []
    stitched, written, _, _ = cut_and_write(
        module,
        ranges={},
        sources={},
        arguments=["s0", "x"],
        weights=[],
        config=CompilationConfig(compilation_level="full"),
        emit=events.append,
        name="model",
        passes=NO_PASSES,
        may_pack=pack_nothing,
    )
    texts = [written[call.index].piece.text for call in stitched.pieces]
    assert ["torch.sin" in text for text in texts] == [True, False]
    assert ["torch.cos" in text for text in texts] == [False, True]
    [event] = [event for event in events if isinstance(event, FellBack)]
    assert event.reason.code == "op-unsupported"
    assert "nameless" in event.reason.message
