from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast.background.skeleton import CannotSendError, dump, hollow, load
from system.models import helper, make_net


def test_a_model_comes_back_without_its_data() -> None:
    """Structure, settings, tied weights, layouts and dtypes are there; memory is not."""
    model = make_net()
    model.layers[1].up.weight = model.layers[0].up.weight
    model.register_buffer("turned", torch.zeros(3, 5, dtype=torch.float64).t())
    data = dump((model, [1.5, "a"]))
    again, settings = load(data)
    assert len(data) < 20_000
    assert settings == [1.5, "a"]
    assert again.layers[1].up.weight is again.layers[0].up.weight
    assert [name for name, _ in again.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    for ours, theirs in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )
        assert ours.untyped_storage().nbytes() == 0
    assert type(again.layers[0].up.weight) is nn.Parameter
    assert again.layers[0].up.weight.requires_grad


def test_a_hollow_tensor_is_no_inference_tensor() -> None:
    """It can be marked dynamic in any mode, and a network can be as large as it likes."""
    with torch.inference_mode():
        tensor = hollow(torch.ones(2, 3))
    assert not tensor.is_inference()
    large = torch.empty(1, dtype=torch.int8).expand(1 << 40)
    assert hollow(large).untyped_storage().nbytes() == 0


def test_a_served_function_is_sent_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    served: Any = precast.compile(helper, compiler="eager", progress=False)
    monkeypatch.setattr("system.models.helper", served)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(helper)
    assert load(dump(helper)) is helper


class Quantized(torch.Tensor):
    pass


class InMain:
    pass


InMain.__module__ = "__main__"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (threading.Lock(), "cannot be sent"),
        (torch.ones(3).as_subclass(Quantized), "Quantized"),
        (torch.eye(3).to_sparse(), "sparse"),
        (lambda x: x, "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_says_why(value: Any, problem: str) -> None:
    with pytest.raises(CannotSendError, match=problem):
        dump([value])


def test_a_class_of_the_main_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child may run that script to find it."""
    monkeypatch.setattr("__main__.InMain", InMain, raising=False)
    with pytest.raises(CannotSendError, match="main script"):
        dump(InMain())
