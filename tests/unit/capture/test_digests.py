from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from precast.capture.digests import code_digests


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


@pytest.fixture(autouse=True)
def known_to_sys_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, module))


def patched(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def test_a_function_in_a_methods_place_is_looked_for_in_that_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    What was captured while a method was patched must not serve a process that does not patch.
    """
    monkeypatch.setattr(Inner, "forward", patched)
    model = Model()
    code, _ = code_digests([patched.__code__], Model.forward, model)

    assert f"{__name__}:Inner.forward" in [path for path, _ in code]
