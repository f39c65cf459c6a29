"""Progress is shown while something compiles, seldom, and never where it is not wanted."""

from __future__ import annotations

import io
import sys

import pytest

from precast import events
from precast.errors import Reason
from precast.monitoring.progress import ProgressListener

READY = events.ModelReady("m", 1.0, 2, 2, 2, 0, 0, 0.0, warm=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def started(piece: str) -> events.CompileStarted:
    return events.CompileStarted(piece, piece, "eager")


def compiled(piece: str) -> events.PieceCompiled:
    return events.PieceCompiled(piece, piece, "eager", 1.0, 1, 1)


def test_plain_lines_come_at_once_and_then_seldom() -> None:
    out, clock = io.StringIO(), Clock()
    show = ProgressListener(True, out, clock)
    show(started("embed"))
    clock.now = 3.0
    show(started("layer"))
    clock.now = 12.0
    show(compiled("embed"))
    assert out.getvalue().splitlines() == [
        "precast: 0 pieces done, 0 s; compiling embed",
        "precast: 1 pieces done, 12 s; compiling layer",
    ]


def test_a_second_model_starts_from_nothing() -> None:
    out = io.StringIO()
    show = ProgressListener(True, out, Clock())
    for event in (started("a"), compiled("a"), READY, started("b")):
        show(event)
    assert out.getvalue().splitlines()[-1] == "precast: 0 pieces done, 0 s; compiling b"


def test_a_piece_that_a_second_compiler_tries_is_one_piece() -> None:
    """
    Its key changes with the compiler; its name does not.
    """
    out, clock = io.StringIO(), Clock()
    show = ProgressListener(True, out, clock)
    show(events.CompileStarted("layer", "1", "aot_inductor"))
    show(events.CompileStarted("layer", "2", "inductor_standalone"))
    clock.now = 20.0
    show(compiled("layer"))
    assert out.getvalue().splitlines()[-1] == "precast: 1 pieces done, 20 s"


def test_a_failed_piece_is_no_longer_shown() -> None:
    out, clock = io.StringIO(), Clock()
    show = ProgressListener(True, out, clock)
    show(started("a"))
    clock.now = 20.0
    show(events.PieceFailed("a", "a", "eager", Reason("compile-failed", "m", "r")))
    assert out.getvalue().splitlines()[-1] == "precast: 1 pieces done, 20 s"


@pytest.mark.parametrize(("is_enabled", "stream"), [(False, Terminal()), (None, io.StringIO())])
def test_nothing_is_shown_where_it_is_not_wanted(
    is_enabled: bool | None, stream: io.StringIO
) -> None:
    show = ProgressListener(is_enabled, stream)
    for event in (started("a"), compiled("a"), READY):
        show(event)
    assert stream.getvalue() == ""


def test_a_warm_start_is_silent() -> None:
    out = Terminal()
    ProgressListener(True, out)(READY)
    assert out.getvalue() == ""


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    out = Terminal()
    ProgressListener(None, out, Clock())(started("a"))
    assert out.getvalue() == "precast: 0 pieces done, 0 s; compiling a\n"


def test_a_terminal_gets_a_live_line_that_ends() -> None:
    pytest.importorskip("rich")
    out = Terminal()
    show = ProgressListener(None, out)
    show(started("layer"))
    show(READY)
    assert "compiling" in out.getvalue()
