"""Models that the tests of this folder share, each small and sensitive to what it is used for."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

import precast
from precast.compilers.eager import EagerAdaptor
from precast.compilers.interface import CompiledPiece
from precast.errors import CompileError
from precast.events import Event

SCALE = 1.0
FLAGS = {"wide": True}


def helper(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * factor + 1.0


def other_helper(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * factor - 1.0


class Slotted:
    """A configuration without a `__dict__`."""

    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain


@dataclass
class Settings:
    gain: float = 1.0


class Block(nn.Module):
    """A layer whose every setting shows in its output, even where its code runs as text."""

    def __init__(
        self,
        width: int,
        inner: int,
        eps: float = 1e-5,
        act: Callable[..., torch.Tensor] = functional.relu,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, inner)
        self.act = act
        self.down = nn.Linear(inner, width)
        self.drop = nn.Dropout(1.0)  # Training drops everything: no random numbers are needed.
        self.gain = 1.0

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.up(x)) * self.up.out_features**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(self.mix(self.norm(x)))) * self.gain


class Net(nn.Module):
    """Layers, a buffer, and settings in every kind of container."""

    def __init__(self, depth: int = 2, width: int = 8, inner: int = 8, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner, **settings) for _ in range(depth))
        self.register_buffer("shift", torch.zeros(width))
        self.scale = 1.0
        self.gains = [1.0, 1.0]
        self.options = {"gain": 1.0}
        self.ordered = OrderedDict(gain=1.0)
        self.settings = Settings()
        self.slotted = Slotted(1.0)
        self.names = {"a", "b"}
        self.marks = {"a": 1}

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.shift) * self.scale * SCALE
        x = x * self.gains[1] * self.options["gain"] * self.ordered["gain"]
        x = x * self.settings.gain * self.slotted.gain
        if "a" in self.names:
            x = x + 1
        if "a" in self.marks:
            x = x + 1
        if FLAGS["wide"]:
            x = x + 1
        return helper(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.layers[0].up.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.finish(x)


class SubNet(Net):
    """The same structure with one method of its own."""

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return super().finish(x) * 2


class SubBlock(Block):
    """The same layer with one method of its own."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return super().mix(x) - 1


def make_net(**settings: Any) -> Net:
    """Return a net whose weights do not depend on how many there are of it."""
    torch.manual_seed(0)
    return Net(**settings).eval()


class OfItsProcess(nn.Module):
    """Reads what the process sets, as `what` says."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        if self.what == "flag":
            return torch.sin(h) if FLAGS["wide"] else torch.cos(h)
        return torch.ops.of_main.twice(h).relu()


def make_of_its_process(what: str) -> OfItsProcess:
    torch.manual_seed(0)
    return OfItsProcess(what).eval()


class Broken(nn.Module):
    """Breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        torch._dynamo.graph_break()
        return self.linear(h)


class Pair(NamedTuple):
    """What `PairNet` returns."""

    sum: torch.Tensor
    product: torch.Tensor


class PairNet(nn.Module):
    """Returns a named tuple; its inner module is there for hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Pair:
        h = self.inner(x)
        return Pair(sum=h + x, product=h * x)


def make_pair_net() -> PairNet:
    torch.manual_seed(0)
    return PairNet().eval()


class Plain(nn.Module):
    """Two layers and a size-dependent reduction: one piece, for real compilers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.gelu(self.first(x))
        return self.second(self.norm(h + x)).softmax(-1)


def make_plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


def compiled(model: Any, cache_dir: Any, **settings: Any) -> tuple[Any, list[Event]]:
    """Return a model served by Precast, pieces as text unless told otherwise, and its events."""
    events: list[Event] = []
    settings = {
        "compiler": "eager",
        "on_error": "raise",
        "progress": False,
        "revalidate": "never",  # A second look has tests of its own.
        **settings,
    }
    served = precast.compile(model, cache_dir=cache_dir, listeners=[events.append], **settings)
    return served, events


def names(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def eager(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a model as if Precast did not serve it."""
    if not isinstance(model, nn.Module):
        return getattr(model, "__wrapped__", model)(*args, **kwargs)
    with served_by_nobody(model):
        return model(*args, **kwargs)


@contextmanager
def served_by_nobody(model: nn.Module) -> Iterator[None]:
    served = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl]
    for module, _ in served:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in served:
            module._compiled_call_impl = call


def assert_same(found: Any, expected: Any, *, exact: bool = True) -> None:
    """Equal in structure, types, dtypes, shapes, strides and values."""
    assert type(found) is type(expected), (type(found), type(expected))
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        # The stride of a dimension of size 1, or of an empty tensor, means nothing.
        assert _strides(found) == _strides(expected), (found.stride(), expected.stride())
        if exact:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key], exact=exact)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, exact=exact)
    elif hasattr(expected, "__dataclass_fields__"):
        for name in expected.__dataclass_fields__:
            assert_same(getattr(found, name), getattr(expected, name), exact=exact)
    else:
        assert found == expected


def _strides(tensor: torch.Tensor) -> list[int]:
    if tensor.numel() == 0:
        return []
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function over a closure, and a way to change it: `function.change(value)`."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * factor

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    function.change = change  # type: ignore[attr-defined]
    return function


class Filed(EagerAdaptor):
    """Keeps a piece's text in a file, as real compilers keep libraries, and compiles in no time."""

    name = "filed"

    def identity(self) -> dict[str, str]:
        return {"compiler": "filed"}

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        path = Path(directory, "piece.json")
        path.write_text(json.dumps(piece.to_json()))
        return CompiledPiece({"piece.json": str(path)}, {})

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        try:
            data = json.loads(Path(files["piece.json"]).read_text())
        except ValueError as error:
            raise CompileError("?", self.name, "damaged bytes were handed out") from error
        return super().load({"piece": data}, {}, None)


class Raising(Filed):
    """Refuses every piece."""

    name = "raising"

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        raise CompileError("?", self.name, "no such luck")


class Hanging(Filed):
    """Never comes to an end, and does not want to be ended."""

    name = "hanging"

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(directory, "half").write_text("half a file")
        time.sleep(600)
        raise AssertionError


class HangingLater(Filed):
    """Compiles one piece in each process, and never comes to an end with the next."""

    name = "hanging_later"
    num_compiled = 0

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        if type(self).num_compiled:
            time.sleep(600)
        type(self).num_compiled += 1
        return super().compile(piece, directory)


class Narrow(Filed):
    """Compiles for sizes up to eight only, pieces without a norm for sizes up to six."""

    name = "narrow"

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        made = super().compile(piece, directory)
        high = 8 if "norm" in piece.text else 6
        ranges = {symbol: [allowed.low, high] for symbol, allowed in piece.symbols.items()}
        return CompiledPiece(made.files, {"ranges": ranges})


class Refusing(Filed):
    """Refuses every piece as long as a variable of the environment says so."""

    name = "refusing"

    def identity(self) -> dict[str, str]:
        return {"compiler": "refusing"}

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        if "TEST_REFUSE" in os.environ:
            raise CompileError("?", self.name, "not today")
        return super().compile(piece, directory)
