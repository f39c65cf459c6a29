from __future__ import annotations

import errno
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.errors import Reason, StoreError
from precast.events import ArtifactPublished, ArtifactQuarantined, Event, TierFailed
from precast.testing import BLOB, DIGEST, KEY, every_fault

Clock = Callable[[], float]
OpenPair = Callable[[], tuple[CacheLoader, CacheStorage]]


class RecordingCache(MemoryCache):
    """Notes what is written, in order; fails at the `fail_at`-th write."""

    is_in_memory = False

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.writes: list[str] = []
        self._fail_at = fail_at

    def write_manifest(self, key: str, data: bytes) -> None:
        self._note("manifest")
        super().write_manifest(key, data)

    def write_blob(self, digest: str, data: bytes) -> None:
        self._note("blob")
        super().write_blob(digest, data)

    def _note(self, kind: str) -> None:
        self.writes.append(kind)
        if len(self.writes) == self._fail_at:
            raise StoreError(self.name, f"write {kind}", "on purpose")


def test_the_manifest_comes_last(events: list[Event], clock: Clock) -> None:
    tier = RecordingCache()
    CacheStorage([tier], events.append, clock).publish(KEY, {}, {"a": b"1", "b": b"2", "c": b"2"})
    assert tier.writes == ["blob", "blob", "manifest"]  # Equal files are one blob.


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_tier_that_fails_gets_no_manifest_and_the_others_all(
    events: list[Event], clock: Clock, fail_at: int
) -> None:
    bad, good = RecordingCache(fail_at), RecordingCache()
    CacheStorage([bad, good], events.append, clock).publish(KEY, {}, {"a": b"1", "b": b"2"})
    assert bad.read_manifest(KEY) is None
    assert good.read_manifest(KEY) is not None
    assert len(bad.writes) == fail_at
    assert [type(event) for event in events] == [TierFailed, ArtifactPublished]


def test_same_input_same_bytes(tmp_path: Path, events: list[Event], clock: Clock) -> None:
    trees = []
    for i, (payload, files) in enumerate(
        [
            ({"a": 1, "b": {"x": [1, 2], "y": None}}, {"p.so": BLOB, "q": b"q"}),
            ({"b": {"y": None, "x": (1, 2)}, "a": 1}, {"q": b"q", "p.so": BLOB}),
        ]
    ):
        disk = DiskCache(tmp_path / str(i))
        CacheStorage([disk], events.append, clock).publish(KEY, payload, files)
        trees.append(
            {
                path.relative_to(disk.root): path.read_bytes()
                for path in Path(disk.root).rglob("*")
                if path.is_file()
            }
        )
    assert trees[0] == trees[1]
    assert len(trees[0]) == 3


def test_what_is_returned_is_what_will_be_loaded(open_pair: OpenPair) -> None:
    published = open_pair()[1].publish(KEY, {"shape": (1, 2)}, {"piece.so": BLOB})
    assert published["shape"] == [1, 2]
    assert published["files"] == {"piece.so": DIGEST}
    assert published["sizes"] == {"piece.so": len(BLOB)}
    assert open_pair()[0].manifest(KEY) == published


def test_files_can_be_given_as_paths(tmp_path: Path, open_pair: OpenPair) -> None:
    source = tmp_path / "built.so"
    source.write_bytes(BLOB)
    loader, storage = open_pair()
    assert storage.publish(KEY, {}, {"piece.so": source})["files"] == {"piece.so": DIGEST}
    source.unlink()
    assert loader.blob(DIGEST) == BLOB


def test_what_is_published_is_reported_with_its_size(
    open_pair: OpenPair, events: list[Event], root: Path
) -> None:
    open_pair()[1].publish(KEY, {}, {"piece.so": BLOB})
    [event] = events  # Not for the memory tier, where nobody else could find it.
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert event == ArtifactPublished(KEY, "disk", size, 1.0)


def test_memory_keeps_the_manifest_but_not_what_the_disk_keeps(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    memory = MemoryCache()
    tiers = [memory, DiskCache(tmp_path)]
    CacheStorage(tiers, events.append, clock).publish(KEY, {}, {"piece.so": BLOB})
    assert memory.read_manifest(KEY) is not None
    assert not memory.has_blob(DIGEST)


def test_when_the_disk_is_impossible_this_process_has_it_all_the_same(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    (tmp_path / "file").write_text("I am no directory")
    tiers = [MemoryCache(), DiskCache(tmp_path / "file" / "root")]
    published = CacheStorage(tiers, events.append, clock).publish(KEY, {}, {"piece.so": BLOB})
    [event] = events
    assert isinstance(event, TierFailed)
    assert (event.tier, event.reason.code) == ("disk", "tier-failed")
    loader = CacheLoader(tiers, events.append, clock)
    assert loader.manifest(KEY) == published
    paths = loader.files(published["files"])
    assert paths is not None
    assert Path(paths["piece.so"]).read_bytes() == BLOB
    loader.close()


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_publishing_may_fail_at_any_step(
    tmp_path: Path, events: list[Event], clock: Clock, error_number: int, lasting: bool
) -> None:
    """
    It never raises. Another process then finds all of it or nothing, and this one all of it.
    """
    for fault in every_fault(error_number=error_number, lasting=lasting):
        events.clear()
        disk = DiskCache(tmp_path / str(fault.n))
        tiers = [MemoryCache(), disk]
        storage = CacheStorage(tiers, events.append, clock)
        with fault:
            published = storage.publish(KEY, {}, {"piece.so": BLOB})
        own, other = (CacheLoader(t, lambda _: None, clock) for t in (tiers, [disk]))
        is_published = any(isinstance(event, ArtifactPublished) for event in events)
        assert is_published != any(isinstance(event, TierFailed) for event in events)
        assert (other.manifest(KEY) == published) == is_published
        for loader in (own, other) if is_published else (own,):
            assert loader.manifest(KEY) == published
            paths = loader.files(published["files"])
            assert paths is not None
            assert Path(paths["piece.so"]).read_bytes() == BLOB
        own.close()


def test_a_discarded_key_is_gone_and_its_blobs_stay(open_pair: OpenPair) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, {"piece.so": BLOB})
    storage.discard(KEY)
    for each in (loader, open_pair()[0]):
        assert each.manifest(KEY) is None
        assert each.blob(DIGEST) == BLOB


def test_a_quarantined_key_is_gone_and_reported(
    open_pair: OpenPair, events: list[Event], root: Path
) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, {"piece.so": BLOB})
    events.clear()
    reason = Reason("artifact-incompatible", "it needs avx512", "Nothing needs to be done")
    storage.quarantine(KEY, reason)
    assert [(event.tier, event.reason) for event in events] == [  # type: ignore[attr-defined]
        ("memory", reason),
        ("disk", reason),
    ]
    assert isinstance(events[1], ArtifactQuarantined)
    assert "avx512" in (Path(events[1].path + ".reason")).read_text()
    assert Path(events[1].path).parent == root / "v1" / "quarantine"
    assert loader.manifest(KEY) is None
    events.clear()
    storage.quarantine(sha256(b"unknown").hexdigest(), reason)
    assert events == []


def test_what_cannot_be_stored_anywhere_is_refused_before_anything_is_written(
    open_pair: OpenPair, root: Path
) -> None:
    _, storage = open_pair()
    with pytest.raises(ValueError, match="key"):
        storage.publish("NO", {}, {})
    with pytest.raises(ValueError, match="leave it out"):
        storage.publish(KEY, {"key": "mine"}, {})
    with pytest.raises(ValueError, match="file name"):
        storage.publish(KEY, {}, {"a/b": b""})
    with pytest.raises(TypeError):
        storage.publish(KEY, {"x": object()}, {})
    with pytest.raises(FileNotFoundError):
        storage.publish(KEY, {}, {"a": root / "missing"})
    with pytest.raises(ValueError, match="key"):
        storage.discard("NO")
    assert not root.exists()
