"""Work of a thread that is broken off when the interpreter ends, whatever it is in the middle of.

The interpreter ends a daemon thread where that next asks for Python's lock. In the middle of
torch's C++ code this ends the process with SIGABRT instead, and not with its own exit code. So
who runs such code in a thread has it broken off before, and the process waits for that.

For the end of a process alone: nobody knows in what state this leaves what was broken off.
"""

from __future__ import annotations

import os
import threading
import time

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


def _raise_in(thread_id: int) -> None:
    import ctypes  # Late: whoever only serves does not need it.

    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(BrokenOffError)
    )
