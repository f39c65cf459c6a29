from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

import precast.cache.loader as loader_module
from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.events import ArtifactQuarantined, CacheHit, CacheMiss, Event, TierFailed
from precast.testing import BLOB, DIGEST, KEY, every_fault, make_manifest

Clock = Callable[[], float]
OpenPair = Callable[[], tuple[CacheLoader, CacheStorage]]
FILES = {"piece.so": BLOB, "kernel.cubin": b"kernel" * 1000}
DIGESTS = {name: sha256(data).hexdigest() for name, data in FILES.items()}


def read(paths: dict[str, str] | None) -> dict[str, bytes] | None:
    return (
        None if paths is None else {name: Path(path).read_bytes() for name, path in paths.items()}
    )


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


def test_what_was_published_is_found(open_pair: OpenPair, events: list[Event]) -> None:
    published = open_pair()[1].publish(KEY, {"compiler": "eager"}, FILES)
    events.clear()
    loader, _ = open_pair()
    assert loader.manifest(KEY) == published
    assert read(loader.files(published["files"])) == FILES
    assert loader.blob(DIGEST) == BLOB
    [hit] = events
    assert isinstance(hit, CacheHit)
    assert (hit.key, hit.tier, hit.seconds) == (KEY, "disk", 1.0)
    assert hit.num_bytes > 100


def test_the_second_look_is_answered_from_memory(open_pair: OpenPair, events: list[Event]) -> None:
    open_pair()[1].publish(KEY, {}, {})
    loader, _ = open_pair()
    loader.manifest(KEY)
    events.clear()
    loader.manifest(KEY)
    [hit] = events
    assert isinstance(hit, CacheHit)
    assert hit.tier == "memory"


def test_nothing_known_is_a_miss(open_pair: OpenPair, events: list[Event], root: Path) -> None:
    loader, _ = open_pair()
    assert loader.manifest(KEY) is None
    assert loader.files(DIGESTS) is None
    assert loader.blob(DIGEST) is None
    assert set(kinds(events)) == {CacheMiss}
    assert not root.exists()


def test_one_file_is_handed_out_where_it_lies(open_pair: OpenPair, root: Path) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, {"piece.so": BLOB})
    assert loader.files({"piece.so": DIGEST}) == {
        "piece.so": str(root / "v1" / "cas" / "sha256" / DIGEST[:2] / DIGEST)
    }


def test_one_file_can_have_its_name(open_pair: OpenPair, root: Path) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, {"piece.so": BLOB})
    paths = loader.files({"piece.so": DIGEST}, as_tree=True)
    assert paths is not None
    path = Path(paths["piece.so"])
    assert path.name == "piece.so"
    assert path.is_relative_to(root / "v1" / "tree")
    assert path.samefile(root / "v1" / "cas" / "sha256" / DIGEST[:2] / DIGEST)


def test_several_files_lie_in_one_folder_under_their_names(open_pair: OpenPair) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, FILES)
    paths = loader.files(DIGESTS)
    assert paths is not None
    assert {Path(path).name for path in paths.values()} == FILES.keys()
    assert len({Path(path).parent for path in paths.values()}) == 1
    assert loader.files(DIGESTS) == paths
    assert loader.files({}) == {}


def test_each_file_is_hashed_once(open_pair: OpenPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    However often and under whatever names it is handed out, until it changes.
    """
    open_pair()[1].publish(KEY, {}, FILES)
    hashed = []

    def counting_sha256() -> object:
        hashed.append(1)
        return sha256()

    monkeypatch.setattr(loader_module, "sha256", counting_sha256)
    loader, _ = open_pair()
    for _ in range(3):
        paths = loader.files(DIGESTS)
        assert loader.files({"piece.so": DIGEST}) is not None
    assert len(hashed) == 2
    assert paths is not None
    os.utime(paths["piece.so"], ns=(1, 1))
    assert loader.files(DIGESTS) == paths
    assert len(hashed) == 3


def damages(data: bytes) -> dict[str, bytes | None]:
    """Return ways in which stored bytes can be wrong; None: the file is gone."""
    half = len(data) // 2
    return {
        "first byte": bytes([data[0] ^ 1]) + data[1:],
        "header": data[:20] + bytes([data[20] ^ 0x10]) + data[21:],
        "middle": data[:half] + bytes([data[half] ^ 0x80]) + data[half + 1 :],
        "last byte": data[:-1] + bytes([data[-1] ^ 1]),
        "truncated": data[:half],
        "a byte short": data[:-1],
        "a byte long": data + b"\0",
        "empty": b"",
        "zeros": bytes(len(data)),
        "gone": None,
    }


DAMAGES = sorted(damages(bytes(100)))


def damage(path: Path, how: str) -> None:
    data = damages(path.read_bytes())[how]
    path.unlink()
    if data is not None:
        path.write_bytes(data)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_manifest_is_set_aside_and_published_again(
    open_pair: OpenPair, events: list[Event], root: Path, how: str
) -> None:
    published = open_pair()[1].publish(KEY, {"note": "x" * 1000}, FILES)
    path = root / "v1" / "ac" / KEY[:2] / f"{KEY}.json"
    damage(path, how)
    events.clear()
    loader, storage = open_pair()
    assert loader.manifest(KEY) is None
    assert kinds(events) == ([] if how == "gone" else [ArtifactQuarantined]) + [CacheMiss]
    assert not path.exists()
    if isinstance(events[0], ArtifactQuarantined):
        assert events[0].tier == "disk"
        assert events[0].reason.code == "artifact-corrupt"
        assert Path(events[0].path).parent == root / "v1" / "quarantine"
    storage.publish(KEY, {"note": "x" * 1000}, FILES)
    assert open_pair()[0].manifest(KEY) == published


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("names", [["piece.so"], ["piece.so", "kernel.cubin"]], ids=["1", "2"])
def test_a_damaged_blob_is_set_aside_and_published_again(
    open_pair: OpenPair, events: list[Event], root: Path, how: str, names: list[str]
) -> None:
    files = {name: FILES[name] for name in names}
    digests = {name: DIGESTS[name] for name in names}
    loader, storage = open_pair()
    storage.publish(KEY, {}, files)
    assert loader.files(digests) is not None  # So that there is a tree from before.
    damage(root / "v1" / "cas" / "sha256" / DIGEST[:2] / DIGEST, how)
    events.clear()
    loader, storage = open_pair()
    assert loader.files(digests) is None
    assert kinds(events) == ([] if how == "gone" else [ArtifactQuarantined]) + [CacheMiss]
    events.clear()
    assert loader.blob(DIGEST) is None
    storage.publish(KEY, {}, files)
    for again in (loader, open_pair()[0]):
        assert read(again.files(digests)) == files


def test_a_blob_that_is_damaged_in_place_is_noticed_by_a_running_loader(
    open_pair: OpenPair, root: Path, events: list[Event]
) -> None:
    """
    The file in the tree is the same file: it must not be handed out either.
    """
    loader, storage = open_pair()
    storage.publish(KEY, {}, FILES)
    paths = loader.files(DIGESTS)
    assert paths is not None
    before = Path(paths["piece.so"]).stat()
    Path(paths["piece.so"]).write_bytes(bytes(len(BLOB)))
    os.utime(paths["piece.so"], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert loader.files(DIGESTS) is None
    assert ArtifactQuarantined in kinds(events)
    storage.publish(KEY, {}, FILES)
    assert read(loader.files(DIGESTS)) == FILES


def test_damage_in_a_tree_is_mended(open_pair: OpenPair) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, FILES)
    paths = loader.files(DIGESTS)
    assert paths is not None
    for how in DAMAGES:
        damage(Path(paths["kernel.cubin"]), how)
        assert read(open_pair()[0].files(DIGESTS)) == FILES
        assert read(loader.files(DIGESTS)) == FILES


def test_a_folder_in_place_of_a_blob_is_set_aside(
    open_pair: OpenPair, events: list[Event], root: Path
) -> None:
    loader, storage = open_pair()
    storage.publish(KEY, {}, {"piece.so": BLOB})
    path = root / "v1" / "cas" / "sha256" / DIGEST[:2] / DIGEST
    path.unlink()
    path.mkdir()
    events.clear()
    assert loader.files({"piece.so": DIGEST}) is None
    assert kinds(events) == [ArtifactQuarantined, CacheMiss]


def test_a_sound_copy_in_another_tier_takes_the_place_of_a_damaged_one(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    disk, memory = DiskCache(tmp_path), MemoryCache()
    disk.write_blob(DIGEST, BLOB[:-1])
    memory.write_blob(DIGEST, BLOB)
    loader = CacheLoader([disk, memory], events.append, clock)
    assert loader.files({"piece.so": DIGEST}) == {"piece.so": disk.local_blob_path(DIGEST)}
    assert disk.read_blob(DIGEST) == BLOB
    assert kinds(events) == [ArtifactQuarantined]


@pytest.mark.parametrize("as_tree", [False, True])
def test_without_a_disk_files_lie_in_a_private_folder(
    events: list[Event], clock: Clock, as_tree: bool
) -> None:
    tiers = [MemoryCache()]
    CacheStorage(tiers, events.append, clock).publish(KEY, {}, {"piece.so": BLOB})
    loader = CacheLoader(tiers, events.append, clock)
    paths = loader.files({"piece.so": DIGEST}, as_tree=as_tree)
    assert read(paths) == {"piece.so": BLOB}
    assert paths is not None
    folder = Path(paths["piece.so"])
    while not folder.name.startswith("precast-"):
        folder = folder.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    loader.close()
    assert not folder.exists()
    loader.close()


def test_a_read_only_disk_is_used_as_it_is(
    open_pair: OpenPair, root: Path, events: list[Event], clock: Clock
) -> None:
    """
    Files are opened where they lie; what must be arranged is arranged in a private folder.
    """
    open_pair()[1].publish(KEY, {}, FILES)
    events.clear()
    before = sorted(root.rglob("*"))
    loader = CacheLoader([ReadOnlyDisk(root)], events.append, clock)
    assert loader.manifest(KEY) is not None
    paths = loader.files({"piece.so": DIGEST})
    assert paths is not None
    assert Path(paths["piece.so"]).is_relative_to(root)
    tree = loader.files(DIGESTS)
    assert read(tree) == FILES
    assert tree is not None
    assert not Path(tree["piece.so"]).is_relative_to(root)
    loader.close()
    assert sorted(root.rglob("*")) == before
    assert kinds(events) == [CacheHit]


class ReadOnlyDisk(DiskCache):
    """Refuses what a read-only file system refuses; root may write wherever bits forbid it."""

    is_writable = False  # type: ignore[assignment]

    def _refuse(self, *_: object) -> None:
        with self._store_errors("write"):
            raise OSError(30, "Read-only file system")

    _write_file = _make_folder = _replace = _refuse  # type: ignore[assignment]


def test_what_a_read_only_disk_lacks_lies_in_a_private_folder(
    tmp_path: Path, events: list[Event], clock: Clock
) -> None:
    """
    That it cannot be written is no failure.
    """
    memory = MemoryCache()
    memory.write_blob(DIGEST, BLOB)
    loader = CacheLoader([memory, ReadOnlyDisk(tmp_path)], events.append, clock)
    assert read(loader.files({"piece.so": DIGEST})) == {"piece.so": BLOB}
    assert events == []
    loader.close()


@pytest.mark.parametrize("how", ["wrong bytes", "no file", "exception"])
def test_a_tier_whose_trees_are_bad_is_not_trusted(
    tmp_path: Path, events: list[Event], clock: Clock, how: str
) -> None:
    """
    Its blob is not to blame: the files lie in a private folder then.
    """

    class BadTrees(DiskCache):
        def link_tree(self, files: Mapping[str, str]) -> str:
            if how == "exception":
                raise RuntimeError("a bug")
            directory = super().link_tree(files)
            (Path(directory) / "piece.so").unlink()
            if how == "wrong bytes":
                (Path(directory) / "piece.so").write_bytes(bytes(len(BLOB)))
            return directory

    disk = BadTrees(tmp_path)
    disk.write_blob(DIGEST, BLOB)
    loader = CacheLoader([disk], events.append, clock)
    assert read(loader.files({"piece.so": DIGEST}, as_tree=True)) == {"piece.so": BLOB}
    assert kinds(events) == [TierFailed]
    assert disk.has_blob(DIGEST)
    loader.close()


def test_what_a_damaged_manifest_names_leads_nowhere(
    open_pair: OpenPair, events: list[Event]
) -> None:
    loader, _ = open_pair()
    for files in ({"../a": DIGEST}, {"a": "../../etc/passwd"}, {"a": DIGEST[:-1]}, {"": DIGEST}):
        assert loader.files(files) is None
    assert loader.blob("../../etc/passwd") is None
    assert kinds(events) == [CacheMiss] * 5


def test_a_manifest_of_another_key_is_no_hit(
    open_pair: OpenPair, root: Path, events: list[Event]
) -> None:
    """
    A file that was copied under another name would be a false hit.
    """
    disk = DiskCache(root)
    disk.write_manifest(KEY, make_manifest(sha256(b"another").hexdigest(), 1))
    assert open_pair()[0].manifest(KEY) is None
    assert kinds(events) == [ArtifactQuarantined, CacheMiss]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_reading_may_fail_at_any_step(
    tmp_path: Path, events: list[Event], clock: Clock, lasting: bool
) -> None:
    """
    It is right or None, never an exception, and a failure is reported; then all is well again.
    """
    for fault in every_fault(lasting=lasting):
        tiers = [DiskCache(tmp_path / str(fault.n))]
        CacheStorage(tiers, events.append, clock).publish(KEY, {}, FILES)
        events.clear()
        loader = CacheLoader(tiers, events.append, clock)
        with fault:
            manifest = loader.manifest(KEY)
            paths = loader.files(DIGESTS)
            blob = loader.blob(DIGEST)
        assert manifest is None or manifest["files"] == DIGESTS
        assert blob in (None, BLOB)
        with suppress(FileNotFoundError):
            assert read(paths) in (None, FILES)
        if None in (manifest, paths, blob):
            assert TierFailed in kinds(events)
        assert ArtifactQuarantined not in kinds(events)
        assert loader.manifest(KEY) is not None
        assert read(loader.files(DIGESTS)) == FILES
        loader.close()
