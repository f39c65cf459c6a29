"""What uses of torch's internals find: the ranges that guards leave, and breaks of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Min, Mod

from precast.torch_private import SizesSpecializedError, _narrow, find_graph_breaks

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
        # What a slice of BERT's table of token types asks for; the second arm bounds nothing.
        (sympy.Or(sympy.Eq(S0, Min(512, S0)), sympy.Eq(Min(512, S0), 1)), [0, None], [0, 512]),
        (sympy.Or(sympy.Le(S0, 4), sympy.Le(S0, 9), evaluate=False), [0, None], [0, 9]),
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


@pytest.mark.parametrize(
    "expression",
    [
        sympy.Eq(Mod(S0, 4), 0),
        sympy.Ne(S0, 7),
        sympy.Le(S1, S0),
        sympy.Or(sympy.Eq(S0, 7), sympy.Eq(Mod(S0, 4), 0)),
    ],
)
def test_what_is_no_range_is_refused(expression: Any) -> None:
    left: dict[str, list[int | None]] = {"a": [0, None], "b": [1, None]}
    with pytest.raises(SizesSpecializedError, match="holds only where"):
        narrow(expression, **left)


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # First.
            x = x + 1
        print(end="")  # noqa: T201 - what Dynamo does not trace: second.
        return x * 2


def test_each_graph_break_is_found_with_its_line() -> None:
    """
    If this fails on a new torch: `find_graph_breaks`.
    """
    found = find_graph_breaks(Branching(), (torch.ones(2),), {})
    first = Branching.forward.__code__.co_firstlineno + 1
    assert [(where, line) for _, where, line in found] == [
        (f"{__file__}:{first}", "if x.sum() > 0:  # First."),
        (f"{__file__}:{first + 2}", found[1][2]),
    ]
    assert found[0][0] == "a branch depends on the value of a tensor"
    assert "print" in str(found[1][2])
    assert find_graph_breaks(torch.nn.ReLU(), (torch.ones(2),), {}) == []
