from __future__ import annotations

from typing import Any

import pytest
import torch

from precast.assembly import are_apart
from precast.blueprint import check_source
from precast.capture.guards import (
    CallCheckWriter,
    PlaceTable,
    Scope,
    parse_place,
    readable,
    require_tensor,
    root_of,
    signature_of,
)
from precast.contract import Unrecordable, decode, encode


@pytest.mark.parametrize(
    ("expression", "place"),
    [
        ("L['x']", "x"),
        ("L['self']._modules['layers']._modules['0'].eps", None),
        ("L['cache'].layers[0].keys", "cache.layers[0].keys"),
        ("list(dict.keys(L['d']))[1]", "list(d)[1]"),
        ("type(L['x'])", "type(x)"),
        ("len(L['x'])", "len(x)"),
        ("L['d']['k'][-1]", "d['k'][-1]"),
    ],
)
def test_places_are_read_as_steps(expression: str, place: str | None) -> None:
    path = parse_place(expression)

    assert path[0] == root_of(expression)
    if place is not None:
        assert readable(path) == place


@pytest.mark.parametrize("expression", ["L['x'].size(0)", "f(L['x'])", "L['x'][L['i']]", "1 +"])
def test_what_is_no_place_is_refused(expression: str) -> None:
    """An expression that does more than read is not written as data, and not guessed at."""
    with pytest.raises(Unrecordable):
        parse_place(expression)


def test_two_roots_are_none() -> None:
    assert root_of("L['x'][L['i']]") is None
    assert root_of("not python") is None


def test_every_prefix_is_one_row_of_the_table() -> None:
    table = PlaceTable()
    first = table.add(parse_place("L['self'].a.b"))
    second = table.add(parse_place("L['self'].a.c"))

    assert len(table.nodes) == 4
    assert table.nodes[first][0] == table.nodes[second][0]


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
    namespace: dict[str, Any] = {"TENSORS": frozenset((torch.Tensor, torch.nn.Parameter))}
    namespace.update((name, decode(data)) for name, data in writer.constants.items())
    exec(check_source(f"def check({signature_of(captured.__code__)}):", writer.lines), namespace)
    return lambda x: writer.conditions[namespace["check"](x)]


class Subclass(torch.Tensor):
    pass


def test_a_tensor_unlike_the_captured_one_is_refused_with_the_condition() -> None:
    check = make_check(torch.ones(2, 3))

    assert check(torch.zeros(2, 3)) == "everything holds"
    assert check(torch.nn.Parameter(torch.zeros(2, 3))) == "everything holds"
    assert check(torch.zeros(2, 3).half()) == "x is torch.float32"
    assert check(torch.zeros(2, 4)) == "size 1 of x is 3"
    assert check(torch.zeros(2)) == "x has 2 dimensions"
    assert check(torch.zeros(3, 2).T) == "x is contiguous"
    assert check(torch.zeros(2, 3, device="meta")) == "x is on cpu"
    assert check(torch.zeros(2, 3).as_subclass(Subclass)) == "x is a plain tensor"
    assert check(None) == "x is a plain tensor"


def test_a_stride_of_a_dimension_of_one_is_no_matter() -> None:
    check = make_check(torch.ones(1, 3))

    assert check(torch.ones(5, 3)[:1]) == "everything holds"
    assert check(torch.ones(1, 6)[:, ::2]) != "everything holds"


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0.0, -0.0), ((1,), [1]), ("1", 1), (b"a", "a"), ({1: 2}, {2: 1})],
)
def test_values_that_compare_equal_or_look_alike_are_told_apart(one: Any, other: Any) -> None:
    assert encode(one) != encode(other)


@pytest.mark.parametrize(
    "value", [float("nan"), 1e-5, (1, [2, None]), {"a": (1.0,)}, torch.float16, torch.Tensor]
)
def test_a_value_equals_itself_after_a_round_trip(value: Any) -> None:
    """NaN too, which Python holds to be unlike itself."""
    assert encode(value) == encode(decode(encode(value)))


def test_what_has_an_identity_only_is_refused() -> None:
    with pytest.raises(Unrecordable, match="object"):
        encode(object())


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


def test_a_place_read_past_a_class_s_own_getattribute_is_a_place() -> None:
    """
    torch 2.11 writes attributes of objects with a `__getattribute__` of their own in this form.
    """
    path = parse_place("object.__getattribute__(L['self'].config, '__dict__')['eps']")

    assert path == (("L", "self"), ("a", "config"), ("g", "__dict__"), ("i", "eps"))
