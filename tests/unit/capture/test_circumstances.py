"""A failed capture is tried again whenever something that it may depend on has changed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precast.capture.circumstances import attempt_key

HELPER = "def helper(x):\n    return x + {0}\n"
MODEL = """
import planted_helper
from torch import nn

class Planted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.options = {"scale": 1.0}
        self.marker = object()

    def forward(self, x, flag=False):
        return planted_helper.helper(self.layers[0](x))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "planted_model.py").write_text(MODEL)
    (tmp_path / "planted_helper.py").write_text(HELPER.format(1))
    yield tmp_path
    forget()


def forget() -> None:
    for name in ("planted_model", "planted_helper"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def key_of(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    return attempt_key("key", type(model).forward, model, args, kwargs)  # type: ignore[arg-type]


def start() -> nn.Module:
    """As a new process would."""
    forget()
    model: nn.Module = importlib.import_module("planted_model").Planted()
    return model


def test_a_start_like_the_last_one_is_the_same_attempt(folder: Path) -> None:
    """Whatever weights and sizes are."""
    first = key_of(start(), torch.ones(2, 2))
    model = start()
    with torch.no_grad():
        model.layers[0].weight.zero_()  # type: ignore[index,union-attr]
    assert key_of(model, torch.ones(3, 2)) == first


@pytest.mark.parametrize("name", ["planted_model", "planted_helper"])
def test_a_changed_file_makes_another(folder: Path, name: str) -> None:
    """That of the model, or one whose functions it calls."""
    first = key_of(start(), torch.ones(2, 2))
    path = folder / f"{name}.py"
    path.write_text(path.read_text() + "\n# Another line.\n")
    assert key_of(start(), torch.ones(2, 2)) != first


def test_a_changed_setting_or_plain_argument_makes_another(folder: Path) -> None:
    model, x = start(), torch.ones(2, 2)
    first = key_of(model, x)
    assert key_of(model, x, flag=True) != first
    model.options["scale"] = 2.0  # type: ignore[index,operator]
    assert key_of(model, x) != first
    model.options["scale"] = 1.0  # type: ignore[index,operator]
    assert key_of(model, x) == first
    assert key_of(model.eval(), x) != first


def test_what_differs_in_each_process_does_not_count(folder: Path) -> None:
    model, x = start(), torch.ones(2, 2)
    model.options["hash"] = 1 << 50  # type: ignore[index,operator]
    first = key_of(model, x)
    model.options["hash"] = 1 << 51  # type: ignore[index,operator]
    model.marker = object()
    assert key_of(model, x) == first
