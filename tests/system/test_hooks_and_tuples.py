"""Models with hooks inside and with named tuples start warm, and every change to either is seen."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from system import models
from system.models import PairNet, assert_same, compiled, eager, make_pair_net, names

INPUTS = torch.linspace(-2, 2, 24).reshape(3, 8)


def double(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def triple(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 3


def less_one(module: Any, args: Any) -> Any:
    return (args[0] - 1,)


class Scaling:
    """A hook with a state."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor

    def as_method(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor


def scale(factor: float, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * factor


def scaling_by(factor: float) -> Callable[..., Any]:
    return lambda _, __, output: output * factor


def start(cache: Path, *hooks: Callable[..., Any]) -> tuple[PairNet, list[str]]:
    """Start a model with hooks on its inner module; its output must be eager's."""
    model = make_pair_net()
    for hook in hooks:
        if hook is less_one:
            model.inner.register_forward_pre_hook(hook)
        else:
            model.inner.register_forward_hook(hook)
    served, events = compiled(model, cache)
    check(served)
    return served, names(events)


def check(model: PairNet) -> None:
    with torch.no_grad():
        assert_same(model(INPUTS), eager(model, INPUTS))


def test_a_model_that_returns_a_named_tuple_starts_warm(tmp_path: Path) -> None:
    start(tmp_path)
    model, events = start(tmp_path)

    assert "AssemblyLoaded" in events
    with torch.no_grad():
        assert type(model(INPUTS)) is models.Pair


def test_a_named_tuple_with_its_fields_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = start(tmp_path)
    other = namedtuple("Pair", ["product", "sum"], module="system.models")
    monkeypatch.setattr(models, "Pair", other)
    _, events = start(tmp_path)

    assert "AssemblyLoaded" not in events
    check(model)


@pytest.mark.parametrize("hook", [double, less_one])
def test_a_model_with_a_hook_inside_starts_warm(tmp_path: Path, hook: Any) -> None:
    start(tmp_path, hook)
    _, events = start(tmp_path, hook)

    assert "AssemblyLoaded" in events


CHANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "another": ([double], [triple]),
    "none": ([double], []),
    "one more": ([double], [double, triple]),
    "another order": ([double, Scaling(3.0), triple], [triple, Scaling(3.0), double]),
    "before, not after": ([double], [less_one]),
    "another state": ([Scaling(2.0)], [Scaling(3.0)]),
    "another method's state": ([Scaling(2.0).as_method], [Scaling(3.0).as_method]),
    "another argument": ([functools.partial(scale, 2.0)], [functools.partial(scale, 3.0)]),
    "another function made by one": (
        [scaling_by(2.0)],
        [scaling_by(3.0)],
    ),
}


@pytest.mark.parametrize(("first", "second"), CHANGES.values(), ids=CHANGES)
def test_a_start_with_other_hooks(tmp_path: Path, first: list[Any], second: list[Any]) -> None:
    start(tmp_path, *first)
    start(tmp_path, *second)


@pytest.mark.parametrize(("first", "second"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("is_warm", [False, True])
def test_other_hooks_in_a_running_model(
    tmp_path: Path, first: list[Any], second: list[Any], is_warm: bool
) -> None:
    model, _ = start(tmp_path, *first)
    if is_warm:
        model, _ = start(tmp_path, *first)
    model.inner._forward_hooks.clear()
    for hook in second:
        if hook is less_one:
            model.inner.register_forward_pre_hook(hook)
        else:
            model.inner.register_forward_hook(hook)
    check(model)
    for hook in second:
        if isinstance(hook, Scaling):
            hook.factor += 1
    check(model)


def test_another_hook_in_the_very_place(tmp_path: Path) -> None:
    model, _ = start(tmp_path, double)
    (key,) = model.inner._forward_hooks
    model.inner._forward_hooks[key] = triple
    check(model)
