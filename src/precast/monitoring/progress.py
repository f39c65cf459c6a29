"""Compile progress on stderr: a live line on a terminal with rich, else a line every 10 s.

Shows nothing before something is really being compiled, so that a warm start stays silent.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from precast import events

if TYPE_CHECKING:
    from collections.abc import Callable

    from precast.events import Event


class ProgressListener:
    """A listener that shows which pieces are compiling; safe to use from several threads.

    Args:
        is_enabled: `False` shows nothing, `None` shows it on a terminal only.
        stream: Where to; stderr as it is at each line, if left out.
        clock: Seconds that only grow.
        interval_s: Least time between two plain lines.
    """

    def __init__(
        self,
        is_enabled: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 10.0,
    ) -> None:
        self._is_enabled = is_enabled
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._lock = threading.Lock()
        # Names, in order of starting: the key is not settled before a compiler is.
        self._running: list[str] = []
        self._num_done = 0
        self._started = 0.0
        self._last_line = 0.0
        self._live: Any = None  # A rich Live while compiling on a terminal.

    def __call__(self, event: Event) -> None:
        """Follow one event."""
        if self._is_enabled is False:
            return
        with self._lock:
            match event:
                case events.CompileStarted():
                    self._begin(event)
                case events.PieceCompiled() | events.PieceFailed() | events.PieceSplit():
                    if event.piece in self._running:
                        self._running.remove(event.piece)
                        self._num_done += 1
                        self._show()
                case events.ModelReady() | events.CaptureFailed() | events.ModelReleased():
                    self._end()
                case _:
                    pass

    def _begin(self, event: events.CompileStarted) -> None:
        if not self._running and not self._num_done:
            # The first line comes at once: a person should see why nothing else happens.
            self._started = self._clock()
            self._last_line = self._started - self._interval_s
            self._live = self._open_live()
        if event.piece not in self._running:  # Else: another compiler tries the same piece.
            self._running.append(event.piece)
        self._show()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None
        self._running.clear()
        self._num_done = 0

    def _show(self) -> None:
        now = self._clock()
        if self._live is not None:
            self._live.refresh()
        elif now - self._last_line >= self._interval_s and self._is_shown_plainly():
            self._last_line = now
            self._output().write(self._line() + "\n")
            self._output().flush()

    def _line(self) -> str:
        names = ", ".join(self._running)
        line = f"precast: {self._num_done} pieces done, {self._clock() - self._started:.0f} s"
        return line + (f"; compiling {names}" if names else "")

    def _is_shown_plainly(self) -> bool:
        return self._is_enabled is True or self._is_terminal()

    def _is_terminal(self) -> bool:
        return self._output().isatty()

    def _output(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stderr

    def _open_live(self) -> Any:
        """Start rich's live line; None where rich or the terminal is missing."""
        if not self._is_terminal():
            return None
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner
        except ImportError:
            return None
        from rich.errors import LiveError

        spinner = Spinner("dots")

        def render() -> Spinner:
            spinner.update(text=self._line())  # Drawn again and again: the seconds go on.
            return spinner

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
        return live
