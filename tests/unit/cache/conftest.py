"""What the cache's tests share: a list of what was emitted, and a pair over one directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from precast.cache import CacheLoader, CacheStorage, open_cache
from precast.cache.trust import SigningKey
from precast.events import Event


@pytest.fixture
def events() -> list[Event]:
    """Return the list that `emit` of the other fixtures appends to."""
    return []


@pytest.fixture
def clock() -> Callable[[], float]:
    """Return a clock that goes on by a second each time it is asked."""
    seconds = iter(range(1_000_000))
    return lambda: float(next(seconds))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return where the disk tier of `open_pair` lies; not made yet."""
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def key() -> SigningKey:
    """Return a private key, always the same."""
    return SigningKey(b"k" * 32)


@pytest.fixture(scope="session")
def other_key() -> SigningKey:
    """Return another private key."""
    return SigningKey(b"o" * 32)


OpenPair = Callable[[], tuple[CacheLoader, CacheStorage]]


@pytest.fixture
def open_pair(root: Path, events: list[Event], clock: Callable[[], float]) -> OpenPair:
    """Return what opens the cache at `root` as a new process would."""
    return lambda: open_cache(root, disabled=False, emit=events.append, clock=clock)
