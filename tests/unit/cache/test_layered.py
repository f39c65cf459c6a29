from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast.cache import DiskCache, MemoryCache
from precast.cache.interface import CacheInterface
from precast.cache.layered import LayeredCache
from precast.errors import StoreError
from precast.events import ArtifactQuarantined, BlobFetched, Event, TierFailed
from precast.testing import BLOB, DIGEST, KEY, CacheContract, make_manifest

Clock = Callable[[], float]
MANIFEST = make_manifest(KEY, 1)


class BrokenCache:
    """A tier whose every method raises."""

    name = "broken"
    is_writable = True
    is_in_memory = False
    keeps_files = True

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        def fail(*_: object) -> None:
            raise self._error

        fail.__name__ = method
        return fail


class TestMemoryBeforeDisk(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        tiers: list[CacheInterface] = [MemoryCache(), DiskCache(tmp_path / "root")]
        return LayeredCache(tiers, emit=self._fail_on_event, clock=lambda: 0.0)

    def _fail_on_event(self, event: Event) -> None:
        raise AssertionError(event)


class TestBrokenTierBetween(CacheContract):
    """
    The contract holds although one of the tiers only ever raises.
    """

    def make_cache(self, tmp_path: Path) -> CacheInterface:
        broken = BrokenCache(RuntimeError("no"))
        tiers: list[CacheInterface] = [MemoryCache(), broken, DiskCache(tmp_path / "root")]
        return LayeredCache(tiers, emit=lambda _: None, clock=lambda: 0.0)


def test_reading_fills_the_nearer_tiers(tmp_path: Path, events: list[Event], clock: Clock) -> None:
    memory, near, far = MemoryCache(), DiskCache(tmp_path / "near"), DiskCache(tmp_path / "far")
    far.write_manifest(KEY, MANIFEST)
    far.write_blob(DIGEST, BLOB)
    layered = LayeredCache([memory, near, far], events.append, clock)
    found = layered.find_manifest(KEY)
    assert found is not None
    assert (found.tier, found.payload["note"], found.data) == ("disk", 1, MANIFEST)
    assert memory.read_manifest(KEY) == near.read_manifest(KEY) == MANIFEST
    assert layered.read_blob(DIGEST) == BLOB
    assert near.read_blob(DIGEST) == BLOB
    assert not memory.has_blob(DIGEST)  # It would cost this process its size.
    found = layered.find_manifest(KEY)
    assert found is not None
    assert found.tier == "memory"
    assert events == []


def test_memory_takes_blobs_that_no_other_tier_takes(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    memory, disk = MemoryCache(), DiskCache(tmp_path)
    LayeredCache([memory, disk], events.append, clock).write_blob(DIGEST, BLOB)
    assert not memory.has_blob(DIGEST)
    broken = BrokenCache(StoreError("broken", "write blob", "full"))
    LayeredCache([memory, broken], events.append, clock).write_blob(DIGEST, BLOB)
    assert memory.has_blob(DIGEST)


@pytest.mark.parametrize(
    "error", [StoreError("broken", "think", "too hard"), RuntimeError("a bug"), OSError(5, "io")]
)
def test_a_failing_tier_is_skipped_and_reported(
    tmp_path: Path, events: list[Event], clock: Clock, error: Exception
) -> None:
    disk = DiskCache(tmp_path)
    layered = LayeredCache([BrokenCache(error), disk], events.append, clock)
    uses: list[Callable[[], object]] = [
        lambda: layered.write_manifest(KEY, MANIFEST),
        lambda: layered.write_blob(DIGEST, BLOB),
        lambda: layered.read_manifest(KEY) == MANIFEST,
        lambda: layered.read_blob(DIGEST) == BLOB,
        lambda: layered.has_blob(DIGEST),
        lambda: layered.local_blob_path(DIGEST) == disk.local_blob_path(DIGEST),
        lambda: layered.link_tree({"a": DIGEST}) == disk.link_tree({"a": DIGEST}),
        lambda: list(layered.manifest_keys()) == [KEY],
        lambda: "quarantine" in layered.quarantine_blob(DIGEST, "reason"),
        lambda: "quarantine" in layered.quarantine_manifest(KEY, "reason"),
        lambda: layered.delete_manifest(KEY),
    ]
    for use in uses:
        events.clear()
        assert use() in (None, True)  # Each gives the disk's answer.
        assert events, "not reported"
        for event in events:
            assert isinstance(event, TierFailed)
            assert (event.tier, event.reason.code) == ("broken", "tier-failed")


def test_a_damaged_copy_does_not_hide_a_sound_one(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    near, far = DiskCache(tmp_path / "near"), DiskCache(tmp_path / "far")
    far.write_manifest(KEY, MANIFEST)
    far.write_blob(DIGEST, BLOB)
    near.write_manifest(KEY, MANIFEST[:-1])
    near.write_blob(DIGEST, BLOB[:-1])
    layered = LayeredCache([near, far], events.append, clock)
    assert layered.read_manifest(KEY) == MANIFEST
    assert layered.read_blob(DIGEST) == BLOB
    assert near.read_manifest(KEY) == MANIFEST  # Filled again from the sound one.
    assert near.read_blob(DIGEST) == BLOB
    assert [type(event) for event in events] == [ArtifactQuarantined] * 2
    assert all(event.reason.code == "artifact-corrupt" for event in events)  # type: ignore[attr-defined]


def test_damage_that_cannot_be_set_aside_is_reported_all_the_same(
    events: list[Event], clock: Clock
) -> None:
    tier = MemoryCache()

    def fail(*_: object) -> str:
        raise StoreError("memory", "quarantine manifest", "read-only")

    tier.quarantine_manifest = fail  # type: ignore[method-assign]
    tier.write_manifest(KEY, b"damaged")
    assert LayeredCache([tier], events.append, clock).read_manifest(KEY) is None
    [event] = events
    assert isinstance(event, TierFailed)
    assert event.reason.code == "artifact-corrupt"
    assert "damaged" in event.reason.message
    assert "read-only" in event.reason.message


def test_bytes_from_a_shared_tier_are_told(tmp_path: Path, clock: Clock) -> None:
    """
    They went over a network, most often; what lies on this machine's disk is told by nobody.
    """
    told: list[Event] = []
    shared = DiskCache(tmp_path / "shared", name="fleet", is_shared=True)
    shared.write_blob(DIGEST, BLOB)
    near = DiskCache(tmp_path / "near")
    layered = LayeredCache([near, shared], told.append, clock)
    assert layered.read_blob(DIGEST) == BLOB
    (fetched,) = told
    assert isinstance(fetched, BlobFetched)
    assert (fetched.tier, fetched.digest, fetched.num_bytes) == ("fleet", DIGEST, len(BLOB))
    assert fetched.seconds > 0
    assert layered.read_blob(DIGEST) == BLOB
    assert told == [fetched]
