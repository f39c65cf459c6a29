from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from precast.cache import MemoryCache
from precast.cache.guarded import GuardedCache, note_progress
from precast.cache.interface import CacheInterface
from precast.cache.layered import LayeredCache
from precast.errors import StoreError, TierSkippedError
from precast.events import Event, TierFailed, TierRecovered, TierSkipped
from precast.testing import BLOB, DIGEST, KEY, CacheContract, make_manifest
from servers import wait_until

MANIFEST = make_manifest(KEY, 1)


class Patient:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FaultyCache(MemoryCache):
    """Hangs, is slow or fails, as it is told; counts what it is asked."""

    name = "faulty"
    is_in_memory = False
    is_shared = True

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.behave: Callable[[], None] = lambda: None
        self.fail_writes = False
        self.num_requests = 0

    def hang(self) -> None:
        self.released.wait(30)

    def fail(self) -> None:
        raise ConnectionError("gone")

    def read_manifest(self, key: str) -> bytes | None:
        self._work()
        return super().read_manifest(key)

    def read_blob(self, digest: str) -> bytes | None:
        self._work()
        return super().read_blob(digest)

    def has_blob(self, digest: str) -> bool:
        self._work()
        return super().has_blob(digest)

    def write_blob(self, digest: str, data: bytes) -> None:
        if self.fail_writes:
            raise StoreError(self.name, "write blob", "full")
        super().write_blob(digest, data)

    def _work(self) -> None:
        self.num_requests += 1
        self.behave()


@pytest.fixture
def tier() -> FaultyCache:
    return FaultyCache()


@pytest.fixture
def now() -> Patient:
    return Patient()


@pytest.fixture
def guarded(tier: FaultyCache, now: Patient, events: list[Event]) -> GuardedCache:
    return GuardedCache(tier, events.append, now, deadline_s=0.05)


class TestGuarded(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return GuardedCache(MemoryCache(), lambda _: None, time.monotonic, deadline_s=20.0)


def test_a_tier_that_hangs_costs_its_deadline_once(
    tier: FaultyCache, guarded: GuardedCache, events: list[Event]
) -> None:
    """
    The first request waits, all later ones are answered at once; it is reported once.
    """
    tier.behave = tier.hang
    layered = LayeredCache([guarded], events.append, time.monotonic)
    for _ in range(5):
        assert layered.read_manifest(KEY) is None
        assert layered.read_blob(DIGEST) is None
    assert tier.num_requests == 1
    assert [type(event) for event in events] == [TierFailed] + [TierSkipped] * 9
    assert isinstance(events[0], TierFailed)
    assert "50 ms" in events[0].reason.message
    tier.released.set()


@pytest.mark.parametrize("how", ["hang", "fail"])
def test_it_is_tried_again_after_pauses_that_grow(
    tier: FaultyCache, guarded: GuardedCache, now: Patient, events: list[Event], how: str
) -> None:
    tier.write_manifest(KEY, MANIFEST)
    tier.behave = getattr(tier, how)
    with pytest.raises(StoreError):
        guarded.read_manifest(KEY)
    for pause_s in (1.0, 2.0, 4.0):
        now.now_s += pause_s - 0.01
        num_requests = tier.num_requests
        with pytest.raises(TierSkippedError):
            guarded.read_manifest(KEY)
        assert not guarded._is_probing
        now.now_s += 0.02
        with pytest.raises(TierSkippedError):  # The caller does not wait for the trial.
            guarded.read_manifest(KEY)
        wait_until(lambda: not guarded._is_probing)
        assert tier.num_requests == num_requests + 1
    assert events == []
    tier.behave = lambda: None
    tier.released.set()
    wait_until(lambda: not any(request.is_alive() for request in guarded._hanging))
    now.now_s += 8.0
    with pytest.raises(TierSkippedError):
        guarded.read_manifest(KEY)
    wait_until(lambda: not guarded._is_probing)
    assert guarded.read_manifest(KEY) == MANIFEST
    [event] = events
    assert isinstance(event, TierRecovered)
    assert event.seconds == pytest.approx(now.now_s - 100.0)
    tier.behave = tier.fail  # The next outage begins with a short pause again.
    with pytest.raises(StoreError, match="gone"):
        guarded.read_manifest(KEY)
    assert not guarded._link.is_due
    now.now_s += 1.0
    assert guarded._link.is_due


def test_requests_that_never_come_back_are_bounded(
    tier: FaultyCache, guarded: GuardedCache, now: Patient
) -> None:
    tier.behave = tier.hang
    for _ in range(10):
        with pytest.raises(StoreError):
            guarded.read_manifest(KEY)
        wait_until(lambda: not guarded._is_probing)
        now.now_s += 100.0
    assert tier.num_requests == 4
    tier.released.set()
    wait_until(lambda: not any(r.is_alive() for r in guarded._hanging))
    tier.behave = lambda: None
    with pytest.raises(TierSkippedError):
        guarded.read_manifest(KEY)
    wait_until(lambda: not guarded._is_probing)
    assert guarded.read_manifest(KEY) is None


def test_a_blob_may_take_as_long_as_it_keeps_coming(
    tier: FaultyCache, guarded: GuardedCache
) -> None:
    def trickle() -> None:
        for _ in range(12):
            time.sleep(0.02)
            note_progress()

    tier.write_blob(DIGEST, BLOB)
    tier.behave = trickle
    assert guarded.read_blob(DIGEST) == BLOB
    note_progress()  # In a thread that nobody waits for it does nothing.


def test_writes_have_no_deadline(tier: FaultyCache, guarded: GuardedCache) -> None:
    real = tier.write_blob
    tier.write_blob = lambda *a: (time.sleep(0.2), real(*a))[1]  # type: ignore[method-assign, func-returns-value]
    guarded.write_blob(DIGEST, BLOB)
    assert guarded.read_blob(DIGEST) == BLOB


def test_a_tier_that_is_full_can_still_be_read(
    tier: FaultyCache, guarded: GuardedCache, now: Patient, events: list[Event]
) -> None:
    tier.write_manifest(KEY, MANIFEST)
    tier.fail_writes = True
    with pytest.raises(StoreError, match="full"):
        guarded.write_blob(DIGEST, BLOB)
    with pytest.raises(TierSkippedError):
        guarded.write_blob(DIGEST, BLOB)
    assert guarded.read_manifest(KEY) == MANIFEST
    now.now_s += 1.0
    with pytest.raises(TierSkippedError):  # It was tried, and is not reported twice.
        guarded.write_blob(DIGEST, BLOB)
    tier.fail_writes = False
    with pytest.raises(TierSkippedError):
        guarded.write_blob(DIGEST, BLOB)
    now.now_s += 2.0
    guarded.write_blob(DIGEST, BLOB)
    assert events == [TierRecovered("faulty", 3.0)]


def test_requests_that_fail_together_are_reported_once(tier: FaultyCache, now: Patient) -> None:
    guarded = GuardedCache(tier, lambda _: None, now, deadline_s=20.0)
    together = threading.Barrier(3)
    assert guarded.read_manifest(KEY) is None  # So that all are past the first contact.

    def fail() -> None:
        together.wait(20)
        raise ConnectionError("gone")

    tier.behave = fail

    def ask(_: int) -> type[Exception]:
        with pytest.raises(StoreError) as caught:
            guarded.read_manifest(KEY)
        return caught.type

    with ThreadPoolExecutor(3) as pool:
        assert sorted(kind.__name__ for kind in pool.map(ask, range(3))) == [
            "StoreError",
            "TierSkippedError",
            "TierSkippedError",
        ]


def test_a_dead_tier_costs_no_import(tier: FaultyCache, now: Patient, events: list[Event]) -> None:
    prepared: list[str] = []

    def knock(timeout_s: float) -> None:
        assert timeout_s == 0.08
        raise ConnectionRefusedError("nobody is there")

    guarded = GuardedCache(
        tier,
        events.append,
        now,
        deadline_s=1.0,
        knock=knock,
        prepare=lambda: prepared.append("imported"),
    )
    with pytest.raises(StoreError, match="nobody is there"):
        guarded.read_manifest(KEY)
    with pytest.raises(TierSkippedError):
        guarded.write_blob(DIGEST, BLOB)
    assert (prepared, tier.num_requests) == ([], 0)


def test_what_the_client_needs_is_not_counted_in_the_deadline(
    tier: FaultyCache, now: Patient
) -> None:
    guarded = GuardedCache(
        tier, lambda _: None, now, deadline_s=0.1, prepare=lambda: time.sleep(0.3)
    )
    assert guarded.read_manifest(KEY) is None


def test_a_bad_name_is_the_callers_mistake(tier: FaultyCache, guarded: GuardedCache) -> None:
    with pytest.raises(ValueError, match="key"):
        guarded.read_manifest("NO")
    tier.behave = tier.fail
    with pytest.raises(StoreError):
        guarded.read_manifest(KEY)
    with pytest.raises(ValueError, match="digest"):
        guarded.read_blob("NO")
