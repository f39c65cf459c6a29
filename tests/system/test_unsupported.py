"""An operator that no compiler takes, in the middle of a model: the rest is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import precast
from precast.events import FellBack, PieceFailed
from system.models import assert_same, compiled, eager


class Quantizing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sin(x) + torch.cos(x)
        h = torch.quantize_per_tensor(h, 0.1, 0, torch.qint8).dequantize()
        h = torch.sin(h) + torch.cos(h)
        return torch.quantize_per_tensor(h, 0.1, 0, torch.qint8).dequantize()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_the_rest_of_the_model_is_really_compiled(tmp_path: Path) -> None:
    """What comes before and behind is one piece; eager's answers, and the reason is told."""
    model, events = compiled(Quantizing(), tmp_path, compiler="aot_inductor", keep_slower=True)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(4, 8)
            assert_same(model(x), eager(model, x), exact=False)
    pieces = precast.status(model)["assemblies"][0]["pieces"]
    assert [piece["compiler"] for piece in pieces] == ["aot_inductor"] * 2
    [told] = [event.reason for event in events if isinstance(event, FellBack)]
    assert told.code == "op-unsupported"
    assert "dequantize, quantize_per_tensor" in told.message
    assert not [event for event in events if isinstance(event, PieceFailed)]
