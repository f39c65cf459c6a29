"""What a compile worker may take from the machine. Mostly called by the worker, on itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

# How much lower the priority of what compiles is: the second where calls are served beside it.
NICE = 5
NICE_BESIDE_CALLS = 10
_PR_SET_PDEATHSIG = 1
_SESSION_TRIES = 100
# A signal that does nothing by default: a thread from before `die_with_parent`, of a BLAS say, may
# be the one that takes it.
_PARENT_IS_GONE = signal.SIGURG


def lower_priority(nice: int) -> None:
    """Give way to serving processes; g++ and other children inherit it.

    Args:
        nice: How much. At 19 a worker starves on a machine that is busy with two cores.
    """
    os.nice(nice)
    if sys.platform != "linux" or os.getsid(0) != os.getpid():
        return
    # Added to the parent's own: 0 mostly, however low the parent's priority is.
    nice = min(19, _nice_of_session(os.getppid()) + nice)
    if _lower_session(nice):
        return

    def try_again() -> None:
        for _ in range(_SESSION_TRIES):
            time.sleep(0.1)
            if _lower_session(nice):
                return

    threading.Thread(target=try_again, name="precast-priority", daemon=True).start()


def _nice_of_session(pid: int) -> int:
    """Return what a process's session has given up of its share of the machine."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return 0


def _lower_session(nice: int) -> bool:
    """Lower the share of the session that we lead; False where it cannot be lowered just now.

    Linux shares cores out among sessions ("autogroup", sched(7)), and `nice` counts within one
    only: in a session of our own we took as much of them as the server.
    """
    try:
        Path("/proc/self/autogroup").write_text(str(nice))
    except BlockingIOError:  # Ten a second on the whole machine, but for administrators.
        return False
    except OSError:
        pass  # A kernel without such groups.
    return True


def gpu_names(numbers: Sequence[int], visible: str | None) -> list[str]:
    """Return GPUs, numbered as this process sees them, as CUDA_VISIBLE_DEVICES names them.

    Args:
        numbers: Of the GPUs.
        visible: The variable as this process has it: names in order, or None for all.
    """
    names = visible.split(",") if visible else None
    return [str(number) if names is None else names[number].strip() for number in numbers]


def limit_memory(num_bytes: int | None) -> None:
    """Let allocations beyond this fail, in this process and in each child of it.

    Counts private memory (RLIMIT_DATA), not address space: torch's libraries and a CUDA context
    reserve many times what they use.
    """
    if num_bytes is None or sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def die_with_parent(parent: int, folder: str | None = None) -> None:
    """End this process, its group and its children when the parent with this process id is gone.

    A thread waits for the kernel's word, on Linux, and looks once a second anyway. Threads that
    start later inherit the mask of signals; an earlier one may take the word and lose it.

    Args:
        parent: Its process id.
        folder: Removed then, with what compilers left there.
    """
    is_told = sys.platform == "linux"
    if is_told:
        signal.pthread_sigmask(signal.SIG_BLOCK, [_PARENT_IS_GONE])
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, _PARENT_IS_GONE, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            # The kernel speaks of the thread that started us; the process may go on.
            if is_told:
                signal.sigtimedwait([_PARENT_IS_GONE], 1.0)
            else:
                time.sleep(1.0)
        from precast.background.usage import processes_of

        for pid in processes_of(os.getpid()) - {os.getpid()}:
            end_process(pid)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.getppid() != parent:  # It ended before we asked to be told.
        os._exit(1)
    threading.Thread(target=watch, name="precast-parent-watch", daemon=True).start()


def end_process(pid: int) -> None:
    """Kill a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
