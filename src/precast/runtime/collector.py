"""Keeps Python's garbage collector from falling due in the middle of a start."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Put full collections off while many objects are made.

    A large assembly is thousands of small lists. One full collection, over everything that torch
    holds, takes longer than all of a start, and every thread waits for it.
    """
    # Only who found it on turns it off, and on again: another thread may do the same meanwhile.
    is_collecting = gc.isenabled()
    try:
        if is_collecting:
            gc.disable()
        yield
    finally:
        if is_collecting:
            try:
                gc.collect(0)  # Only what is new, or the full collection follows right away.
            finally:
                gc.enable()
