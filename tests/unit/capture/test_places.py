from __future__ import annotations

import pytest

from precast.capture.places import PlaceTable, parse_place, readable, root_of, size_of
from precast.contract import Unrecordable


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


def test_a_size_is_told_from_a_tensor() -> None:
    assert size_of("L['x'].size()[1]") == ("L['x']", "size", 1)
    assert size_of("L['x'].stride()[0]") == ("L['x']", "stride", 0)
    assert size_of("L['x']") is None


def test_every_prefix_is_one_row_of_the_table() -> None:
    table = PlaceTable()
    first = table.add(parse_place("L['self'].a.b"))
    second = table.add(parse_place("L['self'].a.c"))

    assert len(table.nodes) == 4
    assert table.nodes[first][0] == table.nodes[second][0]


def test_a_place_read_past_a_class_s_own_getattribute_is_a_place() -> None:
    """
    torch 2.11 writes attributes of objects with a `__getattribute__` of their own in this form.
    """
    path = parse_place("object.__getattribute__(L['self'].config, '__dict__')['eps']")

    assert path == (("L", "self"), ("a", "config"), ("g", "__dict__"), ("i", "eps"))
