"""Compile progress on stderr: a live display on a terminal with rich, else a line every 10 s.

Shows nothing of a warm start. What is no terminal gets plain lines: a log, and a notebook's cell.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from precast import events
from precast.monitoring.log import describe_ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from precast.events import Event

_MOST_ROWS = 8
_PART = ", part "  # In the name of a piece that is a part of another one.

# Reasons that are told while a start goes on.
_NO_END = ("capture-in-process", "compile-crashed", "grad-enabled", "outside-contract")


class Running(NamedTuple):
    """A piece that is compiling."""

    piece: str
    compiler: str
    since: float


class State:
    """How far a start is, as a fold over its events.

    Pieces are counted when the job that compiles them ends, whichever does first: what is done
    with its result comes later, in turn. Names do not tell pieces apart for certain, so they are
    counted, not listed.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.model = ""
        self.stage = ""
        self.num_pieces: int | None = None
        self.num_missed = 0
        self.num_compiled = 0
        self.num_eager = 0
        self.num_found = 0  # Meanwhile, made by another process.
        self.running: tuple[Running, ...] = ()  # Replaced, never changed: others read it.
        self._landed: Counter[str] = Counter()  # Their job has ended well; not looked at yet.
        self._loading: Counter[str] = Counter()

    def take(self, event: Event, now: float) -> None:
        """Follow one event."""
        match event:
            case events.AssemblyMissed():
                self.model = event.model
                if self.num_pieces is None:
                    self.stage = "capturing, here or in another process"
            case events.LeaseAcquired():
                if self.num_pieces is None:
                    self.stage = "capturing"
            case events.CaptureFinished():
                self.model, self.stage = event.model, "cutting"
            case events.PlanMade():
                self.model, self.stage = event.model, "looking up"
                self.num_pieces = event.unique_pieces
            case events.PieceMissed():
                self.stage = "compiling"
                self.num_missed += _is_whole(event.piece)
            case events.CompileStarted():
                self.stage = "compiling"
                # Another compiler tries the same piece: its time goes on.
                since = next((r.since for r in self.running if r.piece == event.piece), now)
                self._drop(event.piece)
                self.running += (Running(event.piece, event.compiler, since),)
            case events.JobFinished():
                self._drop(event.piece)
                if event.code is None:
                    self._landed[event.piece] += 1
                    self.num_compiled += _is_whole(event.piece)
            case events.PieceCompiled():
                if self._landed[event.piece]:
                    self._landed[event.piece] -= 1
                    self._loading[event.piece] += 1
                else:  # In this process, without a job.
                    self._drop(event.piece)
                    self.num_compiled += _is_whole(event.piece)
            case events.PieceSplit():
                self.num_compiled += _is_whole(event.piece)
            case events.PieceFailed():
                self._drop(event.piece)
                if not self._landed[event.piece]:  # Else one compiler of several gave it up.
                    self.num_eager += _is_whole(event.piece)
            case events.FailureRemembered():
                self.num_eager += _is_whole(event.piece)
            case events.PieceLoaded():
                if self._loading[event.piece]:
                    self._loading[event.piece] -= 1
                elif self.num_missed:
                    self.num_found += _is_whole(event.piece)
            case _:
                pass

    def _drop(self, piece: str) -> None:
        """Take one piece of a name off those that run."""
        for running in self.running:
            if running.piece == piece:
                self.running = tuple(other for other in self.running if other is not running)
                return

    @property
    def num_left(self) -> int:
        """How many pieces are still to be compiled, or to be found."""
        done = self.num_compiled + self.num_eager + self.num_found
        return max(0, self.num_missed - done)

    @property
    def is_over(self) -> bool:
        """Whether all that had to be compiled is."""
        return bool(self.num_missed) and not self.num_left and not self.running

    def headline(self, now: float) -> str:
        """Say how far it is, in one sentence."""
        parts = [self.stage]
        if self.num_pieces is not None:
            in_cache = max(0, self.num_pieces - self.num_missed) + self.num_found
            if self.stage == "compiling":
                parts.append(f"{self.num_pieces - self.num_left} of {self.num_pieces} pieces done")
                parts += [f"{in_cache} from cache"] if in_cache else []
            parts += [f"{self.num_eager} eager"] if self.num_eager else []
        parts.append(f"{now - self.started:.0f} s")
        return (f"{self.model}: " if self.model else "") + ", ".join(parts)


class ProgressListener:
    """A listener that shows how far compiling a model is; safe to use from several threads.

    Args:
        is_enabled: `False` shows nothing. Where there is no terminal, `True` begins with a line at
            once, `None` when there was nothing to see for `interval_s`.
        stream: Where to; stderr as it is at each line, if left out.
        clock: Seconds that only grow.
        interval_s: Least time between two plain lines.
        limit_s: How long a piece may take; shown beside how long it did.
    """

    def __init__(
        self,
        is_enabled: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 10.0,
        limit_s: float | None = None,
    ) -> None:
        self._is_enabled = is_enabled
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._limit_s = limit_s
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._state: State | None = None  # Of the start that is shown.
        self._live: Any = None  # A rich Live, on a terminal.
        self._ended = threading.Event()
        self._last_line = 0.0
        self._has_shown = False

    def __call__(self, event: Event) -> None:
        """Follow one event."""
        if self._is_enabled is False:
            return
        if os.getpid() != self._pid:
            self._begin()  # In a fork: what the parent shows is the parent's.
        with self._lock:
            match event:
                case events.ModelReady():
                    self._end(f"{event.model}: {describe_ready(event)}")
                case events.CaptureFailed() | events.ModelReleased() | events.StartBrokenOff():
                    self._end()
                case events.FellBack(piece=None) if event.reason.code not in _NO_END:
                    self._end()
                case (
                    events.AssemblyMissed()
                    | events.CaptureFinished()
                    | events.PlanMade()
                    | events.CompileStarted()
                ):
                    state = self._state or self._start()
                    if isinstance(event, events.PlanMade):  # Another one: counts from nothing.
                        state = self._state = State(state.started)
                    state.take(event, self._clock())
                    self._show()
                case _ if self._state is not None:
                    self._state.take(event, self._clock())
                    self._show()
                case _:
                    pass

    def _start(self) -> State:
        now = self._clock()
        self._state = State(now)
        self._has_shown = False
        # A person who asked should see at once why nothing else happens.
        self._last_line = now - self._interval_s if self._is_enabled or self._is_terminal() else now
        self._live = self._open_live()
        if self._live is None:
            ended = self._ended = threading.Event()
            threading.Thread(
                target=self._tick, args=(ended,), name="precast-progress", daemon=True
            ).start()
        return self._state

    def _end(self, last_words: str | None = None) -> None:
        if self._state is None:
            return
        self._stop_showing()
        self._state = None
        if last_words is not None and self._has_shown:
            self._write(last_words)

    def _stop_showing(self) -> None:
        self._ended.set()
        if self._live is not None:
            self._has_shown = True
            atexit.unregister(self._live.stop)
            self._live.stop()
            self._live = None

    def _tick(self, ended: threading.Event) -> None:
        """Write on while no event comes: a piece may take minutes."""
        while not ended.wait(self._interval_s):
            with contextlib.suppress(OSError, ValueError), self._lock:
                if not ended.is_set():
                    self._show()

    def _show(self) -> None:
        """Write a line if it is time for one; a live display draws itself."""
        state, now = self._state, self._clock()
        if state is None:
            return
        if state.is_over:  # What is left takes milliseconds, and may come without a word.
            self._stop_showing()
        # The ticker wakes up on time, give or take a little.
        elif self._live is None and now - self._last_line >= 0.99 * self._interval_s:
            self._last_line = now
            self._write(self._line(state, now))

    def _write(self, line: str) -> None:
        self._has_shown = True
        self._output().write(f"precast: {line}\n")
        self._output().flush()

    def _line(self, state: State, now: float) -> str:
        running = [f"{r.piece} {self._time_of(r, now)}" for r in state.running[:_MOST_ROWS]]
        more = len(state.running) - _MOST_ROWS
        running += [f"{more} more"] if more > 0 else []
        return "; ".join(filter(None, (state.headline(now), ", ".join(running))))

    def _time_of(self, running: Running, now: float) -> str:
        limit = "" if self._limit_s is None else f" of {self._limit_s:.0f} s"
        seconds = f"{now - running.since:.0f}"
        return seconds + (limit or " s")

    def _is_terminal(self) -> bool:
        return self._output().isatty()

    def _output(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stderr

    def _open_live(self) -> Any:
        """Start rich's live display; None where rich or the terminal is missing."""
        if not self._is_terminal():
            return None
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.progress_bar import ProgressBar
            from rich.spinner import Spinner
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            return None
        from rich.errors import LiveError

        spinner = Spinner("dots")

        def render() -> Any:
            # From rich's thread, again and again: the seconds go on. Takes no lock, since rich
            # holds its own meanwhile, and whoever ends the display holds ours.
            state, now = self._state, self._clock()
            table = Table.grid(padding=(0, 1))
            if state is None:
                return table
            spinner.update(text=Text(f"precast: {state.headline(now)}"))
            rows = Table.grid(padding=(0, 1))
            running = state.running
            for piece in running[:_MOST_ROWS]:
                limit, seconds = self._limit_s, now - piece.since
                bar = "" if limit is None else ProgressBar(limit, min(seconds, limit), width=20)
                cells = Text(f"  {piece.piece}"), Text(piece.compiler), bar
                rows.add_row(*cells, Text(self._time_of(piece, now)))
            if len(running) > _MOST_ROWS:
                rows.add_row(Text(f"  and {len(running) - _MOST_ROWS} more"))
            table.add_row(spinner)
            table.add_row(rows)
            return table

        live = Live(
            console=Console(file=self._output()),
            get_renderable=render,
            refresh_per_second=8,
            transient=True,
        )
        try:
            live.start()
        except LiveError:  # The program shows a live display of its own.
            return None
        atexit.register(live.stop)  # After Ctrl-C, say: it gives the cursor back.
        return live


def _is_whole(piece: str) -> bool:
    """Whether a piece is one of the plan, and no part of one that was too large."""
    return _PART not in piece
