"""Progress is shown while something compiles, seldom, and never where it is not wanted."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from precast import events
from precast.errors import Reason
from precast.monitoring.progress import ProgressListener, State

READY = events.ModelReady("m", 1.0, 2, 2, 2, 0, 0, 0.0, warm=False)
REASON = Reason("compile-failed", "m", "r")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(num_pieces: int) -> events.PlanMade:
    return events.PlanMade("m", 33, num_pieces, "layers")


def missed(piece: str) -> events.PieceMissed:
    return events.PieceMissed(piece, "k", {})


def started(piece: str, compiler: str = "eager") -> events.CompileStarted:
    return events.CompileStarted(piece, "", compiler)


def job(piece: str, code: str | None = None) -> events.JobFinished:
    return events.JobFinished(piece, "", None if code else "c", code, 1.0, None, None, None, 1)


def compiled(piece: str) -> events.PieceCompiled:
    return events.PieceCompiled(piece, piece, "eager", 1.0, 1, 1)


def loaded(piece: str) -> events.PieceLoaded:
    return events.PieceLoaded(piece, "k", "cache", 0.1, 0.0)


def failed(piece: str) -> events.PieceFailed:
    return events.PieceFailed(piece, "", "eager", REASON)


def after(*happened: events.Event) -> State:
    state = State(0.0)
    for event in happened:
        state.take(event, 0.0)
    return state


def test_plain_lines_come_at_once_and_then_seldom() -> None:
    out, clock = io.StringIO(), Clock()
    show = ProgressListener(True, out, clock, limit_s=600.0)
    for event in (plan(3), missed("embed"), missed("layer"), started("embed")):
        show(event)
    clock.now = 3.0
    show(started("layer"))
    clock.now = 12.0
    show(job("embed"))
    clock.now = 14.0
    show(READY)
    assert out.getvalue().splitlines() == [
        "precast: m: looking up, 0 s",
        "precast: m: compiling, 2 of 3 pieces done, 1 from cache, 12 s; layer 9 of 600 s",
        "precast: m: compiled 2 of 2 pieces, 2 different: 0 from cache, 2 new; 1.0 s",
    ]


def test_a_start_says_what_it_does_from_the_first_second_on() -> None:
    stages = []
    state = State(0.0)
    for event in (
        events.AssemblyMissed("m", "k", {}, None),
        events.LeaseAcquired("k", "disk"),
        events.CaptureFinished("m", 1.0, 10, 10),
        plan(2),
        missed("a"),
    ):
        state.take(event, 0.0)
        stages.append(state.stage)
    assert stages == [
        *("capturing, here or in another process", "capturing", "cutting", "looking up"),
        "compiling",
    ]


def test_pieces_count_when_their_jobs_end_in_whatever_order() -> None:
    """
    Results are looked at one after the other; a job that ended first may be the last of them.
    """
    state = after(plan(3), *map(missed, "abc"), *map(started, "abc"), job("c"), job("b"))
    assert (state.num_left, [running.piece for running in state.running]) == (1, ["a"])
    for event in (job("a"), compiled("a"), loaded("a"), compiled("b"), loaded("b")):
        state.take(event, 0.0)
    assert (state.num_compiled, state.num_found, state.num_left) == (3, 0, 0)


def test_two_pieces_of_one_name_are_two() -> None:
    """
    A layer that an operator cuts has two pieces with the layer's name.
    """
    state = after(plan(2), missed("layer"), missed("layer"), started("layer"), job("layer"))
    assert (state.num_left, state.is_over) == (1, False)
    state.take(job("layer"), 0.0)
    assert state.is_over


@pytest.mark.parametrize(
    ("how", "num_compiled", "num_eager", "num_found"),
    [
        ((started("a"), job("a"), compiled("a"), loaded("a")), 1, 0, 0),
        ((started("a"), compiled("a")), 1, 0, 0),
        ((started("a"), job("a", "compile-failed"), failed("a")), 0, 1, 0),
        ((started("a"), failed("a")), 0, 1, 0),
        ((failed("a"),), 0, 1, 0),
        # One compiler gave it up, the next did it.
        ((started("a"), started("a", "b"), job("a"), failed("a"), compiled("a")), 1, 0, 0),
        ((events.FailureRemembered("a", "k", REASON),), 0, 1, 0),
        ((loaded("a"),), 0, 0, 1),
        (
            (
                *(started("a"), job("a", "compile-memory"), missed("a, part 1")),
                *(started("a, part 1"), job("a, part 1"), compiled("a, part 1")),
                *(loaded("a, part 1"), events.PieceSplit("a", "k", 2, REASON)),
            ),
            *(1, 0, 0),
        ),
    ],
    ids=str,
)
def test_each_piece_is_counted_once_however_it_ends(
    how: tuple[events.Event, ...], num_compiled: int, num_eager: int, num_found: int
) -> None:
    state = after(plan(5), missed("a"))
    assert state.num_left == 1
    for event in how[:-1]:
        state.take(event, 0.0)
    state.take(how[-1], 0.0)
    assert (state.num_compiled, state.num_eager, state.num_found) == (
        *(num_compiled, num_eager, num_found),
    )
    assert state.num_missed == 1
    assert state.is_over


def test_a_piece_that_is_cut_smaller_is_not_over_before_its_parts() -> None:
    parts = [f"a, part {number}" for number in (1, 2)]
    state = after(plan(1), missed("a"), started("a"), job("a", "compile-memory"))
    for event in (*map(missed, parts), started(parts[0]), job(parts[0])):
        state.take(event, 0.0)
        assert not state.is_over


def test_a_second_model_starts_from_nothing() -> None:
    out = io.StringIO()
    show = ProgressListener(True, out, Clock())
    for event in (plan(1), missed("a"), started("a"), compiled("a"), READY, plan(7), missed("b")):
        show(event)
    show(events.CompileStarted("b", "", "eager"))
    assert out.getvalue().splitlines()[-1] == "precast: m: looking up, 0 s"


def test_another_compiler_for_a_piece_gets_no_more_time() -> None:
    state = after(missed("layer"))
    state.take(started("layer", "aot_inductor"), 3.0)
    state.take(started("layer", "inductor_standalone"), 7.0)
    ((piece, compiler, since),) = state.running
    assert (piece, compiler, since) == ("layer", "inductor_standalone", 3.0)


def test_lines_come_while_nothing_happens() -> None:
    """
    A piece may compile for minutes without an event.
    """
    out = io.StringIO()
    show = ProgressListener(True, out, interval_s=0.05)
    show(started("layer"))
    deadline = time.monotonic() + 10
    while out.getvalue().count("\n") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert out.getvalue().count("compiling") >= 4
    show(READY)
    written = out.getvalue()
    time.sleep(0.2)
    assert out.getvalue() == written


def test_without_a_terminal_nothing_is_said_of_what_is_soon_done() -> None:
    out, clock = io.StringIO(), Clock()
    show = ProgressListener(None, out, clock)
    show(started("a"))
    clock.now = 5.0
    show(started("b"))
    show(READY)
    assert out.getvalue() == ""
    show(started("a"))
    clock.now = 16.0
    show(started("b"))
    assert out.getvalue() == "precast: compiling, 11 s; a 11 s, b 0 s\n"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_nothing_is_shown_where_it_is_not_wanted(stream: io.StringIO) -> None:
    show = ProgressListener(False, stream, interval_s=0.01)
    for event in (started("a"), compiled("a"), READY):
        show(event)
    time.sleep(0.05)
    assert stream.getvalue() == ""


def test_a_warm_start_is_silent() -> None:
    out = Terminal()
    show = ProgressListener(True, out)
    for event in (events.CacheHit("k", "disk", 0.1, 1), loaded("a"), READY):
        show(event)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    "end",
    [
        events.FellBack("m", None, Reason("split-failed", "m", "r")),
        events.CaptureFailed("m", Reason("capture-failed", "m", "r")),
        events.StartBrokenOff("m"),
        events.ModelReleased("m"),
    ],
    ids=lambda end: type(end).__name__,
)
def test_it_ends_also_where_nothing_comes_of_it(end: events.Event) -> None:
    out = io.StringIO()
    show = ProgressListener(True, out, interval_s=0.02)
    show(events.AssemblyMissed("m", "k", {}, None))
    show(end)
    written = out.getvalue()
    assert written.count("\n") == 1
    time.sleep(0.1)
    assert out.getvalue() == written


def test_a_call_that_runs_eager_beside_a_start_does_not_end_it() -> None:
    out, clock = io.StringIO(), Clock()
    show = ProgressListener(True, out, clock)
    show(started("layer"))
    show(events.FellBack("m", None, Reason("grad-enabled", "m", "r")))
    clock.now = 11.0
    show(started("other"))
    assert "layer 11 s" in out.getvalue()


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    out = Terminal()
    ProgressListener(None, out, Clock())(started("a"))
    assert out.getvalue() == "precast: compiling, 0 s; a 0 s\n"


def test_a_fork_shows_what_it_does_itself() -> None:
    """
    Also where another thread held the lock at the fork.
    """
    out = io.StringIO()
    show = ProgressListener(True, out, Clock())
    show(started("parents"))
    receive, send = os.pipe()
    with show._lock:
        pid = os.fork()
        if pid == 0:
            out.seek(0), out.truncate()
            show(started("own"))
            os.write(send, out.getvalue().encode())
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(receive, 100) == b"precast: compiling, 0 s; own 0 s\n"


ON_A_TERMINAL = """
import sys, time
from precast import events
from precast.monitoring.progress import ProgressListener
show = ProgressListener(limit_s=600.0)
show(events.AssemblyMissed("Decoder", "k", {}, None))
time.sleep(0.4)
show(events.PlanMade("Decoder", 33, 3, "layers"))
for piece in ("embed", "layers[0]"):
    show(events.PieceMissed(piece, "k", {}))
for piece in ("embed", "layers[0]"):
    show(events.CompileStarted(piece, "", "aot_inductor"))
time.sleep(0.4)
print("printed meanwhile", flush=True)
show(events.JobFinished("embed", "", "aot_inductor", None, 1.0, None, None, None, 1))
time.sleep(1.2)
if sys.argv[1] == "interrupt":
    raise KeyboardInterrupt
show(events.JobFinished("layers[0]", "", "aot_inductor", None, 1.0, None, None, None, 1))
show(events.ModelReady("Decoder", 2.0, 33, 3, 33, 0, 1, 9.0, warm=False))
"""


def run_on_terminal(how: str) -> str:
    """Run the program above on a real terminal, and return all that was written there."""
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, how],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    ) as process:
        os.close(theirs)
        written: list[bytes] = []

        def read() -> None:
            try:
                while chunk := os.read(mine, 4096):
                    written.append(chunk)
            except OSError:  # As Linux says that nobody holds the other end any more.
                pass

        reader = threading.Thread(target=read)
        reader.start()
        process.wait(60)
        reader.join(10)
    os.close(mine)
    return b"".join(written).decode()


def plain(written: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)


def test_a_real_terminal_gets_a_live_display_that_ends_with_one_line() -> None:
    pytest.importorskip("rich")
    written = run_on_terminal("end")
    text = plain(written)
    assert "Decoder: capturing, here or in another process" in text
    assert re.search(r"Decoder: compiling, 1 of 3 pieces done, 1 from cache, \d s", text)
    assert re.search(r"layers\[0\] +aot_inductor +\S+ 0 of 600 s", text)
    assert "Decoder: compiling, 2 of 3 pieces done, 1 from cache" in text
    assert re.search(r"\b1 of 600 s", text), "the seconds go on"
    assert "printed meanwhile" in text
    # The display is wiped off, line by line, and what is left is one line.
    assert text.rstrip().endswith(
        "precast: Decoder: compiled 33 of 33 pieces, 3 different: 1 from cache, 2 new; 2.0 s"
    )
    assert "\x1b[2K" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is back"


def test_after_an_interrupt_the_terminal_has_its_cursor_back() -> None:
    pytest.importorskip("rich")
    written = run_on_terminal("interrupt")
    assert "KeyboardInterrupt" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_the_listener_of_a_session_knows_the_limit(tmp_path: Path) -> None:
    from precast.session import open_session

    settings = {"cache_dir": str(tmp_path), "max_compile_time": 7.0}
    for mode, limits in (("blocking", [7.0]), ("cache_only", [])):
        session = open_session("m", None, {**settings, "mode": mode}, ())
        found = [x for x in session.emit._listeners if isinstance(x, ProgressListener)]
        assert [listener._limit_s for listener in found] == limits
        session.close()
