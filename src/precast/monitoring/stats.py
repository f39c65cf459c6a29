# ruff: noqa: PTH102, PTH108, PTH116, PTH118, PTH120, PTH123, PTH208
# PTH: `pathlib` costs a warm start a millisecond to import and more to use.
"""What the cache did over all processes: a line for each start, in a file for each day.

`StatsListener` folds events into counts and appends them as one line of JSON when a model is
ready, gives up or is released, and at exit; `docs/format.md` describes the line. Writing takes no
locks, and what cannot be written is not: statistics never stop or delay a model. Calls of a ready
model emit no events and cost nothing here.

`read_stats` and `add_up` are for whoever shows them. Nothing here knows tiers or keys.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from precast import __version__, events
from precast.events import Event

#: Stands in every line; a reader skips lines of another format.
FORMAT = 1

#: A day's file is removed when it is as old as that.
KEPT_DAYS = 90

#: A day's file that is larger is left as it is: statistics have a bound, too.
MAX_FILE_BYTES = 8 << 20

_INTERVAL_S = 60.0  # Between two lines of one busy model.
_MOST_MISSES = 16  # Explained in one line.
_DAY_S = 24 * 3600.0
_OTHERS_WRITE = 0o022

#: Finds for each missed thing why it was missed, as `cause`, `nearest` and `differs`.
Explain = Callable[["list[dict[str, Any]]"], None]


class StatsListener:
    """A listener that keeps counts of one compiled model and appends them to a day's file.

    Safe to use from several threads. What was counted and not written is written when the last
    user of the listener is gone, or at exit.
    """

    def __init__(
        self,
        folder: str,
        explain: Explain,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Write nothing yet.

        Args:
            folder: Where the days' files lie. It is made when the folder that holds it is there
                and this user's own: where nothing was ever cached there is nothing to tell.
            explain: Adds to each miss why it was one. Called before a line is written, outside
                any lock; misses have `kind`, `name`, `key`, `parts` and `problem`.
            clock: Seconds that only grow.
            now: Seconds since 1970.
        """
        self._tally = _Tally(folder, explain, clock, now)
        self._write_at_end = weakref.finalize(self, self._tally.write)

    def __call__(self, event: Event) -> None:
        """Count one event; write where it ends a start or a model."""
        self._tally.count(event)
        match event:
            case events.ModelReady() | events.ModelReleased() | events.FellBack(piece=None):
                self._tally.write()
            case _:
                self._tally.write_if_due()


class _Tally:
    """The counts of a listener that are not written yet."""

    def __init__(
        self, folder: str, explain: Explain, clock: Callable[[], float], now: Callable[[], float]
    ) -> None:
        self._folder = folder
        self._explain = explain
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._written_at = clock()
        self._counts: dict[tuple[str, ...], float] = {}
        self._misses: list[dict[str, Any]] = []
        # What is looked up again is no second hit or miss.
        self._found: set[str] = set()
        self._missed: set[str] = set()
        self._is_broken = False

    def count(self, event: Event) -> None:
        self._forget_parents_counts()
        with self._lock:
            self._fold(event)

    def _fold(self, event: Event) -> None:
        match event:
            case events.CacheHit(key=key, tier=tier):
                if key not in self._found:
                    self._found.add(key)
                    self._add(("hits", tier, "count"), 1)
                    self._add(("hits", tier, "bytes"), event.num_bytes)
                    self._add(("hits", tier, "seconds"), event.seconds)
            case events.PieceMissed():
                self._miss("piece", event.piece, event.key, event.parts, None)
            case events.AssemblyMissed():
                self._miss("assembly", event.model, event.key, event.parts, event.problem)
            case events.PieceLoaded():
                self._add(("loads", "count"), 1)
                self._add(("loads", "seconds"), event.seconds)
            case events.PieceCompiled():
                self._add(("compiles", "count"), 1)
                self._add(("compiles", "seconds"), event.seconds)
                self._add(("compiles", "bytes"), event.artifact_bytes)
            case events.ArtifactPublished(tier=tier):
                self._add(("published", tier, "count"), 1)
                self._add(("published", tier, "bytes"), event.num_bytes)
            case events.ModelReady():
                kind = "warm" if event.warm else "cold"
                self._add(("starts", kind, "count"), 1)
                self._add(("starts", kind, "seconds"), event.seconds)
                self._add(("seconds_saved",), event.seconds_saved)
            case (
                events.CaptureFailed(reason=reason)
                | events.PieceFailed(reason=reason)
                | events.VerifyMismatched(reason=reason)
                | events.TierFailed(reason=reason)
                | events.ArtifactQuarantined(reason=reason)
                | events.ArtifactRefused(reason=reason)
                | events.AssemblyRejected(reason=reason)
                | events.CallOutsideContract(reason=reason)
                | events.FellBack(reason=reason)
            ):
                self._add(("reasons", reason.code), 1)
            case events.AssemblyRevalidated(is_valid=is_valid):
                self._add(("second_looks", "valid" if is_valid else "stale"), 1)
            case _:
                pass

    def _add(self, path: tuple[str, ...], amount: float) -> None:
        self._counts[path] = self._counts.get(path, 0) + amount

    def _miss(
        self, kind: str, name: str, key: str, parts: Mapping[str, Any], problem: str | None
    ) -> None:
        if key not in self._missed:
            self._missed.add(key)
            self._misses.append(
                {"kind": kind, "name": name, "key": key, "parts": parts, "problem": problem}
            )

    def _forget_parents_counts(self) -> None:
        """In a fork, begin anew: what was counted before it is the parent's to write."""
        if os.getpid() != self._pid:
            self._pid = os.getpid()
            self._lock = threading.Lock()  # A thread that is not here may hold the other.
            self._counts, self._misses = {}, []

    def write_if_due(self) -> None:
        if self._clock() - self._written_at >= _INTERVAL_S:
            self.write()

    def write(self) -> None:
        """Append what was counted since the last time, if anything was."""
        self._forget_parents_counts()
        with self._lock:
            self._written_at = self._clock()
            counts, misses = self._counts, self._misses
            self._counts, self._misses = {}, []
        if self._is_broken or not (counts or misses):
            return
        try:
            _append(self._folder, self._line(counts, misses), self._now())
        except OSError:
            self._is_broken = True  # Read-only, full: neither worth a word nor another try.

    def _line(
        self, counts: dict[tuple[str, ...], float], misses: list[dict[str, Any]]
    ) -> dict[str, Any]:
        if misses:
            self._explain(misses)
        for miss in misses:
            path = ("misses", miss["kind"], miss.get("cause", "not explained"))
            counts[path] = counts.get(path, 0) + 1
        return {
            "format": FORMAT,
            "precast": __version__,
            "at": round(self._now(), 3),
            "pid": os.getpid(),
            "counts": _nested(counts),
            "misses": [
                {name: value for name, value in miss.items() if name != "parts"}
                for miss in misses[:_MOST_MISSES]
            ],
        }


def _nested(counts: Mapping[tuple[str, ...], float]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, amount in counts.items():
        place = tree
        for step in path[:-1]:
            place = place.setdefault(step, {})
        place[path[-1]] = round(amount, 6)
    return tree


def _append(folder: str, line: Mapping[str, Any], now_s: float) -> None:
    """Append one line to the file of a day.

    In one write, which is whole among those of other processes. It begins with a line feed, so
    that the half line of a process that was killed spoils nothing but itself.

    Raises:
        OSError: It could not be written.
    """
    bucket = os.stat(os.path.dirname(folder))
    if bucket.st_uid != os.getuid() or bucket.st_mode & _OTHERS_WRITE:
        raise PermissionError(f"{folder} could be changed by others")
    data = b"\n" + json.dumps(line, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path = os.path.join(folder, f"{_day(now_s)}.jsonl")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, flags, 0o600)
    except FileNotFoundError:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        file = os.open(path, flags, 0o600)
    try:
        num_bytes = os.fstat(file).st_size
        if num_bytes < MAX_FILE_BYTES:
            os.write(file, data)
    finally:
        os.close(file)
    if num_bytes == 0:  # The day's first line.
        oldest = f"{_day(now_s - KEPT_DAYS * _DAY_S)}.jsonl"
        for name in _day_files(folder):
            if name < oldest:
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def read_stats(folder: str, since_s: float = 0.0) -> Iterator[dict[str, Any]]:
    """Iterate over the lines written since a time, oldest day first; none where no file is.

    Lines that are not whole, or of another format, are skipped.

    Raises:
        OSError: The folder is there and cannot be read.
    """
    for name in _day_files(folder):
        if name < f"{_day(since_s)}.jsonl":
            continue
        try:
            with open(os.path.join(folder, name), "rb") as file:
                lines = file.read().splitlines()
        except (FileNotFoundError, IsADirectoryError):
            continue  # Removed meanwhile, being too old; or not ours at all.
        for line in lines:
            found = _read_line(line)
            if found is not None and found["at"] >= since_s:
                yield found


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_sound = (
        isinstance(found, dict)
        and found.get("format") == FORMAT
        and isinstance(found.get("at"), int | float)
        and isinstance(found.get("counts"), dict)
        and isinstance(found.get("misses"), list)
        and all(isinstance(miss, dict) for miss in found["misses"])
    )
    return found if is_sound else None


def add_up(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of the counts of lines, nested as they are."""
    total: dict[str, Any] = {}
    for line in lines:
        _add_into(total, line["counts"])
    return total


def _add_into(total: dict[str, Any], counts: Mapping[str, Any]) -> None:
    for name, value in counts.items():
        known = total.get(name)
        if isinstance(value, dict) and (known is None or isinstance(known, dict)):
            _add_into(total.setdefault(name, {}), value)
        elif isinstance(value, int | float) and not isinstance(known, dict):
            total[name] = (known or 0) + value


def _day(now_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now_s))


def _day_files(folder: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if len(name) == 16 and name.endswith(".jsonl"))
