"""What a worker and its children take, read from /proc by the parent: memory, time, bytes written.

Where there is no /proc nothing is known, and every figure is None.
"""

from __future__ import annotations

import os
import time

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_MOST_BYTES = 1 << 16  # Of a file in /proc that is read here.

# Whoever samples is a thread beside calls that are served. To find a worker's processes it reads a
# file for each thread that they have, and each read hands Python's lock over and back: five times a
# second that took 4 % of the calls. What is held by those already known is two reads or three. And
# files are read by hand: with pathlib a look around takes six times as long.
_LOOK_AROUND_S = 1.0


class UsageMeter:
    """Measures one worker's job, whatever processes it consists of. `look` is a sample."""

    def __init__(self, pid: int, limit_bytes: int | None = None) -> None:
        """Begin a job.

        Args:
            pid: The worker; the leader of its session.
            limit_bytes: Above it memory is counted exactly, shared pages by their share.
        """
        self._pid = pid
        self._limit_bytes = limit_bytes
        self._known = {pid}
        self.peak_bytes: int | None = None
        self._start_ticks = self._ticks = 0
        self._start_written = self._written = 0
        self._has_io = False
        self._look_around()
        self._start_ticks, self._start_written = self._ticks, self._written

    def look(self, *, is_last: bool = False) -> int | None:
        """Return the bytes that are held now; note them and, once a second or last, the rest."""
        if is_last or time.monotonic() >= self._looked_around + _LOOK_AROUND_S:
            self._look_around()
        held = [_resident_bytes(pid) for pid in self._known]
        found = [number for number in held if number is not None]
        if not found:
            return None
        total = sum(found)
        if self._limit_bytes is not None and total > self._limit_bytes:
            total = sum(_proportional_bytes(pid) or 0 for pid in self._known)
        self.peak_bytes = max(total, self.peak_bytes or 0)
        return total

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time that the job has taken, its children's included."""
        return (self._ticks - self._start_ticks) / _TICKS_PER_S if self._ticks else None

    @property
    def written_bytes(self) -> int | None:
        """Bytes that the job has handed to `write` calls, to files and pipes alike."""
        return self._written - self._start_written if self._has_io else None

    def _look_around(self) -> None:
        self._looked_around = time.monotonic()
        self._known = processes_of(self._pid, self._known)
        ticks = written = 0
        for pid in self._known:
            stat = _stat(pid)
            if stat:
                # Its own, and that of children that it has waited for.
                ticks += sum(map(int, stat[11:15]))
            number = _written_bytes(pid)
            self._has_io |= number is not None
            written += number or 0
        # A process that nobody waited for takes its figures with it.
        self._ticks, self._written = max(ticks, self._ticks), max(written, self._written)


def processes_of(root: int, known: set[int] | None = None) -> set[int]:
    """Return a session leader and all its descendants.

    Args:
        root: The leader's process id.
        known: Processes found before: those whose parent is gone are found by their session.
    """
    found: set[int] = set()
    pending = [root, *(pid for pid in known or () if _session_of(pid) == root)]
    while pending:
        pid = pending.pop()
        if pid in found:
            continue
        found.add(pid)
        threads = f"/proc/{pid}/task"
        try:
            names = os.listdir(threads)  # noqa: PTH208 - see `_LOOK_AROUND_S`.
        except OSError:  # It has ended, or the kernel does not tell.
            continue
        for name in names:
            pending += map(int, _read(f"{threads}/{name}/children").split())
    return found


def _read(path: str) -> str:
    """Return what a file in /proc says; "" where it is gone, or not to be read."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(file, _MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(file)


def _stat(pid: int) -> list[str]:
    """Return the fields of a process after its name; none if it is gone."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _session_of(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[3]) if stat else None


def _resident_bytes(pid: int) -> int | None:
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE_BYTES if fields else None


def _proportional_bytes(pid: int) -> int | None:
    return _field(pid, "smaps_rollup", "Pss:", 1024) or _resident_bytes(pid)


def _written_bytes(pid: int) -> int | None:
    return _field(pid, "io", "wchar:", 1)


def _field(pid: int, file: str, name: str, unit: int) -> int | None:
    for line in _read(f"/proc/{pid}/{file}").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * unit
    return None
