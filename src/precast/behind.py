"""Giving way: a thread that works behind calls pauses between its steps, and calls get their turn.

Python's lock goes from thread to thread in any case; but each of a call's operators gives it up,
and waits for it again up to five milliseconds while another thread computes. Ten steps in a row
are then one call's wait, and with pauses between them a part of ten calls'.
"""

from __future__ import annotations

import sys
import threading
import time

#: Of such a thread, for the operating system as well: compiled code asks for it where it loads a
#: GPU's kernels (`compilers/wrapper_build.py`). At most 15 characters.
NAME = "precast-behind"
_PAUSE_S = 0.01
_PR_SET_NAME = 15

_own = threading.local()


def work_behind() -> None:
    """Let the current thread give way from now on."""
    _own.is_behind = True
    if sys.platform != "linux":
        return
    import ctypes  # Late: whoever only serves does not need it.
    from contextlib import suppress

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)


def give_way() -> None:
    """Pause for a moment, in a thread that works behind calls; else do nothing."""
    if getattr(_own, "is_behind", False):
        time.sleep(_PAUSE_S)
