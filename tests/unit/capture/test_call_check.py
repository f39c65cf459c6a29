from __future__ import annotations

from typing import Any

import pytest
import torch

from precast.assembly import are_apart
from precast.blueprint import check_source
from precast.capture.call_check import CallCheckWriter, require_tensor, signature_of
from precast.capture.places import Scope, parse_place
from precast.contract import NO_GRADIENTS, decode


def positional_only(a: Any, /, b: Any = 1, *rest: Any, c: Any, d: Any = 2, **more: Any) -> None:
    pass


def keyword_only(*, c: Any, d: Any = 3) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "parameters"),
    [(positional_only, "a, /, b, *rest, c, d, **more"), (keyword_only, "*, c, d")],
)
def test_a_check_takes_what_the_function_takes(function: Any, parameters: str) -> None:
    assert signature_of(function.__code__) == parameters


def captured(x: Any) -> None:
    pass


def make_check(tensor: torch.Tensor, sizes: Any = None) -> Any:
    writer = CallCheckWriter(Scope(captured, False, {}, {}))
    require_tensor(writer, parse_place("L['x']"), tensor, sizes)
    writer.require_no_gradients()
    namespace: dict[str, Any] = {
        "TENSORS": frozenset((torch.Tensor, torch.nn.Parameter)),
        "is_grad_enabled": torch.is_grad_enabled,
    }
    namespace.update((name, decode(data)) for name, data in writer.constants.items())
    exec(check_source(f"def check({signature_of(captured.__code__)}):", writer.lines), namespace)
    return lambda x: writer.conditions[namespace["check"](x)]


class Subclass(torch.Tensor):
    pass


def test_a_tensor_unlike_the_captured_one_is_refused_with_the_condition() -> None:
    check = make_check(torch.ones(2, 3))

    assert check(torch.zeros(2, 3)) == "everything holds"
    with torch.no_grad():
        assert check(torch.nn.Parameter(torch.zeros(2, 3))) == "everything holds"
    assert check(torch.nn.Parameter(torch.zeros(2, 3))) == NO_GRADIENTS
    assert check(torch.zeros(2, 3).half()) == "x is torch.float32"
    assert check(torch.zeros(2, 4)) == "size 1 of x is 3"
    assert check(torch.zeros(2)) == "x has 2 dimensions"
    assert check(torch.zeros(3, 2).T) == "x is contiguous"
    assert check(torch.zeros(2, 3, device="meta")) == "x is on cpu"
    assert check(torch.zeros(2, 3).as_subclass(Subclass)) == "x is a plain tensor"
    assert check(None) == "x is a plain tensor"
    assert check(torch._neg_view(torch.zeros(2, 3))).startswith("x is no negative view")
    check = make_check(torch.zeros(2, 3, dtype=torch.complex64))
    assert check(torch.zeros(2, 3, dtype=torch.complex64)) == "everything holds"
    z = torch.zeros(2, 3, dtype=torch.complex64).conj()
    assert check(z).startswith("x is no conjugate view")


def test_a_stride_of_a_dimension_of_one_is_no_matter() -> None:
    check = make_check(torch.ones(1, 3))

    assert check(torch.ones(5, 3)[:1]) == "everything holds"
    assert check(torch.ones(1, 6)[:, ::2]) != "everything holds"


def test_arguments_that_share_memory_with_a_written_one_are_found() -> None:
    base = torch.zeros(10)
    x, other = base[:4], torch.zeros(4)

    assert are_apart((x,), (x, other))
    assert are_apart((x,), (x, base[4:]))
    assert are_apart((x,), (x, base[:0]))
    assert not are_apart((x,), (x, base[3:]))
    assert not are_apart((x,), (base, x))
    assert not are_apart((x,), (x, base[:4]))
    assert are_apart((other,), (base[:4], base[2:], other))


def test_one_object_at_two_places_is_not_apart() -> None:
    """Code for two arguments does not know that they are one."""
    x = torch.zeros(4)

    assert not are_apart((x,), (x, x))
