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
from collections.abc import Callable

#: How long the end of a process waits at most, for all threads: one operator is not broken off.
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
        end: Callable[[float], None],
    ) -> None:
        """Start nothing yet.

        Args:
            work: What it does. It may be broken off.
            *args: What that is called with.
            name: Of the thread.
            end: Lets it end, wherever it is; may wait for that as many seconds as it is given.
        """
        super().__init__(target=work, args=args, name=name, daemon=True)
        self._end: Callable[[float], None] | None = end

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is about to end.
        """
        for thread in list(_started):
            if not thread.is_alive() and thread.ident is not None:
                _started.discard(thread)
        _started.add(self)  # Before: whoever starts it may be interrupted.
        try:
            super().start()
        except RuntimeError:
            _started.discard(self)
            raise

    def run(self) -> None:
        """Do the work."""
        try:
            with contextlib.suppress(BrokenOffError):
                super().run()
        finally:
            self._end = None  # And what it refers to, while the thread is waited for.

    def end(self, patience_s: float) -> None:
        """Let it end, and wait for that so long at most, as far as it is known how."""
        if (end := self._end) is not None:
            end(patience_s)


# Not by weak references: these are gone before what the thread itself has.
_started: set[EndingThread] = set()


@atexit.register
def _end_all() -> None:
    deadline = time.monotonic() + PATIENCE_S
    interrupted: BaseException | None = None
    # In a fork none of its parent's lives, but for the one that forked.
    threads = [
        it for it in list(_started) if it.is_alive() and it is not threading.current_thread()
    ]
    for step in (EndingThread.end, EndingThread.join):
        for thread in threads:
            try:
                step(thread, max(0.0, deadline - time.monotonic()))
            except BaseException as error:  # noqa: BLE001 - the others are to end all the same.
                interrupted = interrupted or error
    if interrupted is not None:
        raise interrupted


def _raise_in(thread_id: int) -> None:
    import ctypes  # Late: whoever only serves does not need it.

    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(BrokenOffError)
    )
