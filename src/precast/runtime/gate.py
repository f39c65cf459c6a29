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
_MOST_PATIENCE_S = 30.0


class CallGate:
    """Many calls at once, or one thread alone. A call within a call is always let in."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._num_inside = 0
        self._is_shut = False
        self._depth = threading.local()

    def __enter__(self) -> None:
        depth = getattr(self._depth, "value", 0)
        if not depth:
            with self._condition:
                while self._is_shut:
                    self._condition.wait()
                self._num_inside += 1
        self._depth.value = depth + 1

    def __exit__(self, *_: object) -> None:
        self._depth.value -= 1
        if not self._depth.value:
            with self._condition:
                self._num_inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self, is_called_off: Callable[[], bool]) -> Iterator[bool]:
        """Wait for the calls inside to end and let none in meanwhile; yields False if called off.

        A call that does not end holds nobody up for long: the others are let in again, and later
        it is tried anew, with more patience.
        """
        patience_s = _FIRST_PATIENCE_S
        while not is_called_off() and not self._try_to_shut(patience_s, is_called_off):
            time.sleep(_POLL_S)
            patience_s = min(2 * patience_s, _MOST_PATIENCE_S)
        try:
            yield not is_called_off()
        finally:
            self._open()

    def _try_to_shut(self, patience_s: float, is_called_off: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + patience_s
        with self._condition:
            self._is_shut = True
            while not self._condition.wait_for(lambda: not self._num_inside, _POLL_S):
                if is_called_off() or time.monotonic() > deadline:
                    break
            else:
                return True
        self._open()
        return False

    def _open(self) -> None:
        with self._condition:
            self._is_shut = False
            self._condition.notify_all()
