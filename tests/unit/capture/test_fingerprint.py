from __future__ import annotations

import pytest
import torch
from torch import nn

from precast.capture.fingerprint import call_signature, model_fingerprint


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


def test_sizes_and_values_stay_out_of_a_call() -> None:
    """One assembly covers many sizes; the contract decides which, and which values."""
    assert call_signature((torch.ones(2, 3), 1), {}) == call_signature((torch.ones(5, 7), 2), {})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(2),), {}),
        ((torch.ones(2, 2).half(),), {}),
        ((torch.ones(2, 2, device="meta"),), {}),
        (([torch.ones(2, 2)],), {}),
        (((torch.ones(2, 2),),), {}),
        (({"x": torch.ones(2, 2)},), {}),
        ((torch.ones(2, 2), None), {}),
        ((), {"x": torch.ones(2, 2)}),
    ],
)
def test_another_structure_is_another_call(args: tuple, kwargs: dict) -> None:  # type: ignore[type-arg]
    assert call_signature(args, kwargs) != call_signature((torch.ones(2, 2),), {})


def test_the_order_of_keywords_is_no_matter() -> None:
    assert call_signature((), {"a": 1, "b": 2.0}) == call_signature((), {"b": 2.0, "a": 1})
