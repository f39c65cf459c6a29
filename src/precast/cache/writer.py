"""Writes that nobody waits for: one thread, a bounded queue, and a bounded wait at the end.

Shared tiers are far away, and what a process publishes is for others. What is written is decided
by `storage.py` and `layered.py`; this is only the when.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from contextlib import suppress

from precast.errors import StoreError
from precast.events import TierFailed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from precast.events import Emit

#: How long the end of a process, or `precast.release`, waits for writes.
LAST_WAIT_S = 10.0

#: A job holds a manifest at most, blobs are read when their turn comes; see `storage.py`.
MOST_JOBS = 1024


class BackgroundWriter:
    """Does jobs one after the other, in the order in which they came, in a thread of its own.

    The thread lives as long as there are jobs. At the end of the process, they get a last while.
    A fork has no claim to the jobs of its parent.
    """

    def __init__(self, tiers: Collection[str], emit: Emit, *, most_jobs: int = MOST_JOBS) -> None:
        """Start nothing yet.

        Args:
            tiers: Names of those tiers that are written here; others are written at once.
            emit: Is told what could not be written.
            most_jobs: More are refused.
        """
        self.tiers = frozenset(tiers)
        self._emit = emit
        self._most_jobs = most_jobs
        self._jobs: deque[tuple[str, Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._is_running = False
        self._is_closed = False
        self._pid = 0

    def submit(self, tier: str, job: Callable[[], object]) -> None:
        """Have a job done soon; where there is no room for it, that is reported.

        Args:
            tier: The name of the tier that it writes.
            job: Reports its own failures.
        """
        with self._changed:
            if self._pid != os.getpid():  # First use, or first use in a fork.
                self._pid = os.getpid()
                self._jobs.clear()
                self._is_running = False
                _flush_at_exit(self)
            if self._is_closed or len(self._jobs) >= self._most_jobs:
                waiting = "it is closed" if self._is_closed else f"{len(self._jobs)} jobs wait"
            else:
                self._jobs.append((tier, job))
                if not self._is_running:
                    thread = threading.Thread(target=self._run, name="precast-cache-writer")
                    thread.daemon = True  # A tier that hangs must not keep the process.
                    try:
                        thread.start()
                        self._is_running = True
                    except RuntimeError:  # The process is about to end.
                        self._jobs.clear()
                self._changed.notify_all()
                return
        self._report(tier, f"the queue takes no more: {waiting}")

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all is written that was submitted so far; False where time ran out."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._pid == os.getpid() and self._is_running:
                left_s = None if end_s is None else end_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True

    def close(self, timeout_s: float = LAST_WAIT_S) -> None:
        """Wait for a while, then give up, and say so; nothing is taken from then on."""
        with self._changed:
            self._is_closed = True
        self._give_up_after(timeout_s)

    def _give_up_after(self, timeout_s: float) -> None:
        if self.flush(timeout_s):
            return
        with self._changed:
            waiting = [tier for tier, _ in self._jobs]
            self._jobs.clear()
        for tier in sorted(set(waiting)) or sorted(self.tiers):
            self._report(tier, f"writes were not finished within {timeout_s:g} s")

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._is_running = False
                    self._changed.notify_all()
                    return
                tier, job = self._jobs.popleft()
            # Whatever a listener raises that is told: the next job is not to blame.
            with suppress(BaseException):
                try:
                    job()
                except Exception as error:  # noqa: BLE001 - anything that a tier may raise
                    self._report(tier, f"{type(error).__name__}: {error}")

    def _report(self, tier: str, problem: str) -> None:
        failure = StoreError(tier, "write behind", problem)
        self._emit(TierFailed(failure.tier, failure.operation, failure.reason))


def _flush_at_exit(writer: BackgroundWriter) -> None:
    """Give a writer's jobs a while when the process ends.

    As `concurrent.futures` does, and before it does (the last registered is the first called):
    once its threads are forbidden, clients that look up host names in one can write no more.
    """
    import concurrent.futures.thread  # noqa: F401 - so that it has registered itself

    reference = weakref.ref(writer)
    pid = os.getpid()

    def flush() -> None:
        waiting = reference()
        if waiting is not None and os.getpid() == pid:
            waiting._give_up_after(LAST_WAIT_S)

    with suppress(RuntimeError):  # The process is ending already.
        threading._register_atexit(flush)  # type: ignore[attr-defined]
