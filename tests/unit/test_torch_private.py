"""What a compiled piece's guards leave of the sizes that were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from precast.torch_private import SizesSpecializedError, _narrow

S0 = sympy.Symbol("s0", integer=True, nonnegative=True)
S1 = sympy.Symbol("s1", integer=True, nonnegative=True)
NAMES = {S0: "a", S1: "b"}


def narrow(expression: Any, **left: list[int | None]) -> dict[str, list[int | None]]:
    free = sorted(expression.free_symbols, key=str)
    _narrow(expression, free, NAMES, left)
    return left


@pytest.mark.parametrize(
    ("expression", "a", "expected"),
    [
        (sympy.Le(S0, 1024), [0, None], [0, 1024]),
        (sympy.Lt(S0, 1024), [0, None], [0, 1023]),
        (sympy.Le(S0, 1024), [0, 100], [0, 100]),
        (sympy.Ge(S0, 5), [0, None], [5, None]),
        (sympy.Gt(S0, 5), [0, 64], [6, 64]),
        (sympy.Ge(S0, 5), [7, None], [7, None]),
        (sympy.Le(S0 * S0 + S0, 110), [0, None], [0, 10]),
    ],
)
def test_one_size_is_bounded(
    expression: Any, a: list[int | None], expected: list[int | None]
) -> None:
    assert narrow(expression, a=a) == {"a": expected}


def test_products_of_rounded_sizes_keep_a_box_in_which_all_holds() -> None:
    """
    What Triton's 32-bit indexing asks for: no polynomial, and yet bounded from above.
    """
    rounded = 8 * FloorDiv(S0 + 7, 8)
    expression = sympy.Le(S0 * S1 * rounded + S0, rounded + 2147483647)
    left = narrow(expression, a=[0, None], b=[0, None])

    (_, a), (_, b) = left["a"], left["b"]
    assert a is not None
    assert b is not None
    assert a == b > 1000
    for sizes in ((a, b), (0, b), (a, 0), (1, 1), (a - 1, b), (a, b - 3)):
        assert bool(expression.subs(dict(zip((S0, S1), sizes, strict=True))))


@pytest.mark.parametrize("expression", [sympy.Eq(Mod(S0, 4), 0), sympy.Ne(S0, 7), sympy.Le(S1, S0)])
def test_what_is_no_range_is_refused(expression: Any) -> None:
    left: dict[str, list[int | None]] = {"a": [0, None], "b": [1, None]}
    with pytest.raises(SizesSpecializedError, match="holds only where"):
        narrow(expression, **left)
