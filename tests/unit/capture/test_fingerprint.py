from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precast.capture.fingerprint import (
    call_signature,
    example_shapes,
    like_example,
    model_fingerprint,
)


class Other(nn.Linear):
    pass


def fingerprint(model: nn.Module) -> str:
    return model_fingerprint(type(model).forward, model)


def test_equal_structures_are_one_model_whatever_the_weights() -> None:
    assert fingerprint(nn.Linear(3, 4)) == fingerprint(nn.Linear(3, 4))


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)),
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False)),
        nn.Sequential(nn.Linear(3, 4), Other(4, 4)),
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).half(),
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).to("meta"),
    ],
    ids=["depth", "width", "bias", "subclass", "dtype", "device"],
)
def test_another_structure_is_another_model(other: nn.Module) -> None:
    assert fingerprint(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))) != fingerprint(other)


def test_tied_modules_are_no_twins() -> None:
    shared = nn.Linear(4, 4)

    tied = fingerprint(nn.Sequential(shared, shared))
    assert tied != fingerprint(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def serve(x: Any, y: Any = None, *more: Any, scale: float = 1.0, **named: Any) -> None:
    """Is called in many ways."""


def signature(*args: Any, **kwargs: Any) -> str:
    return call_signature(serve, 0, args, kwargs)


X = torch.ones(2, 2)


def test_sizes_and_values_stay_out_of_a_call() -> None:
    """One assembly covers many sizes; the contract decides which, and which values."""
    assert signature(torch.ones(2, 3), 1) == signature(torch.ones(5, 7), 2)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(2),), {}),
        ((X.half(),), {}),
        ((torch.ones(2, 2, device="meta"),), {}),
        (([X],), {}),
        (((X,),), {}),
        (({"x": X},), {}),
        ((X, X), {}),
        ((X, None, None), {}),
        ((), {"y": X}),
        ((X,), {"scale": 2.0}),
        ((X,), {"other": None}),
    ],
)
def test_another_structure_is_another_call(args: tuple, kwargs: dict) -> None:  # type: ignore[type-arg]
    assert signature(*args, **kwargs) != signature(X)


def test_one_call_may_be_written_in_several_ways() -> None:
    """By position or by keyword, in any order, with what is the default anyway or without."""
    assert signature(X) == signature(x=X) == signature(X, None) == signature(X, scale=1.0)
    assert signature(X, 2) == signature(y=2, x=X)
    assert signature(a=1, b=2.0) == signature(b=2.0, a=1)
    owned = call_signature(lambda self, x: x, 1, (X,), {})
    assert owned == call_signature(lambda self, x: x, 1, (), {"x": X})


def test_a_call_that_no_function_takes_has_a_signature_all_the_same() -> None:
    assert call_signature(serve, 0, (X,), {"x": X}) != signature(X)
    assert call_signature(len, 0, (X,), {"x": X})


def test_an_example_follows_from_a_call_written_in_another_way() -> None:
    """Each tensor gets the shape that its parameter had."""
    shapes = example_shapes(serve, 0, (torch.ones(2, 3), torch.ones(4)), {"a": [torch.ones(5)]})
    assert shapes == [[2, 3], [4], [5]]
    kwargs = {"a": [torch.ones(1)], "y": torch.ones(1), "x": torch.ones(1, 1)}
    alike = like_example(serve, 0, (), kwargs, shapes)
    assert alike is not None
    assert alike[0] == ()
    found = {name: value[0] if name == "a" else value for name, value in alike[1].items()}
    assert {name: list(value.shape) for name, value in found.items()} == {
        "a": [5],
        "y": [4],
        "x": [2, 3],
    }
    assert like_example(serve, 0, (X,), {}, shapes) is None
