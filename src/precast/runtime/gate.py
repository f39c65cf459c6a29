"""Lets one thread in alone, between the calls of a model's eager code.

Tracing patches `nn.Module` for the whole process while it runs: eager calls in other threads would
fail. `with gate:` is around each eager call, `gate.alone(...)` around what must not meet one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 0.1
_FIRST_PATIENCE_S = 0.5
_MOST_PATIENCE_S = 4.0
_PAUSES = 4  # Times the patience of a try that failed: calls are held up a fifth of the time.


class HeldUp:
    """For how long calls were held up: together, a moment once however many, and at a time."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self.longest_s = 0.0

    def add(self, seconds: float) -> None:
        """Note that calls were held up once more."""
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)


class _Crowd:
    """Calls that are inside, of those that came at about the same time."""

    num_inside = 0


class CallGate:
    """Many calls at once, or one thread alone. A call within a call is always let in."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._crowd = _Crowd()  # Of the calls that come now.
        self._num_inside = 0
        self._is_shut = False
        self._shuts_after: _Crowd | None = None
        self._held_since: float | None = None
        self._own = threading.local()

    def __enter__(self) -> None:
        depth = getattr(self._own, "depth", 0)
        if not depth:
            with self._condition:
                while self._is_shut:
                    if self._held_since is None:
                        self._held_since = time.monotonic()
                    self._condition.wait()
                self._own.crowd = crowd = self._crowd
                crowd.num_inside += 1
                self._num_inside += 1
        self._own.depth = depth + 1

    def __exit__(self, *_: object) -> None:
        self._own.depth -= 1
        if not self._own.depth:
            crowd: _Crowd = self._own.crowd
            with self._condition:
                crowd.num_inside -= 1
                self._num_inside -= 1
                # Here, and not by who waits for it: this thread's next call would be inside again.
                if crowd is self._shuts_after and not crowd.num_inside:
                    self._is_shut = True
                self._condition.notify_all()

    @contextmanager
    def alone(self, is_called_off: Callable[[], bool]) -> Iterator[HeldUp | None]:
        """Wait for the calls inside to end and let none in meanwhile; yields None if called off.

        What is yielded says afterwards for how long calls were held up, tries that failed too. The
        calls that are inside at first hold nobody up: those that come meanwhile are let in until
        all of them have ended. Where one of these does not end soon either, the others are let in
        again, and after a pause it is tried anew, with more patience.
        """
        held = HeldUp()
        patience_s = _FIRST_PATIENCE_S
        try:
            while not self._try_to_shut(patience_s, is_called_off):
                self._open(held)
                self._pause(_PAUSES * patience_s, is_called_off)
                if is_called_off():
                    break
                patience_s = min(2 * patience_s, _MOST_PATIENCE_S)
            yield None if is_called_off() else held
        finally:
            self._open(held)

    def _try_to_shut(self, patience_s: float, is_called_off: Callable[[], bool]) -> bool:
        with self._condition:
            crowd, self._crowd = self._crowd, _Crowd()
            self._shuts_after = crowd
            self._is_shut = not crowd.num_inside
            while not self._condition.wait_for(lambda: self._is_shut, _POLL_S):
                if is_called_off():
                    return False
            deadline = time.monotonic() + patience_s
            while not self._condition.wait_for(lambda: not self._num_inside, _POLL_S):
                if is_called_off() or time.monotonic() > deadline:
                    return False
        return True

    def _open(self, held: HeldUp) -> None:
        with self._condition:
            if self._held_since is not None:
                held.add(time.monotonic() - self._held_since)
                self._held_since = None
            self._is_shut = False
            self._shuts_after = None
            self._condition.notify_all()

    @staticmethod
    def _pause(seconds: float, is_called_off: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not is_called_off() and time.monotonic() < end:
            time.sleep(_POLL_S)
