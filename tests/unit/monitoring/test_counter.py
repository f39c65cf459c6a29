"""The counter is a fold over events, and `expect` tells all that differs."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from precast import events
from precast.errors import Reason
from precast.monitoring.counter import CompilationCounter

REASON = Reason("compile-failed", "refused", "Nothing to do")


def test_counts_add_up() -> None:
    counter = CompilationCounter()
    counter(events.PlanMade("m", pieces=33, unique_pieces=3, split="layers"))
    counter(events.PieceCompiled("a", "k", "eager", 1.0, 10, 1))
    counter(events.PieceCompiled("b", "l", "eager", 1.0, 10, 1))
    counter(events.FellBack("m", None, REASON))
    assert {name: n for name, n in counter.snapshot().items() if n} == {
        "num_pieces": 33,
        "num_unique_pieces": 3,
        "num_compiled": 2,
        "num_fallbacks": 1,
    }
    assert counter.num_compiled == 2


def test_every_count_is_declared_and_every_event_is_counted() -> None:
    """So that a new event cannot be forgotten here."""
    counter = CompilationCounter()
    declared = {name for name in get_type_hints(CompilationCounter) if name.startswith("num_")}
    assert declared == set(counter.snapshot())
    for kind in events.Event.__subclasses__():
        fields = dict.fromkeys(kind.__match_args__, 1)
        before = counter.snapshot()
        counter(kind(**fields))
        assert counter.snapshot() != before, f"{kind.__name__} changes no count"


def test_expect_passes_when_the_changes_are_as_said() -> None:
    counter = CompilationCounter()
    counter(events.ModelReleased("before"))
    with counter.expect(num_compiled=1, num_loaded=0):
        counter(events.PieceCompiled("a", "k", "eager", 1.0, 10, 1))


def test_expect_names_everything_that_differs() -> None:
    counter = CompilationCounter()
    expected = r"num_compiled: expected \+3, got \+0; num_loaded: expected \+1, got \+0"
    with (
        pytest.raises(AssertionError, match=expected),
        counter.expect(num_compiled=3, num_loaded=1, num_failed=0),
    ):
        pass


def test_expect_leaves_the_blocks_own_error_alone() -> None:
    with pytest.raises(ZeroDivisionError), CompilationCounter().expect(num_compiled=3):
        _ = 1 / 0


def test_expect_refuses_unknown_counts() -> None:
    with (
        pytest.raises(TypeError, match="no count 'num_compile'"),
        CompilationCounter().expect(num_compile=1),
    ):
        pass
