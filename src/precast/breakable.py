"""Threads that end before the interpreter does, and work of theirs that is broken off for it.

The interpreter ends a daemon thread where that next asks for Python's lock. In the middle of
torch's C++ code this ends the process with SIGABRT instead, and not with its own exit code. Such
code runs, too, where the last reference to a tensor goes, be it after the thread's function
returned. So whichever thread has tensors is started here, and the process waits for its end.

For the end of a process alone: nobody knows in what state this leaves what was broken off.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable

#: How long the end of a process waits at most: for one operator, say, which is not broken off.
PATIENCE_S = 10.0

# It may be lost: in a `finally`, or to who catches everything. Then it is raised once more.
_AGAIN_S = 0.1


class BrokenOffError(BaseException):
    """Raised in the thread. Not an `Exception`, which the code that runs may take for its own."""


class Breakable:
    """What one thread does within `with breakable:`, and another may break off.

    `is_over` says whether it was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: int | None = None
        self.is_over = False
        self._pid = os.getpid()

    def __enter__(self) -> None:
        with self._lock:
            if self.is_over:
                raise BrokenOffError
            self._inside = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside = None

    @property
    def is_inside(self) -> bool:
        """Whether the thread is within such a block now."""
        return self._inside is not None

    def break_off(self, patience_s: float = PATIENCE_S) -> None:
        """Have the thread leave, and let it in no more; return when it is out, or patience is."""
        if os.getpid() != self._pid:
            return  # A fork: it has no such thread.
        deadline = time.monotonic() + patience_s
        while True:
            with self._lock:  # It stays inside meanwhile.
                self.is_over = True
                if self._inside is None or time.monotonic() > deadline:
                    return
                _raise_in(self._inside)
            time.sleep(_AGAIN_S)


class EndingThread(threading.Thread):
    """A daemon thread that may have tensors, and is ended at exit if it lives then."""

    def __init__(
        self,
        work: Callable[..., None],
        *args: object,
        name: str,
        end: Callable[[threading.Thread], None],
    ) -> None:
        """Start nothing yet.

        Args:
            work: What it does. It may be broken off.
            *args: What that is called with.
            name: Of the thread.
            end: Given the thread, ends it, and waits for that while there is hope. Does not refer
                to what has the thread, which would live on with it.
        """
        super().__init__(target=work, args=args, name=name, daemon=True)
        self._end = end

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is about to end.
        """
        super().start()
        if not _started:
            atexit.register(_end_all)
        _started.add(self)

    def run(self) -> None:
        """Do the work."""
        with contextlib.suppress(BrokenOffError):
            super().run()

    def end(self) -> None:
        """Let it end, before the interpreter does."""
        self._end(self)


# None of them is kept: one that runs is kept by Python, until its very last step.
_started: weakref.WeakSet[EndingThread] = weakref.WeakSet()


def _end_all() -> None:
    for thread in list(_started):
        if thread.is_alive():  # In a fork none is.
            thread.end()


def _raise_in(thread_id: int) -> None:
    import ctypes  # Late: whoever only serves does not need it.

    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(BrokenOffError)
    )
