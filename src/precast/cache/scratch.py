# ruff: noqa: PTH102, PTH112, PTH118, PTH208
# PTH: as in `disk.py`, which this extends.
"""Temporary directories of one process: a tier for files without another place, and bare folders.

They go with their user, and where that one is killed, with the next collection: each is locked
(`flock`) while its process lives, which is seen from other containers too.
"""

from __future__ import annotations

import os
import stat
import time
import weakref
from contextlib import suppress

from precast.cache.disk import DiskCache
from precast.cache.lock import OPEN_FOLDER, try_lock

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_PREFIX = "precast-"
_YOUNG_S = 60.0  # Between making a folder and locking it.


class OwnFolder:
    """A folder in the place for temporary files, for this process alone; as a context manager.

    Removed by `close`, with its last user, or at exit.
    """

    def __init__(self, kind: str) -> None:
        """Choose a name, and make nothing yet.

        Args:
            kind: A word that says what it is for.
        """
        # The name cannot be guessed, so nobody else can have made the directory before.
        name = f"{_PREFIX}{os.getpid()}-{kind}-{os.urandom(16).hex()}"
        self.path = os.path.join(_temporary_folder(), name)
        self._locks: list[int] = []
        self._remove = weakref.finalize(self, _remove_folder, self.path, self._locks, os.getpid())

    def make(self) -> str:
        """Make and lock the folder, once; return its path."""
        if not os.path.isdir(self.path):
            os.mkdir(self.path, 0o700)
        self.lock()
        return self.path

    def lock(self) -> None:
        """Show that the folder, which is there, is in use."""
        if not self._locks:
            with suppress(OSError):
                self._locks.append(os.open(self.path, OPEN_FOLDER))
                try_lock(self._locks[0])

    def close(self) -> None:
        """Remove the folder with all that is in it. What is mapped from there stays mapped."""
        self._remove()

    def __enter__(self) -> Self:
        self.make()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ScratchCache(DiskCache):
    """A disk tier of this process's own, removed by `close`, with its last user, or at exit."""

    def __init__(self) -> None:
        self._folder = OwnFolder("scratch")
        super().__init__(self._folder.path, name="scratch")

    @property
    def leases(self) -> None:
        """None: nobody shares it."""

    def close(self) -> None:
        """Remove the directory with all that is in it. What is mapped from there stays mapped."""
        self._folder.close()

    def _make_folder(self, path: str) -> None:
        super()._make_folder(path)
        self._folder.lock()


def sweep_dead_folders(place: str | None = None) -> int:
    """Remove temporary folders whose processes were killed; return how many there were.

    Args:
        place: Where to look; None: the place for temporary files.
    """
    place = _temporary_folder() if place is None else place
    num_removed = 0
    with suppress(OSError):
        for name in os.listdir(place):
            pid = name.removeprefix(_PREFIX).partition("-")[0]
            if name.startswith(f"{_PREFIX}{pid}-") and pid.isdecimal():
                num_removed += _try_remove_dead(os.path.join(place, name))
    return num_removed


def _try_remove_dead(path: str) -> bool:
    """Remove a folder of this user that no process holds locked."""
    with suppress(OSError):
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        # One that was made a moment ago may not be locked yet.
        if abs(time.time() - found.st_mtime) < _YOUNG_S:
            return False
        file = os.open(path, OPEN_FOLDER | getattr(os, "O_NOFOLLOW", 0))
        try:
            if not try_lock(file):
                return False
            import shutil

            shutil.rmtree(path, ignore_errors=True)
            return True
        finally:
            os.close(file)
    return False


def _temporary_folder() -> str:
    import tempfile  # Here, because most starts never need it.

    try:
        return tempfile.gettempdir()
    except OSError:
        return os.path.join(os.sep, "tmp")  # Not usable either; the first write will say so.


def _remove_folder(path: str, locks: list[int], owner_pid: int) -> None:
    if os.getpid() != owner_pid:  # A fork has no claim to it.
        return
    if os.path.lexists(path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    while locks:
        os.close(locks.pop())
