"""A captured and cut model as plain data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from precast.blueprint import Blueprint


def test_what_most_slots_run_is_worth_most_and_of_these_the_longest() -> None:
    texts = ["short", "long " * 9, "used often", "longer " * 99]
    called = [2, 0, None, 2, 1, 2, 3, 3]
    blueprint: Any = SimpleNamespace(
        pieces=[SimpleNamespace(text=text) for text in texts],
        slots=[(number, f"slot {i}") for i, number in enumerate(called)],
    )
    assert Blueprint.order_of_worth(blueprint) == [2, 3, 1, 0]
