"""What comes out is what eager gives: values, strides, aliases, and all that is written.

Pieces run as text; capture, contract, stitching and the code around the graph are the real ones.
Each case is called three times: compiled anew, again, and started warm from the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from system.models import assert_same, compiled, eager, make_net, make_plain, names

SIZES = (1, 2, 3, 17, 64, 0)  # 64 is the bound that `test_sizes_within_a_bound` sets.


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []


def aliases(outputs: Any, inputs: Any) -> list[tuple[int, int, bool]]:
    """Return which tensors share memory, and which are one object."""
    tensors = tensors_in((outputs, inputs))
    return [
        (i, j, tensors[i] is tensors[j])
        for i in range(len(tensors))
        for j in range(i)
        if tensors[i].untyped_storage().data_ptr() == tensors[j].untyped_storage().data_ptr()
        and tensors[i].numel()
    ]


def check_case(make: Callable[[], Any], inputs: Callable[[], tuple[Any, ...]], path: Path) -> None:
    """Compare outputs, inputs, buffers and aliases with eager's, three times over."""
    expected_model = make()
    served, _ = compiled(make(), path)
    with torch.no_grad():
        for number in range(3):
            if number == 2:
                served, events = compiled(make(), path)
                expected_model = make()
            ours, theirs = inputs(), inputs()
            found = served(*ours)
            expected = expected_model(*theirs)
            assert_same(found, expected)
            assert_same(ours, theirs)
            assert aliases(found, ours) == aliases(expected, theirs)
            for one, other in zip(tensors_in(found), tensors_in(expected), strict=True):
                if one.is_floating_point() and 0 not in one.stride():
                    one.add_(1)
                    other.add_(1)
            assert_same(ours, theirs)
            assert_same(found, expected)
            if isinstance(served, nn.Module):
                assert_same(dict(served.state_dict()), dict(expected_model.state_dict()))
    assert "AssemblyLoaded" in names(events)


@pytest.mark.parametrize("is_3d", [False, True])
def test_sizes(tmp_path: Path, is_3d: bool) -> None:
    """Batch and length of 1, 2, 3, 17, 64 and 0, in any order, by one compiled model."""
    model, _ = compiled(make_net(), tmp_path)
    with torch.no_grad():
        for batch in SIZES:
            for length in SIZES if is_3d else (1,):
                shape = (batch, length, 8) if is_3d else (batch, 8)
                x = torch.linspace(-1, 1, batch * length * 8).reshape(shape)
                assert_same(model(x), eager(model, x))


def test_sizes_within_a_bound(tmp_path: Path) -> None:
    """Up to a bound that was asked for, at it, and beyond."""
    length = torch.export.Dim("length", min=1, max=64)
    model, _ = compiled(make_net(), tmp_path, dynamic_shapes=({1: length},), on_error="eager")
    with torch.no_grad():
        for size in (3, 1, 2, 17, 63, 64, 65, 200):
            x = torch.linspace(-1, 1, size * 16).reshape(2, size, 8)
            assert_same(model(x), eager(model, x))


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.arange(40.0).reshape(8, 5).t(),
    "sliced": lambda: torch.arange(160.0).reshape(10, 16)[::2, ::2],
    "expanded": lambda: torch.arange(8.0).expand(5, 8),
    "expanded from one": lambda: torch.ones(1, 1).expand(5, 8),
    "offset": lambda: torch.arange(48.0).reshape(6, 8)[1:],
    "unaligned": lambda: torch.arange(41.0)[1:].reshape(5, 8),
    "flipped strides": lambda: torch.arange(40.0).reshape(5, 8).flip(0),
    "conjugate view": lambda: torch.view_as_real(torch.ones(5, 4, dtype=torch.cfloat)).flatten(1),
    "strided over itself": lambda: torch.arange(20.0).as_strided((5, 8), (2, 1)),
}


@pytest.mark.parametrize("order", ["layout first", "layout second"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, order: str, tmp_path: Path) -> None:
    """Inputs that do not lie in memory one after the other."""
    model, _ = compiled(make_net(), tmp_path)
    plain = torch.linspace(-1, 1, 40).reshape(5, 8)
    calls = [LAYOUTS[name](), plain, LAYOUTS[name]()]
    with torch.no_grad():
        for x in calls if order == "layout first" else calls[1:]:
            assert_same(model(x), eager(model, x))


# ---------------------------------------------------------------------------
# Written and shared memory


class Counter(nn.Module):
    """Writes into a buffer and into an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor, at: int) -> torch.Tensor:
        self.count += 1
        self.cache[at : at + x.shape[0]] = x
        x.mul_(2)
        return x.sum() + self.cache.sum(0) * self.count


class Replacing(nn.Module):
    """Puts a new tensor in place of its buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.state * 0.5 + x.sum(0)
        return self.state + 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@dataclass
class Output:
    logits: torch.Tensor
    rest: tuple[Any, ...] | None = None


class Cache:
    """A growing cache as generation uses it."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.length = 0

    def update(self, x: torch.Tensor) -> torch.Tensor:
        self.keys.append(x)
        self.length += 1
        return self.keys[-1] + self.length


def write_argument(x: Any) -> Any:
    x.add_(1)
    return x * 2


def write_view(x: Any) -> Any:
    x[:, 1:].mul_(3)
    x.t()[0].zero_()
    return x.sum(0)


def write_and_return(x: Any) -> Any:
    return x.add_(1)


def write_both(x: Any, y: Any) -> Any:
    x.add_(y)
    y.mul_(2)
    return x + y


def write_list(xs: Any) -> Any:
    xs[0].add_(xs[1])
    return xs[0] * 2


def write_dict(d: Any) -> Any:
    d["x"].add_(1)
    d["new"] = d["x"] * 2
    return d["new"] + 1


def append(xs: Any) -> Any:
    xs.append(xs[0] + 1)
    return xs[-1] * 2


def update_cache(x: Any, cache: Any) -> Any:
    return cache.update(x * 2) * 3


def same(x: Any) -> Any:
    x + 1
    return x


def same_and_new(x: Any) -> Any:
    return x, x + 1, x


def view(x: Any) -> Any:
    return x.t(), x[1:], x + 1


def expanded(x: Any) -> Any:
    return (x + 1).unsqueeze(0).expand(3, *x.shape)


def twins(x: Any) -> Any:
    y = x + 1
    return y, y, y.view(-1), y[1:]


def chunks(x: Any) -> Any:
    return (x * 2).chunk(2, dim=-1)


def transposed(x: Any) -> Any:
    return (x * 2).t(), (x * 3).t().contiguous(), x.unsqueeze(0) * 1


def tree(x: Any) -> Any:
    return {"a": x + 1, "b": (x * 2, None, 3, "text", [x - 1, 2.5, True])}


def as_dataclass(x: Any) -> Any:
    return Output(x + 1, (x * 2, None))


def constants(x: Any) -> Any:
    return x.shape[0], x.dim(), x.dtype, x.device, x.shape, x.sum()


def dtypes(x: Any) -> Any:
    return x > 0, x.half(), x.double(), x.long(), x.argmax(-1), torch.complex(x, x)


def new_tensors(x: Any) -> Any:
    return torch.zeros(3), torch.arange(x.shape[0]), torch.full((2, x.shape[0]), 2.0), x * 1


def sorted_values(x: Any) -> Any:
    return x.sort(-1), x.max(0), torch.topk(x, 2)


def detached(x: Any) -> Any:
    return x.detach(), x.data * 2


def write_then_read(x: Any, y: Any) -> Any:
    x.mul_(2)
    out = x + y
    y.add_(1)
    return out, y * 2


def no_output(x: Any) -> Any:
    x.add_(1)


def branches(x: Any) -> Any:
    if x.shape[0] > 2:
        return x * 2
    return x - 1


def integers(x: Any, n: Any) -> Any:
    return x * n, n + 1


def matrix() -> torch.Tensor:
    return torch.linspace(-1, 1, 24).reshape(4, 6)


ONE = (matrix,)

#: By name: the function, and its inputs made anew.
CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    **{
        function.__name__.replace("_", " "): (function, lambda: (matrix(),))
        for function in (
            write_argument, write_view, write_and_return, same, same_and_new, view, expanded, twins,
            chunks, transposed, tree, as_dataclass, constants, dtypes, new_tensors, sorted_values,
            no_output, branches,
        )
    },
    "write both": (write_both, lambda: (matrix(), matrix() + 1)),
    "write list": (write_list, lambda: ([matrix(), matrix() + 1],)),
    "write dict": (write_dict, lambda: ({"x": matrix()},)),
    "append": (append, lambda: ([matrix()],)),
    "integers": (integers, lambda: (matrix(), 3)),
    "a float": (integers, lambda: (matrix(), 2.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_functions(name: str, tmp_path: Path) -> None:
    """Outputs of every structure, arguments of every structure, written or not."""
    function, inputs = CASES[name]
    served, _ = compiled(function, tmp_path)
    with torch.no_grad():
        for number in range(3):
            if number == 2:
                served, _ = compiled(function, tmp_path)
            ours, theirs = inputs(), inputs()
            found, expected = served(*ours), function(*theirs)
            assert_same(found, expected)
            assert_same(ours, theirs)
            assert aliases(found, ours) == aliases(expected, theirs)
            for one, other in zip(tensors_in(found), tensors_in(expected), strict=True):
                if one.is_floating_point() and 0 not in one.stride():
                    one.add_(1)
                    other.add_(1)
            assert_same(found, expected)
            assert_same(ours, theirs)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "writes": (Counter, lambda n: (torch.ones(2, 8) * n, n % 3)),
    "replaces a buffer": (Replacing, lambda n: (torch.ones(3, 8) * n,)),
    "tied weights": (Tied, lambda n: (torch.arange(n + 2),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_with_state(name: str, tmp_path: Path) -> None:
    """What a call leaves in the model is what eager leaves there, call after call."""
    make, inputs = MODULES[name]
    for _ in range(2):  # Cold, then warm.
        ours, _ = compiled(make(), tmp_path)
        theirs = make()
        with torch.no_grad():
            for number in range(4):
                found_inputs, expected_inputs = inputs(number), inputs(number)
                assert_same(ours(*found_inputs), theirs(*expected_inputs))
                assert_same(found_inputs, expected_inputs)
                assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_a_tied_weight_that_is_untied(tmp_path: Path) -> None:
    """And tied again: what is one tensor and what is two is looked at anew."""
    model, _ = compiled(Tied(), tmp_path)
    ids = torch.arange(5)
    with torch.no_grad():
        assert_same(model(ids), eager(model, ids))
        model.head.weight = nn.Parameter(torch.ones(16, 8), requires_grad=False)
        assert_same(model(ids), eager(model, ids))
        model.head.weight = model.embed.weight
        assert_same(model(ids), eager(model, ids))


def test_what_has_no_name_in_a_graph(tmp_path: Path) -> None:
    """`x.data` stays eager, and is right."""
    served, _ = compiled(detached, tmp_path, on_error="eager")
    with torch.no_grad():
        for _ in range(2):
            x = matrix()
            assert_same(served(x), detached(x))


def test_a_growing_cache(tmp_path: Path) -> None:
    """An object of the user's that each call changes."""
    served, _ = compiled(update_cache, tmp_path, on_error="eager")
    ours, theirs = Cache(), Cache()
    with torch.no_grad():
        for number in range(4):
            x = torch.ones(2, 3) * number
            assert_same(served(x, ours), update_cache(x, theirs))
            assert_same(ours.keys, theirs.keys)
            assert ours.length == theirs.length


@pytest.mark.parametrize("first", ["apart", "overlapping", "the same"])
def test_overlapping_arguments(tmp_path: Path, first: str) -> None:
    """Writing into an argument that shares its memory with another one."""

    def calls() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        memory = torch.arange(8.0)
        whole = torch.arange(7.0)
        return {
            "apart": (torch.arange(7.0), torch.arange(7.0) + 1),
            "overlapping": (memory[:-1], memory[1:]),
            "the same": (whole, whole),
        }

    served, _ = compiled(write_then_read, tmp_path, on_error="eager")
    with torch.no_grad():
        for name in (first, "apart", "overlapping", "the same", "apart"):
            ours, theirs = calls()[name], calls()[name]
            assert_same(served(*ours), write_then_read(*theirs))
            assert_same(ours, theirs)


def test_an_argument_that_is_a_buffer(tmp_path: Path) -> None:
    """A call that gets the model's own buffer and has it written into."""
    ours, _ = compiled(Counter(), tmp_path, on_error="eager")
    theirs = Counter()
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours(torch.ones(2, 8), 0), theirs(torch.ones(2, 8), 0))
            assert_same(ours(ours.cache[:2], 2), theirs(theirs.cache[:2], 2))
            assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


# ---------------------------------------------------------------------------
# How it is called


def with_defaults(
    x: torch.Tensor, scale: float = 2.0, *more: torch.Tensor, bias: Any = None, **named: Any
) -> Any:
    out = x * scale
    for item in more:
        out = out + item
    if bias is not None:
        out = out + bias
    return {"out": out, **{name: value + 1 for name, value in named.items()}}


def test_ways_to_call(tmp_path: Path) -> None:
    """Positions, keywords in any order, defaults, and variable arguments, back and forth."""
    served, _ = compiled(with_defaults, tmp_path, max_assemblies=30)
    x, y = matrix(), matrix() + 1
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((), {"x": x}),
        ((x, 3.0), {}),
        ((), {"scale": 3.0, "x": x}),
        ((x, 2.0, y), {}),
        ((x, 2.0, y, y), {"bias": y}),
        ((x,), {"bias": None}),
        ((x,), {"bias": 1}),
        ((x,), {"a": y, "b": x}),
        ((x,), {"b": x, "a": y}),
    ]
    with torch.no_grad():
        for args, kwargs in calls * 2:
            assert_same(served(*args, **kwargs), with_defaults(*args, **kwargs))


@pytest.mark.parametrize("wrong", [((), {}), ((1, 2, 3), {"nothing": 1}), ((None,), {})])
def test_a_wrong_call_raises_what_eager_raises(wrong: Any, tmp_path: Path) -> None:
    """And the model goes on working."""
    model, _ = compiled(make_net(), tmp_path, on_error="eager")
    args, kwargs = wrong
    x = torch.ones(3, 8)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(Exception) as expected:
                eager(model, *args, **kwargs)
            with pytest.raises(expected.type):
                model(*args, **kwargs)
            assert_same(model(x), eager(model, x))


def test_recorded_gradients(tmp_path: Path) -> None:
    """A call that records gradients is eager's, before and after compiled ones."""
    model, _ = compiled(make_net(), tmp_path)
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    for _ in range(2):
        model(x).sum().backward()
        found = [copy.copy(p.grad) for p in model.parameters()]
        model.zero_grad()
        eager(model, x).sum().backward()
        assert_same(found, [p.grad for p in model.parameters()])
        model.zero_grad()
        with torch.no_grad():
            assert_same(model(x), eager(model, x))


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_inference_tensors(first: Any, tmp_path: Path) -> None:
    """Outputs are inference tensors exactly where eager's are."""
    model, _ = compiled(make_net(), tmp_path)
    x = torch.ones(3, 8)
    for mode in (first, torch.no_grad, torch.inference_mode):
        with mode():
            found, expected = model(x), eager(model, x)
        assert found.is_inference() == expected.is_inference()
        assert_same(found, expected)


@pytest.mark.compile
def test_sizes_by_a_real_compiler(real_cache: Path) -> None:
    """The same sizes and layouts through an artifact, loaded in a process that compiled nothing."""
    model, events = compiled(
        make_plain(), real_cache, compiler="auto", compilation_level="full", mode="cache_only"
    )
    with torch.no_grad():
        for size in (3, 1, 2, 17, 64, 0, 1000):
            x = torch.linspace(-1, 1, size * 16).reshape(size, 16)
            assert_same(model(x), eager(model, x), exact=False)
        for x in (
            torch.linspace(-1, 1, 80).reshape(16, 5).t(),
            torch.linspace(-1, 1, 320).reshape(10, 32)[::2, ::2],
            torch.ones(16).expand(5, 16),
            torch.linspace(-1, 1, 81)[1:].reshape(5, 16),
        ):
            assert_same(model(x), eager(model, x), exact=False)
    assert "PieceLoaded" in names(events)
