from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from precast.runtime.dispatch import Dispatcher, call_with_hooks


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, *, by: float = 2.0) -> torch.Tensor:
        if by == 0:
            raise ValueError("by zero")
        return x * by


class Planted:
    """A loaded assembly that serves every call and notes it."""

    mutates = False

    def __init__(self, entry: Any, *, fits: bool = True, is_current: bool = True) -> None:
        self.entry = entry
        self.check = lambda *_args, **_kwargs: 0 if fits else 1
        self.is_current = lambda: is_current
        self.bound = self
        self.weights: list[torch.Tensor] = []


def add_hooks(module: nn.Module, seen: list[str]) -> None:
    def pre(_: nn.Module, args: Any) -> Any:
        seen.append("pre")
        return args[0] + 1  # Not a tuple: torch makes it one.

    def pre_with_kwargs(_: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append(f"pre with {sorted(kwargs)}")
        return args, {**kwargs, "by": kwargs.get("by", 1.0) * 3}

    def post(_: nn.Module, args: Any, result: torch.Tensor) -> Any:
        seen.append(f"post of {float(args[0].sum())}")
        return result + 10

    def post_with_kwargs(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen.append(f"post with {kwargs}")

    def always(_: nn.Module, args: Any, result: Any) -> None:
        seen.append(f"always, result {'none' if result is None else 'there'}")

    module.register_forward_pre_hook(pre)
    module.register_forward_pre_hook(pre_with_kwargs, with_kwargs=True)
    module.register_forward_hook(post)
    module.register_forward_hook(post_with_kwargs, with_kwargs=True)
    module.register_forward_hook(always, always_call=True)


@pytest.mark.parametrize("by", [2.0, 0.0])
def test_hooks_run_as_torch_runs_them(by: float) -> None:
    """
    Same hooks in the same order with the same arguments, the same result or the same error.
    """
    outcomes = []
    for is_ours in (False, True):
        module, seen = Scaled(), []
        add_hooks(module, seen)
        x = torch.ones(2)
        try:
            if is_ours:
                result = call_with_hooks(module, module.forward, (x,), {"by": by})
            else:
                result = module(x, by=by)
        except ValueError as error:
            result = str(error)
        outcomes.append((str(result), seen))

    assert outcomes[0] == outcomes[1]


def test_a_hook_that_fails_after_an_error_does_not_hide_it() -> None:
    """As in torch: the first error is raised, that of an `always_call` hook is a warning."""
    module = Scaled()

    def failing(*_: Any) -> None:
        raise RuntimeError("second")

    module.register_forward_hook(failing, always_call=True)

    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="by zero"):
        warnings.simplefilter("always")
        call_with_hooks(module, module.forward, (torch.ones(1),), {"by": 0})
    assert "second" in str(caught[0].message)


def test_a_pre_hook_with_a_wrong_answer_is_refused_as_by_torch() -> None:
    module = Scaled()
    module.register_forward_pre_hook(lambda _m, _a, _k: torch.ones(1), with_kwargs=True)

    with pytest.raises(RuntimeError, match="forward pre-hook must return None or a tuple"):
        call_with_hooks(module, module.forward, (torch.ones(1),), {})


def make(*loaded: Planted, reported: list[Any] | None = None) -> Dispatcher:
    dispatcher = Dispatcher(
        None,
        lambda *_args, **_kwargs: "eager",
        lambda _args, _kwargs: "resolved",
        lambda _assembly, error, _args, _kwargs: (
            None if reported is None else reported.append(error)
        ),
    )
    dispatcher.loaded = loaded
    return dispatcher


def test_the_first_assembly_that_fits_and_is_current_serves() -> None:
    unfit = Planted(lambda _x: "unfit", fits=False)
    stale = Planted(lambda _x: "stale", is_current=False)
    good = Planted(lambda _x: "good")

    assert make(unfit, stale, good)(torch.ones(1)) == "good"
    assert make(unfit, stale)(torch.ones(1)) == "resolved"


def test_arguments_that_a_check_cannot_read_are_no_error() -> None:
    """A check that raises says no: the arguments are anything a user may pass."""
    odd = Planted(lambda _x: "odd")
    odd.check = lambda x: x.no_such_attribute

    assert make(odd)(3) == "resolved"


def test_a_call_that_records_gradients_is_never_compiled() -> None:
    good = Planted(lambda _x: "good")
    good.weights = [torch.ones(1, requires_grad=True)]
    x = torch.ones(1)

    assert make(good)(x) == "resolved"
    with torch.no_grad():
        assert make(good)(x) == "good"


def test_compiled_code_that_raises_is_answered_by_eager_and_reported() -> None:
    reported: list[Any] = []
    broken = Planted(lambda _x: 1 // 0)

    assert make(broken, reported=reported)(torch.ones(1)) == "eager"
    assert isinstance(reported[0], ZeroDivisionError)


def test_a_writing_call_that_raises_is_not_run_twice() -> None:
    """Half of a write may be done: running it again would be wrong."""
    broken = Planted(lambda _x: 1 // 0)
    broken.mutates = True

    with pytest.raises(ZeroDivisionError):
        make(broken)(torch.ones(1))
