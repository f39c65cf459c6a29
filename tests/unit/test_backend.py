from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from precast.api import torch_backend
from precast.compilers.eager import EagerAdaptor

OPTIONS = {"compiler": "eager", "progress": False}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)


def test_torch_compile_finds_precast_by_name(tmp_path: Path) -> None:
    """The entry point is declared, and sizes may vary."""
    model = make()
    options = {**OPTIONS, "cache_dir": str(tmp_path)}
    compiled = torch.compile(model, backend="precast", options=options, dynamic=True)

    for rows in (3, 5, 1):
        x = torch.randn(rows, 4)
        assert torch.equal(compiled(x), model(x))


def test_what_a_graph_became_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Once for each graph, compiled or not: progress ends then."""
    options = {"cache_dir": str(tmp_path), "compiler": "eager", "progress": True}
    torch.compile(make(), backend="precast", options=options)(torch.randn(3, 4))

    assert "compiled 0 of 1 pieces" in capfd.readouterr().err


def test_an_option_that_is_no_setting_is_refused() -> None:
    compiled = torch.compile(make(), backend="precast", options={"compilr": "eager"})

    with pytest.raises(Exception, match="compiler"):
        compiled(torch.randn(3, 4))


def test_a_disabled_precast_gives_the_graph_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_DISABLE", "1")
    graph_module = torch.fx.symbolic_trace(make())

    assert torch_backend(graph_module, ()) == graph_module.forward


def test_gradients_are_recorded_as_eager_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs and of weights; compiled code records none, as the planted one."""
    load = EagerAdaptor.load
    monkeypatch.setattr(
        EagerAdaptor, "load", lambda *args, **kwargs: torch.no_grad()(load(*args, **kwargs))
    )
    model = make()
    options = {**OPTIONS, "cache_dir": str(tmp_path)}
    compiled = torch.compile(model, backend="precast", options=options)
    x = torch.randn(3, 4)

    assert not compiled(x).requires_grad
    assert compiled(x.clone().requires_grad_()).requires_grad
    model.requires_grad_(True)
    assert compiled(x).requires_grad
    with torch.no_grad():
        assert not compiled(x).requires_grad
