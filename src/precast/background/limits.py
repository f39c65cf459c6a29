"""What a compile worker may take from the machine. Called by the worker, on itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def lower_priority(nice: int = 5) -> None:
    """Give way to serving processes; g++ and other children inherit it.

    Not lower: at 19 a worker starves on a machine that is busy with two cores.
    """
    os.nice(nice)


def limit_memory(num_bytes: int | None) -> None:
    """Let allocations beyond this fail, in this process and in each child of it.

    Counts private memory (RLIMIT_DATA), not address space: torch's libraries and a CUDA context
    reserve many times what they use.
    """
    if num_bytes is None or sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def peak_bytes() -> int | None:
    """Return the most memory that this process or one of its children has held so far."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit


def die_with_parent(parent: int) -> None:
    """End this process, and its group, when the parent with this process id is gone.

    The kernel does it at once on Linux; elsewhere, and for children, a thread looks once a second.
    The parent must have started this process from a thread that lives as long as it is needed:
    for Linux a thread's end counts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if os.getppid() != parent:  # It ended before we asked to be told.
        os._exit(1)
    threading.Thread(target=watch, name="precast-parent-watch", daemon=True).start()
