# ruff: noqa: PTH108
# PTH: as in `disk.py`.
"""What file systems decide for several processes: locks that end with a process, and one clock."""

from __future__ import annotations

import errno
import os

# What file systems and systems without such locks answer.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def try_lock(file: int) -> bool | None:
    """Lock an open file or folder without waiting; it stays locked until it is closed.

    False: another has it. None: nothing can be locked here.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def time_at(path: str) -> float:
    """Return the time by the clock of a file system, seen at a file made there and removed."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return os.fstat(file).st_mtime
    finally:
        try:
            os.close(file)
        finally:
            os.unlink(path)
