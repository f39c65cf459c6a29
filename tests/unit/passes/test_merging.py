"""Merged linear layers, run eager: what a model's owner may do to its parameters still works."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast.compilers.eager import eager_call
from precast.compilers.interface import CompiledPiece
from precast.graph.piece import Piece


class Here:
    """A compiler that runs the piece as it is, in this process."""

    name = "here"
    is_saveable = False
    unpickles = False

    def identity(self) -> Mapping[str, str]:
        return {"compiler": "here"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        return CompiledPiece({}, {})

    def load(self, details: Any, files: Any, piece: Piece | None) -> Any:
        assert piece is not None
        return eager_call(piece)


class Gated(nn.Module):
    """Two layers: three projections of one tensor, two of another."""

    def __init__(self, *, bias: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(bias) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8, bias=bias)
        self.k = nn.Linear(8, 4, bias=bias)
        self.v = nn.Linear(8, 4, bias=bias)
        self.gate = nn.Linear(8, 16, bias=bias)
        self.up = nn.Linear(8, 16, bias=bias)
        self.down = nn.Linear(16, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q(x) * torch.cat((self.k(x), self.v(x)), -1))
        return x + torch.tanh(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {
    "passes": ("merge_linears",),
    "compiler": Here(),
    "disable_compile_cache": True,
    "on_error": "raise",
    "progress": False,
}


def merged(model: nn.Module, **settings: Any) -> nn.Module:
    """Compile a model for `X` and make sure that it is merged, and right."""
    precast.compile(model, **{**SETTINGS, **settings})
    assert_right(model)
    return model


def assert_right(model: Any, x: torch.Tensor = X) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model.forward(x))


def matches(model: nn.Module) -> Any:
    return precast.status(model)["assemblies"][-1]["passes"][0]["matches"]


def is_packed(model: Any) -> bool:
    layer = model.layers[0]
    return bool(
        layer.q.weight.untyped_storage().data_ptr() == layer.v.weight.untyped_storage().data_ptr()
    )


def memory_of(model: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("bias", [False, True])
def test_layers_are_merged_and_nothing_else_changes(bias: bool) -> None:
    """
    The parameters are the same objects with the same values in the same amount of memory.
    """
    model = Gated(bias=bias)
    objects, values, memory = list(model.parameters()), model.state_dict(), memory_of(model)
    values = {name: value.clone() for name, value in values.items()}
    merged(model)

    assert matches(model) == {"layers": 10, "products": 4}
    assert is_packed(model)
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), objects, strict=True))
    assert memory_of(model) == memory
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
        assert value.is_contiguous()


def test_new_weights_are_used_however_they_come() -> None:
    """
    In place, by `load_state_dict` of both kinds, as other data, and as another parameter.
    """
    model = merged(Gated(bias=True))
    other = Gated(bias=True).state_dict()
    layer: Any = model.layers[0]  # type: ignore[index]

    with torch.no_grad():
        layer.k.weight.mul_(2)
    assert_right(model)
    model.load_state_dict(other)
    assert_right(model)
    assert is_packed(model)
    model.load_state_dict({name: value + 1 for name, value in other.items()}, assign=True)
    assert_right(model)
    assert is_packed(model)
    memory = memory_of(model)
    layer.q.weight.data = torch.randn(8, 8)
    assert_right(model)
    assert is_packed(model)
    assert memory_of(model) == memory
    layer.up.weight = nn.Parameter(torch.randn(16, 8))
    assert_right(model)
    assert is_packed(model)
    assert len(precast.status(model)["assemblies"]) == 1
    model.double()
    assert_right(model, X.double())


def test_a_parameter_whose_memory_others_see_stays_where_it_is() -> None:
    """
    Tied by storage, a view of a larger tensor, or watched by a gradient hook: the rest is merged.
    """
    for tie in (
        lambda w: nn.Parameter(w.data),  # Another parameter over the same memory.
        lambda w: w.register_post_accumulate_grad_hook(lambda _: None),
        lambda w: w.detach().view(-1),
    ):
        model = Gated()
        layer: Any = model.layers[0]
        layer.q.weight.requires_grad_(True)
        kept = tie(layer.q.weight)
        merged(model)
        assert matches(model) == {"layers": 9, "products": 4}
        if isinstance(kept, torch.Tensor):
            with torch.no_grad():
                kept.mul_(3)
        assert_right(model)

    whole = torch.randn(100, 8)
    model = Gated()
    model.layers[0].q.weight.data = whole[10:18]  # type: ignore[union-attr, index]
    merged(model)
    whole.mul_(2)
    assert_right(model)


def test_tied_and_parametrized_layers_are_left_out() -> None:
    model = Gated()
    layer: Any = model.layers[0]
    layer.v.weight = layer.k.weight  # One object at two places.
    layer.gate = nn.utils.parametrizations.weight_norm(layer.gate)
    model.eval().requires_grad_(False)
    merged(model)
    with torch.no_grad():
        layer.k.weight.mul_(2)
        layer.gate.parametrizations.weight.original0.mul_(2)
    assert_right(model)


def test_a_weight_made_under_inference_mode_is_left_out() -> None:
    with torch.inference_mode():
        model = Gated()
    merged(model)
    assert precast.status(model)["assemblies"][0]["passes"][0]["matches"] == {}


def test_two_kinds_of_calls_share_what_is_packed() -> None:
    model = merged(Gated())
    before = [p.data_ptr() for p in model.parameters()]
    assert_right(model, torch.randn(2, 3, 8))
    assert_right(model)
    assert len(precast.status(model)["assemblies"]) == 2
    assert [p.data_ptr() for p in model.parameters()] == before


def test_weights_that_come_to_share_memory_are_captured_anew() -> None:
    """
    After the capture somebody lets another tensor see a weight: that one is merged no more.
    """
    model = merged(Gated())
    layer: Any = model.layers[0]
    layer.q.weight.data = torch.randn(8, 8)
    watcher = layer.q.weight.detach()
    assert_right(model)
    watcher.mul_(2)
    assert_right(model)
    assert matches(model) == {"layers": 9, "products": 4} or not is_packed(model)


def test_after_release_the_model_is_as_before() -> None:
    model = merged(Gated().requires_grad_(True))
    precast.release(model)
    model(X).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
    with torch.no_grad():
        before = [p.clone() for p in model.parameters()]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert is_packed(model)


def test_copies_and_files_hold_as_much_as_before() -> None:
    def size_of(value: Any) -> int:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return len(buffer.getvalue())

    model = Gated(depth=8)
    before = size_of(model.state_dict())
    merged(model)
    assert size_of(model.state_dict()) <= before

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert all(p.abs().sum() > 0 for p in model.parameters())
        precast.release(twin)
    assert_right(model)


def test_layers_of_different_blocks_are_not_merged() -> None:
    """
    Every block of a decoder reads the encoder's output: merged, they would be no equal blocks.
    """

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((layer(x).relu() for layer in self.layers), x)  # type: ignore[no-any-return]

    model = merged(Cross())
    assert precast.status(model)["assemblies"][0]["passes"][0]["matches"] == {}


def test_a_write_between_layers_keeps_them_apart() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            first = self.a(y)
            y.add_(1)
            return first + self.b(y)

    merged(Writing())


def test_merging_under_autocast() -> None:
    model = Gated(bias=True)
    precast.compile(model, **SETTINGS)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(X), model.forward(X)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
