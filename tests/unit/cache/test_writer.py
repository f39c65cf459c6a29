from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.cache import storage as storage_module
from precast.cache.interface import CacheInterface
from precast.cache.readonly import ReadOnlyCache
from precast.cache.trust import Trust
from precast.cache.writer import BackgroundWriter
from precast.errors import Reason
from precast.events import ArtifactPublished, Event, TierFailed
from precast.testing import BLOB, DIGEST, KEY, make_manifest

Clock = Callable[[], float]
ANYBODY = Trust(allow_unsigned=True)


class FarCache(MemoryCache):
    """A shared tier whose writes wait until they are let through; notes them in order."""

    name = "far"
    is_in_memory = False
    is_shared = True

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.writes: list[str] = []

    def write_manifest(self, key: str, data: bytes) -> None:
        assert self.gate.wait(20)
        self.writes.append("manifest")
        super().write_manifest(key, data)

    def write_blob(self, digest: str, data: bytes) -> None:
        assert self.gate.wait(20)
        self.writes.append("blob")
        super().write_blob(digest, data)


@pytest.fixture
def far() -> FarCache:
    return FarCache()


@pytest.fixture
def writer(events: list[Event]) -> BackgroundWriter:
    return BackgroundWriter(["far"], events.append, most_jobs=3)


def test_publishing_waits_for_near_tiers_only(
    tmp_path: Path, far: FarCache, writer: BackgroundWriter, events: list[Event], clock: Clock
) -> None:
    disk = DiskCache(tmp_path)
    storage = CacheStorage([MemoryCache(), disk, far], events.append, clock, writer=writer)
    published = storage.publish(KEY, {}, {"a": b"1", "b": BLOB})
    assert disk.has_blob(DIGEST)
    assert not far.has_blob(DIGEST)
    assert storage.flush(0.05) is False
    far.gate.set()
    assert storage.flush(20.0) is True
    assert far.writes == ["blob", "blob", "manifest"]
    found = CacheLoader([far], events.append, clock, trust=ANYBODY).manifest(KEY)
    assert found == {**published, "unsigned": True}
    assert [e.tier for e in events if isinstance(e, ArtifactPublished)] == ["disk", "far"]
    storage.publish(KEY, {"again": 1}, {"a": b"1", "b": BLOB})
    assert storage.flush(20.0)
    assert far.writes[3:] == ["manifest"]  # The blobs are there.


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_lease_is_released_when_the_shared_tier_has_the_result(
    tmp_path: Path,
    far: FarCache,
    writer: BackgroundWriter,
    events: list[Event],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    is_slow: bool,
) -> None:
    """
    Else the next holder would not find it, and do the work again. But not for ever.
    """
    monkeypatch.setattr(storage_module, "SETTLE_S", 0.1 if is_slow else 20.0)
    monkeypatch.setattr(far, "leases", DiskCache(tmp_path / "agreed").leases, raising=False)
    tiers: list[CacheInterface] = [DiskCache(tmp_path / "disk"), far]
    storage = CacheStorage(tiers, events.append, clock, writer=writer, trust=ANYBODY)
    others = DiskCache(tmp_path / "agreed").leases
    assert others is not None
    leases = storage.open_leases()
    assert leases.try_acquire(KEY)
    storage.publish(KEY, {}, {"a": b"1"})
    releasing = threading.Thread(target=leases.close)
    releasing.start()
    if not is_slow:
        time.sleep(0.1)
        assert not others.try_acquire(KEY, "other", 60.0)
        far.gate.set()
    while not others.try_acquire(KEY, "other", 60.0):
        time.sleep(0.001)
    assert (far.read_manifest(KEY) is None) == is_slow
    far.gate.set()
    releasing.join()
    others.release(KEY, "other")


def test_without_a_disk_the_queue_holds_the_bytes(
    far: FarCache, writer: BackgroundWriter, events: list[Event], clock: Clock
) -> None:
    memory = MemoryCache()
    storage = CacheStorage([memory, far], events.append, clock, writer=writer)
    storage.publish(KEY, {}, {"a": BLOB})
    memory.quarantine_blob(DIGEST, "as if it were forgotten")
    far.gate.set()
    assert storage.flush(20.0)
    assert far.read_blob(DIGEST) == BLOB


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_what_the_disk_lost_meanwhile_is_not_published(
    tmp_path: Path,
    far: FarCache,
    writer: BackgroundWriter,
    events: list[Event],
    clock: Clock,
    how: str,
) -> None:
    disk = DiskCache(tmp_path)
    gate = threading.Event()
    writer.submit("far", lambda: gate.wait(20))
    storage = CacheStorage([disk, far], events.append, clock, writer=writer)
    storage.publish(KEY, {}, {"a": BLOB})
    if how == "gone":
        disk.quarantine_blob(DIGEST, "for the test")
    else:
        Path(str(disk.local_blob_path(DIGEST))).write_bytes(b"other bytes")
    gate.set()
    far.gate.set()
    assert storage.flush(20.0)
    assert far.writes == []
    assert [e.tier for e in events if isinstance(e, TierFailed)] == ["far"]


def test_reading_fills_far_tiers_behind_the_back(
    tmp_path: Path, far: FarCache, writer: BackgroundWriter, events: list[Event], clock: Clock
) -> None:
    farthest = DiskCache(tmp_path)
    farthest.write_manifest(KEY, make_manifest(KEY, 1))
    farthest.write_blob(DIGEST, BLOB)
    loader = CacheLoader([far, farthest], events.append, clock, trust=ANYBODY, writer=writer)
    assert loader.manifest(KEY) is not None
    assert loader.blob(DIGEST) == BLOB
    assert far.writes == []
    far.gate.set()
    assert writer.flush(20.0)
    assert far.writes == ["manifest", "blob"]


def test_a_discarded_key_does_not_come_back(
    far: FarCache, writer: BackgroundWriter, events: list[Event], clock: Clock
) -> None:
    """
    Not even where its write was still waiting.
    """
    storage = CacheStorage([far], events.append, clock, writer=writer)
    storage.publish(KEY, {}, {})
    storage.discard(KEY)
    far.gate.set()
    assert storage.flush(20.0)
    assert far.writes == ["manifest"]
    assert far.read_manifest(KEY) is None


def test_the_queue_is_bounded_and_the_wait_at_the_end_too(
    far: FarCache, writer: BackgroundWriter, events: list[Event], clock: Clock
) -> None:
    storage = CacheStorage([far], events.append, clock, writer=writer)
    for i in range(6):
        storage.publish(KEY, {"number": i}, {})
    refused = [event for event in events if isinstance(event, TierFailed)]
    assert 2 <= len(refused) <= 3  # One may be in the making, three wait.
    assert "queue" in refused[0].reason.message
    events.clear()
    began_s = time.monotonic()
    writer.close(0.05)
    assert time.monotonic() - began_s < 10
    [event] = events
    assert isinstance(event, TierFailed)
    assert "0.05 s" in event.reason.message
    storage.publish(KEY, {}, {})
    assert isinstance(events[-1], TierFailed)
    far.gate.set()
    assert writer.flush(20.0)
    assert far.writes == ["manifest"]


def test_a_job_that_raises_does_not_stop_the_others(
    writer: BackgroundWriter, events: list[Event]
) -> None:
    done: list[int] = []
    writer.submit("far", lambda: 1 / 0)
    writer.submit("far", lambda: done.append(1))
    assert writer.flush(20.0)
    assert done == [1]
    assert [type(event) for event in events] == [TierFailed]


def test_a_listener_that_ends_its_thread_does_not_stop_the_jobs() -> None:
    def leave(_: Event) -> None:
        raise SystemExit(3)

    done: list[str] = []
    writer = BackgroundWriter(["far"], leave)
    writer.submit("far", lambda: 1 // 0)
    writer.submit("far", lambda: done.append("next"))

    assert writer.flush(20)
    assert done == ["next"]


def test_the_thread_ends_with_its_work(writer: BackgroundWriter) -> None:
    for _ in range(3):
        writer.submit("far", lambda: None)
        assert writer.flush(20.0)
    assert writer.flush(0.0)
    time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name == "precast-cache-writer"]


def test_a_read_only_tier_is_read_and_never_written(events: list[Event], clock: Clock) -> None:
    """
    What is bad there is left there, and not found again.
    """
    inner = FarCache()
    inner.gate.set()
    inner.write_manifest(KEY, make_manifest(KEY, 1))
    inner.write_blob(DIGEST, BLOB[:-1])
    inner.writes.clear()
    inner.delete_manifest = inner.quarantine_manifest = inner.quarantine_blob = None  # type: ignore[assignment]
    tier: CacheInterface = ReadOnlyCache(inner)
    loader = CacheLoader([tier], events.append, clock, trust=ANYBODY)
    storage = CacheStorage([tier], events.append, clock, trust=ANYBODY, read_only=["far"])
    assert (tier.name, tier.is_writable, tier.is_shared) == ("far", False, True)
    assert loader.manifest(KEY) is not None
    assert tier.has_blob(DIGEST)
    assert loader.blob(DIGEST) is None
    assert not tier.has_blob(DIGEST)
    events.clear()
    storage.publish(KEY, {}, {"a": BLOB})
    assert events == []
    assert list(tier.manifest_keys()) == [KEY]
    storage.quarantine(KEY, Reason("artifact-incompatible", "it needs avx512", "Nothing"))
    assert loader.manifest(KEY) is None
    assert list(tier.manifest_keys()) == []
    storage.discard(KEY)
    assert inner.writes == []
    assert inner.read_manifest(KEY) is not None
