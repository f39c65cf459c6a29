from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precast.binding import Binding, bind, state_guard
from precast.contract import Contract, ambient_state, digest_code, tensor_spec
from precast.errors import Reason

SCALE = 2.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.act = nn.ReLU()

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * SCALE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.scaled(x) @ self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + self.eps


def make_contract(model: Model) -> Contract:
    """What tracing `Model` reads: eps, the block's type and weight, a global, two methods."""
    nodes = [
        [-1, "root", "self"],
        [0, "a", "eps"],
        [0, "a", "_modules"],
        [2, "i", "block"],
        [3, "a", "_parameters"],
        [4, "i", "weight"],
    ]
    checks = [
        [1, "value", ["float", (1e-5).hex()]],
        [3, "type", f"{__name__}:Block"],
        [3, "absent", ["forward", "scaled"]],
        [4, "keys", ["weight"]],
    ]
    return Contract(
        nodes=nodes,
        checks=checks,
        weights=[5],
        specs=[tensor_spec(model.block.weight)],
        code=[
            ["@", digest_code(Model.forward.__code__)],
            [f"{__name__}:Block.forward", digest_code(Block.forward.__code__)],
            [f"{__name__}:Block.scaled", digest_code(Block.scaled.__code__)],
        ],
        files=[],
        imports={},
        state=ambient_state(),
        hooks=[],
    )


def bound(model: Model, contract: Contract | None = None) -> Binding:
    found = bind(contract or make_contract(model), Model.forward, model)
    assert isinstance(found, Binding), found
    return found


@pytest.fixture(autouse=True)
def known_to_sys_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under pytest's importlib mode a contract still finds this module by its name."""
    import sys

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, module))


def test_a_model_as_it_was_is_bound_to_its_weights() -> None:
    model = Model()
    binding = bound(model)

    assert binding.weights[0] is model.block.weight
    assert binding.is_current()


def test_a_contract_survives_json() -> None:
    import json

    model = Model()
    contract = make_contract(model)

    again = Contract.from_json(json.loads(json.dumps(contract.to_json())))
    assert again.to_json() == contract.to_json()
    bound(model, again)
    with pytest.raises(KeyError):
        Contract.from_json({**contract.to_json(), "version": 0})


def replace_parameter(model: Model) -> None:
    model.block.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def assign(model: Model) -> None:
    model.load_state_dict({"block.weight": torch.zeros(2, 2)}, assign=True)


def convert(model: Model) -> None:
    model.half()


def replace_data(model: Model) -> None:
    model.block.weight.data = torch.zeros(2, 2)


def change_constant(model: Model) -> None:
    model.eps = 1e-6


def replace_block(model: Model) -> None:
    model.block = Block()


def add_parameter(model: Model) -> None:
    model.block.bias = nn.Parameter(torch.zeros(2))


def patch_block(model: Model) -> None:
    model.block.scaled = lambda x: x  # type: ignore[method-assign]


def patch_forward(model: Model) -> None:
    model.forward = lambda x: x  # type: ignore[method-assign]


def hook_block(model: Model) -> None:
    model.block.register_forward_hook(lambda *_: None)


def hook_inner(model: Model) -> None:
    model.block.act.register_forward_pre_hook(lambda *_: None)


CHANGES = [
    replace_parameter,
    assign,
    convert,
    replace_data,
    change_constant,
    replace_block,
    add_parameter,
    patch_block,
    patch_forward,
    hook_block,
    hook_inner,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_is_noticed_at_the_next_call(change: Callable[..., None]) -> None:
    model = Model()
    binding = bound(model)
    change(model)

    assert not binding.is_current()


@pytest.mark.parametrize("change", [replace_parameter, assign, replace_data, replace_block])
def test_a_model_that_still_fits_is_bound_anew(change: Callable[..., None]) -> None:
    """New weights of the same kind need no new capture."""
    model = Model()
    contract = make_contract(model)
    change(model)

    assert bound(model, contract).weights[0] is model.block.weight


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (convert, "torch.float16"),
        (change_constant, "self.eps is 1e-06"),
        (add_parameter, "bias"),
        (patch_block, "an attribute 'scaled' of its own"),
        (hook_block, "the hooks of block have changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_does_not_fit_is_refused_in_words(
    change: Callable[..., None], said: str
) -> None:
    model = Model()
    contract = make_contract(model)
    change(model)
    found = bind(contract, Model.forward, model)

    assert isinstance(found, Reason)
    assert found.code == "outside-contract"
    assert said in found.message


def test_in_place_updates_need_nothing() -> None:
    model = Model()
    binding = bound(model)
    model.block.weight.add_(1)
    model.load_state_dict({"block.weight": torch.zeros(2, 2)})

    assert binding.is_current()


def other(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.mark.parametrize("name", ["forward", "scaled"])
def test_a_patched_method_is_noticed_and_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = Model()
    contract = make_contract(model)
    binding = bound(model, contract)
    monkeypatch.setattr(Block, name, other)

    assert not binding.is_current()
    found = bind(contract, Model.forward, model)
    assert isinstance(found, Reason)
    assert f"Block.{name} was edited" in found.message


def test_a_patched_forward_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own classes count as settled by its version: only while they are its own."""
    model = Model()
    contract = make_contract(model)
    binding = bound(model, contract)
    monkeypatch.setattr(nn.ReLU, "forward", other)

    assert not binding.is_current()
    found = bind(contract, Model.forward, model)
    assert isinstance(found, Reason)
    assert "ReLU.forward was replaced" in found.message


def test_state_that_changes_results_is_noticed() -> None:
    """Autocast, modes and precision; and all is well again when it is as it was."""
    check = state_guard()
    before = torch.get_float32_matmul_precision()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not check()
    with torch.device("meta"):
        assert not check()
    torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
    try:
        assert not check()
    finally:
        torch.set_float32_matmul_precision(before)
    assert check()


def test_whether_gradients_are_recorded_is_no_matter() -> None:
    """Threads and calls in either mode share one binding; who serves the call decides."""
    check = state_guard()

    with torch.no_grad():
        assert check()
    with torch.inference_mode():
        assert check()


def test_another_state_is_refused_by_name() -> None:
    model = Model()
    contract = make_contract(model)
    state = {**ambient_state(), "default_dtype": "torch.float16"}
    found = bind(contract, Model.forward, model, state=state)

    assert isinstance(found, Reason)
    assert "default_dtype is 'torch.float16'" in found.message


def test_a_weight_that_became_a_negative_view_is_noticed() -> None:
    """Its memory, shape and strides are what they were: compiled code would lose the sign."""
    model = Model()
    contract = make_contract(model)
    model.block.weight.data = torch._neg_view(model.block.weight.data)

    assert isinstance(bind(contract, Model.forward, model), Reason)


def test_forward_mode_differentiation_is_another_state() -> None:
    check = state_guard()

    assert check()
    with torch.autograd.forward_ad.dual_level():
        assert not check()
    assert check()
