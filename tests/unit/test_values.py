"""Values behave as frozen dataclasses do."""

from __future__ import annotations

import pickle

import pytest

from precast.values import Value


class Point(Value):
    x: int
    y: int = 2


class Named(Value, kw_only=True):
    name: str


def test_fields_come_by_position_or_name_and_have_defaults() -> None:
    assert Point(1) == Point(x=1, y=2) == Point(1, 2)
    assert Point(1).as_dict() == {"x": 1, "y": 2}
    assert repr(Point(1)) == "Point(x=1, y=2)"
    assert vars(Point(1)) == {"x": 1}  # What was given, without defaults.


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, "needs x"),
        ((1, 2, 3), {}, "at most 2 positional"),
        ((1,), {"x": 1}, "'x' twice"),
        ((1,), {"z": 1}, "no field 'z'; it has x, y"),
    ],
)
def test_wrong_arguments_are_named(
    args: tuple[int, ...], kwargs: dict[str, int], says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        Point(*args, **kwargs)


def test_keyword_only_values_refuse_positions() -> None:
    assert Named(name="a").name == "a"
    with pytest.raises(TypeError, match="at most 0 positional"):
        Named("a")  # type: ignore[misc]


def test_a_value_cannot_be_changed_but_replaced() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert point.replace(y=5) == Point(1, 5)
    assert point == Point(1)


def test_equal_values_hash_alike_and_kinds_differ() -> None:
    assert hash(Point(1)) == hash(Point(1, 2))
    assert Point(1) != Named(name="1")
    assert Point(1) != (1, 2)


def test_values_pickle_and_match() -> None:
    assert pickle.loads(pickle.dumps(Point(1, 3))) == Point(1, 3)
    match Point(1, 3):
        case Point(x, y):
            assert (x, y) == (1, 3)
