"""One process does what several miss at once, and the others wait for it.

Under leases, which save work and are never needed: whoever has waited for long enough does it too.
What the work is, is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from precast.behind import give_way
from precast.events import Emit, LeaseAwaited

if TYPE_CHECKING:
    from precast.cache.lease import Leases
    from precast.compilers.job import JobResult
    from precast.on_miss.miss import Miss

# Between two looks at what another process does: growing, so that few seconds are lost on
# short work and few requests are made for long one.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0

ResultT = TypeVar("ResultT")


class MissesInTurn(Protocol):
    """What is done with the misses of one call, told by `Turns.share` what is whose turn."""

    def is_open(self) -> bool:
        """Whether there is still somebody who waits for the results."""
        ...

    def call_off(self, miss: Miss) -> None:
        """Let a miss be: it is not open any more."""

    def look(self, miss: Miss) -> bool:
        """Take what another process has made of a miss; return whether there was anything."""
        ...

    def waits_in_vain(self, miss: Miss) -> bool:
        """Whether what another process makes of a miss would be of no use."""
        ...

    def start(self, miss: Miss) -> Future[JobResult]:
        """Start the work."""
        ...

    def finish(self, miss: Miss, future: Future[JobResult], still_ours: Callable[[], bool]) -> None:
        """Take what came of the work; `still_ours` tells whether nobody took the lease from us."""


class Turns:
    """Takes turns with other processes, for as long as a limit allows."""

    def __init__(
        self,
        open_leases: Callable[[], Leases],
        limit_s: float,
        emit: Emit,
        clock: Callable[[], float],
    ) -> None:
        """Open nothing yet.

        Args:
            open_leases: Opens the leases of the tiers.
            limit_s: Who has waited so long does the work.
            emit: Is told what was waited for.
            clock: Seconds that only go forward.
        """
        self._open_leases = open_leases
        self._limit_s = limit_s
        self._emit = emit
        self._clock = clock

    @contextmanager
    def take(
        self,
        work: str,
        *,
        has_failed: Callable[[], bool],
        is_new: Callable[[], bool],
        look: Callable[[], ResultT | None],
        is_in_vain: Callable[[], bool],
    ) -> Iterator[ResultT | None]:
        """Let one process at a time do a piece of work; yield what another one made of it.

        Inside the block the work is ours to do if None was yielded: under its lease, unless it has
        been waited for too long or is known to leave nothing that others could use.

        Args:
            work: Names the work: a key of the cache.
            has_failed: Whether it is known to leave nothing.
            is_new: Whether there is something that was not there before; asked again and again.
            look: Looks for the result; None: it is not there.
            is_in_vain: Whether what others leave would be of no use.
        """
        with self._open_leases() as leases:
            waiting = _Waiting(self._limit_s, self._emit, self._clock)
            while True:
                if has_failed():
                    found, is_ours = None, True  # All at once, since waiting gives nothing.
                else:
                    is_ours = leases.try_acquire(work)
                    # What was waited for may have taken the place of what was there before.
                    found = look() if is_new() or (is_ours and waiting.has_begun) else None
                if found is not None or is_ours or is_in_vain() or waiting.is_over:
                    break
                time.sleep(waiting.next_pause())
            waiting.report(work, is_found=found is not None, is_ours=is_ours)
            if found is not None:
                leases.release(work)
            yield found

    def share(self, misses: Iterable[Miss], task: MissesInTurn) -> None:
        """Do the work whose leases are free, and meanwhile wait for that of others.

        Nobody keeps a lease while waiting for another one, except for what it does itself: so
        processes that miss the same pieces in any order do not block each other.
        """
        with self._open_leases() as leases:
            waiting_for = {miss.number: miss for miss in misses}
            running: dict[Future[JobResult], Miss] = {}
            waiting = _Waiting(self._limit_s, self._emit, self._clock)
            while waiting_for or running:
                if not task.is_open():
                    for miss in waiting_for.values():
                        task.call_off(miss)
                    waiting_for.clear()
                for miss in list(waiting_for.values()):
                    is_ours = leases.try_acquire(miss.work)
                    # Another one may have published it after we looked and before the lease was
                    # ours.
                    is_found = task.look(miss)
                    is_in_vain = task.waits_in_vain(miss) or waiting.is_over
                    if not (is_found or is_ours or is_in_vain):
                        continue
                    del waiting_for[miss.number]
                    waiting.report(miss.work, is_found=is_found, is_ours=is_ours)
                    if is_found:
                        leases.release(miss.work)
                    else:
                        give_way()
                        running[task.start(miss)] = miss
                pause = waiting.next_pause()
                if running:
                    # Not for ever: nobody may wait for the results any more.
                    for future in wait(running, timeout=pause, return_when=FIRST_COMPLETED).done:
                        miss = running.pop(future)
                        task.finish(miss, future, partial(leases.still_holds, miss.work))
                        leases.release(miss.work)
                elif waiting_for:
                    time.sleep(pause)


class _Waiting:
    """How long has been waited for others, and how long to pause next."""

    def __init__(self, limit_s: float, emit: Emit, clock: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._emit = emit
        self._clock = clock
        self._started = clock()
        self._pause_s = 0.0

    @property
    def has_begun(self) -> bool:
        return self._pause_s > 0

    @property
    def is_over(self) -> bool:
        return self._clock() - self._started >= self._limit_s

    def next_pause(self) -> float:
        self._pause_s = min(max(_FIRST_PAUSE_S, self._pause_s * 1.5), _LONGEST_PAUSE_S)
        return self._pause_s

    def report(self, work: str, *, is_found: bool, is_ours: bool) -> None:
        """Tell what came of waiting, if there was any."""
        if self.has_begun:
            outcome = "found" if is_found else "taken over" if is_ours else "gave up"
            self._emit(LeaseAwaited(work, self._clock() - self._started, outcome))
