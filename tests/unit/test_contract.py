from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from precast.contract import Unrecordable, decode, digest_code, encode, find_code


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


def test_a_named_tuple_is_told_by_the_order_of_its_fields() -> None:
    one, alike, other = (namedtuple("Pair", fields) for fields in ("a b", "a b", "b a"))
    assert encode(one) == encode(alike) != encode(other)
    assert decode(encode(torch.Size)) is torch.Size


def test_code_is_digested_by_what_it_does() -> None:
    """Where it stands is no matter; its constants are."""
    one, moved, changed = (
        compile(text, "f.py", "exec").co_consts[0]
        for text in (
            "def f(x): return x * 2",
            "\n\n\ndef f(x): return x * 2",
            "def f(x): return x * 2.0",
        )
    )

    assert digest_code(one) == digest_code(moved) != digest_code(changed)


def test_code_is_found_behind_wrappers() -> None:
    def make(inner: Callable[[], int]) -> Callable[[], int]:
        return lambda: inner() + 0

    wrapped = make(lambda: 1)

    assert find_code("@", wrapped) is wrapped.__code__
    assert find_code("@/cell:inner", wrapped).co_consts == (None, 1)  # type: ignore[union-attr]
    assert find_code("no.such.module:f") is None
    assert find_code("json:JSONEncoder.no_such") is None
