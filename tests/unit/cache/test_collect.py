"""Bounds: what may go is planned, then removed by one process at a time, also under readers."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.cache import DiskCache, MemoryCache, open_cache
from precast.cache.collect import (
    Collector,
    ManifestUse,
    Pruned,
    make_plan,
    prune,
)
from precast.cache.interface import CacheInterface, Entry
from precast.cache.manifest import complete_payload, encode_manifest
from precast.cache.names import COLLECTION_KEY
from precast.errors import StoreError
from precast.events import CacheCollected, Event, TierFailed
from precast.testing import every_fault, make_manifest
from servers import wait_until

HOUR, DAY = 3600.0, 86400.0
NOW = 1000 * DAY


def use(key: str, age_s: float, *digests: str, needs: tuple[str, ...] = ()) -> ManifestUse:
    return ManifestUse(key, 1, NOW - age_s, digests, needs)


def blob(name: str, age_s: float, num_bytes: int = 100) -> Entry:
    return Entry(False, name, num_bytes, NOW - age_s)


def plan(
    manifests: list[ManifestUse],
    blobs: list[Entry],
    max_bytes: int | None = None,
    max_age_s: float | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = make_plan(
        manifests, blobs, now_s=NOW, max_bytes=max_bytes, max_age_s=max_age_s, grace_s=HOUR
    )
    return found.keys, found.digests


def test_without_limits_only_orphans_go() -> None:
    manifests = [use("a", 400 * DAY, "A")]
    blobs = [blob("A", 400 * DAY), blob("old orphan", 2 * HOUR), blob("young orphan", 0.5 * HOUR)]
    assert plan(manifests, blobs) == ((), ("old orphan",))


def test_what_was_not_used_for_too_long_goes_with_its_blobs() -> None:
    manifests = [use("a", 91 * DAY, "A", "shared"), use("b", 89 * DAY, "B", "shared")]
    blobs = [blob(name, 95 * DAY) for name in ("A", "B", "shared")]
    assert plan(manifests, blobs, max_age_s=90 * DAY) == (("a",), ("A",))


def test_the_least_recently_used_go_first_until_it_fits() -> None:
    manifests = [use(f"k{i}", (10 - i) * DAY, f"B{i}") for i in range(5)]
    blobs = [blob(f"B{i}", 20 * DAY) for i in range(5)]
    assert plan(manifests, blobs, max_bytes=505) == ((), ())
    assert plan(manifests, blobs, max_bytes=504) == (("k0",), ("B0",))
    assert plan(manifests, blobs, max_bytes=202) == (("k0", "k1", "k2"), ("B0", "B1", "B2"))
    assert plan(manifests, blobs, max_bytes=1)[0] == ("k0", "k1", "k2", "k3", "k4")


def test_orphans_count_before_anything_that_is_used() -> None:
    manifests = [use("a", 10 * DAY, "A")]
    blobs = [blob("A", 10 * DAY), blob("orphan", 2 * DAY, 10_000)]
    assert plan(manifests, blobs, max_bytes=101) == ((), ("orphan",))


def test_what_is_young_stays_even_where_it_is_too_much() -> None:
    manifests = [use("old", 2 * HOUR, "O"), use("young", 0.5 * HOUR, "Y")]
    blobs = [blob("O", 2 * HOUR), blob("Y", 0.5 * HOUR), blob("being published", 0.0)]
    assert plan(manifests, blobs, max_bytes=1) == (("old",), ("O",))


def test_the_blob_of_a_dropped_manifest_stays_while_another_may_be_publishing_it() -> None:
    assert plan([use("a", DAY, "A")], [blob("A", 0.5 * HOUR)], max_bytes=1) == (("a",), ())


def test_what_a_used_assembly_needs_is_used() -> None:
    """
    A warm start reads the assembly alone, so its pieces' manifests look old.
    """
    manifests = [
        use("piece", 80 * DAY, "P"),
        use("assembly", DAY, needs=("piece", "gone")),
        use("other", 50 * DAY, "O"),
    ]
    blobs = [blob("P", 80 * DAY), blob("O", 50 * DAY)]
    assert plan(manifests, blobs, max_age_s=40 * DAY) == (("other",), ("O",))
    assert plan(manifests, blobs, max_bytes=102) == (("other",), ("O",))
    # And when there is no way around: the assembly first, which is of no use alone.
    assert plan(manifests, blobs, max_bytes=1)[0] == ("other", "assembly", "piece")


def test_needs_may_go_in_a_circle() -> None:
    manifests = [use("a", 5 * DAY, needs=("b",)), use("b", 1 * DAY, needs=("a",))]
    assert plan(manifests, [], max_age_s=2 * DAY) == ((), ())


def test_a_clock_that_was_ahead_is_no_crash() -> None:
    assert plan([use("a", -2 * DAY, "A")], [blob("A", -2 * DAY)], max_bytes=1) == ((), ())


uses = st.builds(
    use,
    st.sampled_from([f"k{i}" for i in range(8)]),
    st.floats(0, 20 * DAY),
    st.sampled_from("ABCDE"),
    needs=st.lists(st.sampled_from([f"k{i}" for i in range(8)]), max_size=2).map(tuple),
)
blobs_of_a_tier = st.lists(
    st.builds(blob, st.sampled_from("ABCDE"), st.floats(0, 20 * DAY), st.integers(0, 1000)),
    unique_by=lambda entry: entry.name,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(uses, unique_by=lambda manifest: manifest.key),
    blobs_of_a_tier,
    st.none() | st.integers(1, 4000),
    st.none() | st.floats(1, 20 * DAY),
)
def test_a_plan_keeps_what_it_must_and_fits_where_it_can(
    manifests: list[ManifestUse],
    blobs: list[Entry],
    max_bytes: int | None,
    max_age_s: float | None,
) -> None:
    found = make_plan(
        manifests, blobs, now_s=NOW, max_bytes=max_bytes, max_age_s=max_age_s, grace_s=HOUR
    )
    stay = [manifest for manifest in manifests if manifest.key not in found.keys]
    named = {digest for manifest in stay for digest in manifest.digests}
    assert not named & set(found.digests), "a blob that is named stays"
    young = {entry.name for entry in blobs if NOW - entry.used_s < HOUR}
    assert not young & set(found.digests)
    assert all(NOW - manifest.used_s >= HOUR for manifest in manifests if manifest not in stay)
    kept_blobs = [entry for entry in blobs if entry.name not in found.digests]
    left = len(stay) + sum(entry.num_bytes for entry in kept_blobs)
    assert found.num_bytes_after == left
    if max_bytes is None and max_age_s is None:
        assert not found.keys
    old = [manifest for manifest in stay if NOW - manifest.used_s >= HOUR]
    if max_bytes is not None and left > max_bytes:
        # Only where all that is left is young, or needed by what is.
        needed = {key for manifest in stay for key in manifest.needs}
        assert all(manifest.key in needed for manifest in old)


# -- On a disk


Clock = Callable[[], float]


def publish(cache: CacheInterface, key: str, content: bytes, **payload: Any) -> str:
    digest = sha256(content).hexdigest()
    cache.write_blob(digest, content)
    complete = complete_payload(key, payload, {"piece.so": content})
    cache.write_manifest(key, encode_manifest(complete))
    return digest


def make_older(root: Path, age_s: float) -> None:
    for path in (root / "v1").rglob("*"):
        if path.is_file():
            stat = path.stat()
            os.utime(path, (stat.st_atime, stat.st_mtime - age_s))
    for path in (root / "v1" / "tree").glob("*"):
        os.utime(path, (0, path.stat().st_mtime - age_s))


def prune_disk(root: Path, events: list[Event], **settings: Any) -> Pruned:
    given: dict[str, Any] = {"max_bytes": None, "max_age_s": None, **settings}
    [pruned] = prune([MemoryCache(), DiskCache(root)], emit=events.append, **given)
    return pruned


def keys_of(root: Path) -> set[str]:
    return set(DiskCache(root).manifest_keys()) - {COLLECTION_KEY}


def test_a_disk_is_brought_within_its_bounds(tmp_path: Path, events: list[Event]) -> None:
    cache = DiskCache(tmp_path)
    for i in range(5):
        publish(cache, f"key-{i}", bytes([i]) * 1000)
        make_older(tmp_path, DAY)
    pruned = prune_disk(tmp_path, events, max_bytes=3000)
    assert keys_of(tmp_path) == {"key-3", "key-4"}
    assert len(list((tmp_path / "v1" / "cas").rglob("*/*/*"))) == 2
    assert (pruned.tier, pruned.num_manifests, pruned.num_blobs) == ("disk", 3, 3)
    assert pruned.num_bytes_before > 5000
    assert 2000 < pruned.num_bytes_after <= 3000
    [event] = [event for event in events if isinstance(event, CacheCollected)]
    assert event.num_bytes == pruned.num_bytes_before - pruned.num_bytes_after
    assert prune_disk(tmp_path, events, max_age_s=1.5 * DAY).keys == ("key-3",)


def test_a_trial_says_the_same_and_removes_nothing(tmp_path: Path, events: list[Event]) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1" * 1000)
    make_older(tmp_path, DAY)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    trial = prune_disk(tmp_path, events, max_bytes=10, is_trial=True)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert trial.keys == ("key-1",)
    assert prune_disk(tmp_path, events, max_bytes=10) == trial


def test_a_hit_makes_an_entry_young(tmp_path: Path, events: list[Event], clock: Clock) -> None:
    cache = DiskCache(tmp_path)
    publish(cache, "key-1", b"1" * 1000)
    publish(cache, "key-2", b"2" * 1000)
    make_older(tmp_path, 2 * HOUR)
    loader, _ = open_cache(tmp_path, disabled=False, emit=events.append, clock=clock)
    assert loader.manifest("key-1") is not None
    make_older(tmp_path, 2 * HOUR)
    prune_disk(tmp_path, events, max_bytes=2000)
    assert keys_of(tmp_path) == {"key-1"}


def test_a_use_is_noted_once_an_hour(tmp_path: Path) -> None:
    """
    Also where the machine's clock is two days off: the note itself is by the disk's clock.
    """
    cache = DiskCache(tmp_path)
    cache.write_manifest("key-1", make_manifest("key-1", 1))
    path = tmp_path / "v1" / "ac" / "ke" / "key-1.json"
    now = path.stat().st_mtime
    os.utime(path, (now, now - 1800))
    cache.touch_manifest("key-1")
    assert path.stat().st_mtime == pytest.approx(now - 1800)
    for age_s in (2 * HOUR, -2 * DAY):
        os.utime(path, (now, now - age_s))
        cache.touch_manifest("key-1")
        assert path.stat().st_mtime == pytest.approx(now, abs=60)


def test_a_use_that_cannot_be_noted_is_no_failure(
    tmp_path: Path, events: list[Event], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1")
    make_older(tmp_path, DAY)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    loader, _ = open_cache(tmp_path, disabled=False, emit=events.append, clock=clock)
    assert loader.manifest("key-1") is not None
    assert [type(event).__name__ for event in events] == ["CacheHit"]


def test_a_tree_goes_with_its_blobs(tmp_path: Path, events: list[Event]) -> None:
    """
    Its files are other names of the blobs, and would keep their bytes.
    """
    cache = DiskCache(tmp_path)
    kept = publish(cache, "key-1", b"1" * 1000)
    gone = publish(cache, "key-2", b"2" * 1000)
    trees = [Path(cache.link_tree({"a": digest})) for digest in (kept, gone)]
    make_older(tmp_path, DAY)
    cache.delete_manifest("key-2")
    prune_disk(tmp_path, events)
    assert trees[0].exists()
    assert not trees[1].exists()


def test_another_version_and_strangers_are_left_alone(tmp_path: Path, events: list[Event]) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1")
    strangers = [tmp_path / "v2" / "ac" / "x.json", tmp_path / "v1" / "ac" / "README"]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("?")
    make_older(tmp_path, 400 * DAY)
    prune_disk(tmp_path, events, max_age_s=DAY)
    assert keys_of(tmp_path) == set()
    assert all(path.exists() for path in strangers)


def test_a_damaged_manifest_protects_nothing_and_stops_nothing(
    tmp_path: Path, events: list[Event]
) -> None:
    cache = DiskCache(tmp_path)
    publish(cache, "key-1", b"1" * 1000)
    publish(cache, "key-2", b"2" * 1000)
    cache.write_manifest("key-1", b"garbage")
    make_older(tmp_path, DAY)
    prune_disk(tmp_path, events)
    assert keys_of(tmp_path) == {"key-1", "key-2"}
    assert len(list((tmp_path / "v1" / "cas").rglob("*/*/*"))) == 1


def test_what_cannot_be_read_whole_is_left_whole(tmp_path: Path, events: list[Event]) -> None:
    """
    Else the blobs of a manifest that could not be read for a moment would be taken for orphans.
    """
    publish(DiskCache(tmp_path), "key-1", b"1" * 1000)
    make_older(tmp_path, 400 * DAY)

    class Moody(DiskCache):
        def read_manifest(self, key: str) -> bytes | None:
            raise StoreError("disk", "read manifest", "in a bad mood")

    [pruned] = prune([Moody(tmp_path)], emit=events.append, max_bytes=1, max_age_s=1.0)
    assert pruned.skipped is not None
    assert "bad mood" in pruned.skipped
    assert [type(event) for event in events if isinstance(event, TierFailed)] == [TierFailed]
    assert keys_of(tmp_path) == {"key-1"}
    assert len(list((tmp_path / "v1" / "cas").rglob("*/*/*"))) == 1


def test_any_operation_may_fail_while_pruning(tmp_path: Path) -> None:
    """
    No exception, no used entry lost, and the next collection does what is left.
    """
    for fault in every_fault():
        root = tmp_path / str(fault.n)
        cache = DiskCache(root)
        publish(cache, "old-key", b"old" * 100)
        make_older(root, 10 * DAY)
        kept = publish(cache, "kept-key", b"kept" * 100)
        make_older(root, 2 * HOUR)
        with fault:
            prune([DiskCache(root)], emit=lambda _: None, max_bytes=None, max_age_s=DAY)
        assert cache.read_manifest("kept-key") is not None
        assert cache.read_blob(kept) == b"kept" * 100
        [done] = prune([DiskCache(root)], emit=lambda _: None, max_bytes=None, max_age_s=DAY)
        assert done.skipped is None, fault
        assert keys_of(root) == {"kept-key"}


def test_one_process_collects_at_a_time(tmp_path: Path, events: list[Event]) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1")
    make_older(tmp_path, DAY)
    other = DiskCache(tmp_path).leases
    assert other is not None
    assert other.try_acquire(COLLECTION_KEY, "other", 60.0)
    assert prune_disk(tmp_path, events, max_bytes=1).skipped == "another process collects it"
    assert keys_of(tmp_path) == {"key-1"}
    other.release(COLLECTION_KEY, "other")
    assert prune_disk(tmp_path, events, max_bytes=1).keys == ("key-1",)


def test_it_is_done_once_in_an_interval(tmp_path: Path, events: list[Event]) -> None:
    """
    By the disk's clock; a note from the future, of a clock that was wrong, does not count.
    """
    publish(DiskCache(tmp_path), "key-1", b"1")
    assert prune_disk(tmp_path, events, interval_s=HOUR).skipped is None
    assert prune_disk(tmp_path, events, interval_s=HOUR).skipped is not None
    assert prune_disk(tmp_path, events).skipped is None
    ahead = {"kind": "collection", "collected_s": DiskCache(tmp_path).now_s() + 2 * DAY}
    data = encode_manifest(complete_payload(COLLECTION_KEY, ahead, {}))
    DiskCache(tmp_path).write_manifest(COLLECTION_KEY, data)
    assert prune_disk(tmp_path, events, interval_s=HOUR).skipped is None
    for bad in (b"garbage", make_manifest(COLLECTION_KEY, 1)):
        DiskCache(tmp_path).write_manifest(COLLECTION_KEY, bad)
        assert prune_disk(tmp_path, events, interval_s=HOUR).skipped is None


def test_a_directory_that_cannot_be_written_is_left_alone(
    tmp_path: Path, events: list[Event]
) -> None:
    (tmp_path / "file").write_text("no directory")
    tiers = [MemoryCache(), DiskCache(tmp_path / "file")]
    assert prune(tiers, emit=events.append, max_bytes=1, max_age_s=1.0) == []
    assert events == []


def collector_of(root: Path, events: list[Event], **settings: Any) -> Collector:
    return Collector(
        [MemoryCache(), DiskCache(root)],
        events.append,
        time.monotonic,
        **{"max_bytes": 1, "max_age_s": None, "delay_s": 0.0, **settings},
    )


def test_publishing_collects_behind_the_callers_back(tmp_path: Path, events: list[Event]) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1")
    make_older(tmp_path, DAY)
    collector = collector_of(tmp_path, events)
    for _ in range(3):
        collector.note_publish()
    wait_until(lambda: any(isinstance(event, CacheCollected) for event in events))
    collector.close()
    assert keys_of(tmp_path) == set()
    assert sum(isinstance(event, CacheCollected) for event in events) == 1
    assert list((tmp_path / "v1" / "lease").iterdir()) == []


def test_closing_calls_a_collection_off(tmp_path: Path, events: list[Event]) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1")
    make_older(tmp_path, DAY)
    collector = collector_of(tmp_path, events, delay_s=1000.0)
    collector.note_publish()
    collector.close()
    collector.note_publish()
    assert keys_of(tmp_path) == {"key-1"}
    assert not any(thread.name == "precast-collect" for thread in threading.enumerate())


def test_a_bounded_cache_collects_by_itself(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(DiskCache(tmp_path), "key-1", b"1")
    make_older(tmp_path, DAY)
    _, storage = open_cache(
        tmp_path, disabled=False, emit=events.append, clock=time.monotonic, max_bytes=1
    )
    storage.publish("key-2", {}, {"file": b"2"})
    wait_until(lambda: any(isinstance(event, CacheCollected) for event in events))
    storage.close()
    assert keys_of(tmp_path) == {"key-2"}


def test_of_a_chain_the_disk_is_bounded_and_nothing_else(
    tmp_path: Path, events: list[Event]
) -> None:
    for name in ("disk", "far"):
        publish(DiskCache(tmp_path / name), "key-1", b"1")
        make_older(tmp_path / name, DAY)
    _, storage = open_cache(
        tmp_path / "disk",
        disabled=False,
        emit=events.append,
        clock=time.monotonic,
        cache_url=f"disk,disk:{tmp_path / 'far'}?shared=1&write=now,file://{tmp_path}/store",
        max_bytes=1,
    )
    storage.publish("key-2", {}, {"file": b"2"})
    wait_until(lambda: any(isinstance(event, CacheCollected) for event in events))
    storage.close()
    assert [event.tier for event in events if isinstance(event, CacheCollected)] == ["disk"]
    assert keys_of(tmp_path / "disk") == {"key-2"}
    assert keys_of(tmp_path / "far") == {"key-1", "key-2"}


def test_ten_thousand_entries_are_pruned_while_they_are_read(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    """
    A reader between manifest and blob finds a miss, never a wrong byte, and never an exception.
    """
    number = 10_000
    cache = DiskCache(tmp_path)
    monkey_fsync, os.fsync = os.fsync, lambda _: None  # Minutes of writing through, for nothing.
    try:
        for i in range(number):
            publish(cache, f"key-{i}", b"%d" % i)
    finally:
        os.fsync = monkey_fsync
    make_older(tmp_path, DAY)
    loader, _ = open_cache(tmp_path, disabled=False, emit=events.append, clock=clock)
    is_done = threading.Event()
    wrong: list[object] = []
    found = [0, 0]

    def read() -> None:
        i = 0
        while not is_done.is_set():
            i = (i + 7918) % number  # Even ones only: what is read meanwhile is young again.
            try:
                manifest = loader.manifest(f"key-{i}")
                files = None if manifest is None else loader.files(manifest["files"])
                if files is not None:
                    with suppress(FileNotFoundError):  # It went after it was handed out.
                        if Path(files["piece.so"]).read_bytes() != b"%d" % i:
                            wrong.append(i)
                found[files is not None] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it is wrong
                wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    pruned = prune_disk(tmp_path, events, max_bytes=1)
    is_done.set()
    reader.join()
    assert wrong == []
    assert found[1] > 0
    assert len(pruned.keys) + len(keys_of(tmp_path)) == number
    assert len(pruned.keys) >= number / 2
    bad = [event for event in events if isinstance(event, TierFailed)]
    assert bad == []
