"""`Recorder`: what happened around one model and when, cheap enough to be always on.

Events happen around starts and not at calls, so that a served model costs nothing here; what it
keeps is bounded. `recording.py` makes data of it that can be written, and `report/` a page.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque

from precast.events import Event, ModelReady

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable

#: So many events are kept from the beginning, and as many of the last ones.
MOST_EVENTS = 2000

_MOST_SAMPLES = 32


class Recorder:
    """A listener that keeps events with their times. Safe to use from several threads.

    Every compiled model has one of its own. As one of `listeners` it is the user's:

        recorder = Recorder()
        precast.compile(model, listeners=[recorder])
        recorder.save("start.json")  # for `precast report`: the events alone

    It takes no lock: a process that is forked meanwhile goes on with what was kept.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, now: Callable[[], float] = time.time
    ) -> None:
        """Begin to record.

        Args:
            clock: Seconds that only grow.
            now: Seconds since 1970, asked once.
        """
        self.opened_at = now()
        self._clock = clock
        self._opened = clock()
        self._first: list[tuple[float, Event]] = []
        self._last: deque[tuple[float, Event]] = deque(maxlen=MOST_EVENTS)
        self._counter = itertools.count()
        self.num_events = 0
        self._memory: list[tuple[float, int | None]] = [(0.0, resident_bytes())]

    def __call__(self, event: Event) -> None:
        """Keep one event."""
        entry = (self._clock() - self._opened, event)
        self.num_events = next(self._counter) + 1
        # Appending is one step; that two threads both take the last place does no harm.
        (self._first if len(self._first) < MOST_EVENTS else self._last).append(entry)
        if type(event) is ModelReady and len(self._memory) < _MOST_SAMPLES:
            self._memory.append((entry[0], resident_bytes()))

    def seconds(self) -> float:
        """Return for how long it has been recording."""
        return self._clock() - self._opened

    def events(self) -> list[tuple[float, Event]]:
        """Return what is kept: seconds since the beginning, and the event."""
        return [*self._first, *self._last]

    @property
    def num_dropped(self) -> int:
        """How many events happened between the first and the last ones that are kept."""
        return max(0, self.num_events - len(self._first) - len(self._last))

    def memory(self) -> list[tuple[float, int | None]]:
        """Return this process's bytes in memory: at the beginning, and whenever it was ready."""
        return list(self._memory)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the events as JSON, for `precast report`.

        Raises:
            RecordingError: The file cannot be written.
        """
        from precast.monitoring.recording import recording_of, write_recording

        write_recording(path, recording_of(self))


def resident_bytes() -> int | None:
    """Return the bytes that this process has in memory, None where the system does not say."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(os.read(file, 256).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
    finally:
        os.close(file)
