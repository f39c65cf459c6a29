# ruff: noqa: PTH118
# PTH: as in `disk.py`, which this extends.
"""A private temporary directory as a tier, for files that have no other place."""

from __future__ import annotations

import os
import weakref

from precast.cache.disk import DiskCache


class ScratchCache(DiskCache):
    """A disk tier of this process's own, removed by `close`, with its last user, or at exit."""

    def __init__(self) -> None:
        # The name cannot be guessed, so nobody else can have made the directory before.
        root = os.path.join(_temporary_folder(), f"precast-{os.getpid()}-{os.urandom(16).hex()}")
        super().__init__(root, name="scratch")
        self._remove = weakref.finalize(self, _remove_folder, self.root, os.getpid())

    def close(self) -> None:
        """Remove the directory with all that is in it. What is mapped from there stays mapped."""
        self._remove()


def _temporary_folder() -> str:
    import tempfile  # Here, because most starts never need it.

    try:
        return tempfile.gettempdir()
    except OSError:
        return os.path.join(os.sep, "tmp")  # Not usable either; the first write will say so.


def _remove_folder(path: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid and os.path.lexists(path):  # A fork has no claim to it.
        import shutil

        shutil.rmtree(path, ignore_errors=True)
