from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from precast.cache import DiskCache
from precast.cache.interface import CacheInterface
from precast.errors import StoreError
from precast.testing import BLOB, DIGEST, KEY, CacheContract, every_fault, make_manifest


class TestDiskCache(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return DiskCache(tmp_path / "root")


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def test_values_lie_where_the_specification_says(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    cache.write_manifest(KEY, b"manifest")
    blob = tmp_path / "v1" / "cas" / "sha256" / DIGEST[:2] / DIGEST
    assert blob.read_bytes() == BLOB
    assert (tmp_path / "v1" / "ac" / KEY[:2] / f"{KEY}.json").read_bytes() == b"manifest"
    assert cache.local_blob_path(DIGEST) == str(blob)


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "a" / "b")
    assert cache.read_manifest(KEY) is None
    assert list(cache.manifest_keys()) == []
    assert cache.is_writable
    assert list(tmp_path.iterdir()) == []


def test_only_the_user_may_enter(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "root")
    cache.write_blob(DIGEST, BLOB)
    cache.write_manifest(KEY, b"manifest")
    cache.link_tree({"a": DIGEST})
    for path in [tmp_path / "root", *(tmp_path / "root").rglob("*")]:
        allowed = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == allowed, path


def test_a_tree_shares_the_blobs_bytes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    for _ in range(2):
        directory = Path(cache.link_tree({"a.so": DIGEST, "b.so": DIGEST}))
        assert (directory / "a.so").samefile(str(cache.local_blob_path(DIGEST)))
        assert (directory / "b.so").samefile(str(cache.local_blob_path(DIGEST)))
        assert files_in(tmp_path / "v1" / "tmp") == []


def test_a_tree_is_mended_from_its_blobs(tmp_path: Path) -> None:
    """
    A file in it may be damaged, gone, or still another name of a blob that was set aside.
    """
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    files = {"a.so": DIGEST, "b.so": DIGEST, "c.so": DIGEST}
    directory = Path(cache.link_tree(files))
    (directory / "a.so").unlink()
    (directory / "b.so").unlink()
    (directory / "b.so").write_bytes(b"damaged")
    (directory / "c.so").unlink()
    (directory / "c.so").mkdir()
    assert cache.link_tree(files) == str(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == dict.fromkeys(
        files, BLOB
    )

    Path(str(cache.local_blob_path(DIGEST))).write_bytes(bytes(len(BLOB)))
    cache.quarantine_blob(DIGEST, "for the test")
    cache.write_blob(DIGEST, BLOB)
    cache.link_tree(files)
    assert (directory / "a.so").read_bytes() == BLOB
    assert (directory / "a.so").samefile(str(cache.local_blob_path(DIGEST)))


def test_without_hard_links_a_tree_holds_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    directory = Path(cache.link_tree({"a.so": DIGEST}))
    first = (directory / "a.so").stat()
    cache.link_tree({"a.so": DIGEST})
    assert (directory / "a.so").stat().st_ino == first.st_ino  # A sound copy is left alone.
    (directory / "a.so").write_bytes(bytes(len(BLOB)))
    cache.link_tree({"a.so": DIGEST})
    assert (directory / "a.so").read_bytes() == BLOB


def test_a_tree_of_a_blob_that_is_gone_is_an_error(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    with pytest.raises(StoreError, match="link tree"):
        cache.link_tree({"a.so": DIGEST})
    with pytest.raises(ValueError, match="not a file name"):
        cache.link_tree({"../a.so": DIGEST})


def test_writing_a_blob_again_mends_it_or_leaves_the_file_alone(tmp_path: Path) -> None:
    """
    Others may have mapped it: a sound one stays the same file.
    """
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    path = Path(str(cache.local_blob_path(DIGEST)))
    inode = path.stat().st_ino
    cache.write_blob(DIGEST, BLOB)
    assert path.stat().st_ino == inode
    for damage in (b"", BLOB[:-1], bytes(len(BLOB))):
        path.write_bytes(damage)
        cache.write_blob(DIGEST, BLOB)
        assert path.read_bytes() == BLOB


def test_a_folder_where_a_file_belongs_is_damage_that_can_be_set_aside(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    path = Path(str(cache.local_blob_path(DIGEST)))
    path.unlink()
    (path / "nested").mkdir(parents=True)
    assert cache.read_blob(DIGEST) == b""
    cache.write_blob(DIGEST, BLOB)
    assert cache.read_blob(DIGEST) == BLOB


def test_quarantine_keeps_the_bytes_and_the_reason(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write_blob(DIGEST, BLOB)
    place = Path(cache.quarantine_blob(DIGEST, "it smelled"))
    assert place.parent == tmp_path / "v1" / "quarantine"
    assert place.read_bytes() == BLOB
    assert place.with_name(place.name + ".reason").read_text() == "it smelled\n"


def test_another_versions_bucket_is_not_looked_at(tmp_path: Path) -> None:
    other = tmp_path / "v2" / "ac" / KEY[:2] / f"{KEY}.json"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of the future")
    cache = DiskCache(tmp_path)
    assert cache.read_manifest(KEY) is None
    cache.write_manifest(KEY, b"mine")
    assert other.read_bytes() == b"of the future"


def test_what_does_not_belong_is_not_listed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write_manifest(KEY, b"manifest")
    shard = tmp_path / "v1" / "ac" / KEY[:2]
    (shard / "README").write_text("?")
    (shard / "NOT A KEY.json").write_text("?")
    (tmp_path / "v1" / "ac" / "stray").write_text("?")
    assert list(cache.manifest_keys()) == [KEY]


def test_what_killed_writers_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    DiskCache(tmp_path).write_manifest(KEY, b"1")
    folder = tmp_path / "v1" / "tmp"
    old, new = folder / "1-dead", folder / "2-alive"
    for path, age_s in ((old, 3700), (new, 3500)):
        path.write_bytes(b"half of a valu")
        now = path.stat().st_mtime
        os.utime(path, (now - age_s, now - age_s))
    DiskCache(tmp_path).write_manifest(KEY, b"2")
    assert files_in(folder) == [new]


def test_sweeping_goes_by_the_clock_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A machine whose clock is two days ahead must not take away what others are writing.
    """
    DiskCache(tmp_path).write_manifest(KEY, b"1")
    alive = tmp_path / "v1" / "tmp" / "1-alive"
    alive.write_bytes(b"half of a valu")
    monkeypatch.setattr("time.time", lambda: alive.stat().st_mtime + 2 * 86400)
    DiskCache(tmp_path).write_manifest(KEY, b"2")
    assert files_in(tmp_path / "v1" / "tmp") == [alive]


@pytest.mark.parametrize("place", ["file", "file/root", "file/a/b"])
def test_an_impossible_root_reads_empty_and_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("I am no directory")
    cache = DiskCache(tmp_path / place)
    assert cache.is_writable is False
    assert cache.read_manifest(KEY) is None
    assert cache.read_blob(DIGEST) is None
    assert cache.has_blob(DIGEST) is False
    assert list(cache.manifest_keys()) == []
    cache.delete_manifest(KEY)
    for write in (
        lambda: cache.write_manifest(KEY, b"manifest"),
        lambda: cache.write_blob(DIGEST, BLOB),
        lambda: cache.link_tree({"a": DIGEST}),
    ):
        with pytest.raises(StoreError, match="disk"):
            write()
    assert files_in(tmp_path) == [tmp_path / "file"]


def test_a_root_that_vanishes_is_made_again(tmp_path: Path) -> None:
    """
    People delete caches while programs run.
    """
    cache = DiskCache(tmp_path / "root")
    cache.write_manifest(KEY, b"1")
    (tmp_path / "root").rename(tmp_path / "gone")
    assert cache.read_manifest(KEY) is None
    cache.write_manifest(KEY, b"2")
    assert cache.read_manifest(KEY) == b"2"


OLD, NEW = make_manifest(KEY, "old"), make_manifest(KEY, "new" * 100)


@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_a_write_may_fail_at_any_step(tmp_path: Path, error_number: int, lasting: bool) -> None:
    """
    Whichever step fails, old or new is there, whole; and nothing else, if cleaning up can work.
    """
    seen = set()
    for fault in every_fault(error_number=error_number, lasting=lasting):
        root = tmp_path / str(fault.n)
        DiskCache(root).write_manifest(KEY, OLD)
        cache = DiskCache(root)
        with fault, suppress(StoreError):
            cache.write_manifest(KEY, NEW)
        seen.add(fault.operation)
        assert cache.read_manifest(KEY) in (OLD, NEW)
        assert len(files_in(root)) == 1 or (lasting and len(files_in(root)) == 2)
    assert {"open", "write", "fsync", "close", "replace", None} <= seen


@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_the_first_write_may_fail_at_any_step(tmp_path: Path, error_number: int) -> None:
    """
    With folders still to be made: then the value is there, whole, or not at all.
    """
    seen = set()
    for fault in every_fault(error_number=error_number):
        cache = DiskCache(tmp_path / str(fault.n))
        has_failed = False
        with fault:
            try:
                cache.write_blob(DIGEST, BLOB)
            except StoreError as error:
                has_failed = True
                assert os.strerror(error_number) in str(error)
        seen.add(fault.operation)
        assert cache.read_blob(DIGEST) == (None if has_failed else BLOB)
        assert len(files_in(tmp_path / str(fault.n))) == (0 if has_failed else 1)
        cache.write_blob(DIGEST, BLOB)
        assert cache.read_blob(DIGEST) == BLOB
    assert {"mkdir", "open", "write", "fsync", "replace", None} <= seen


def test_any_operation_may_fail_at_any_step(tmp_path: Path) -> None:
    """
    Nothing but `StoreError` comes out, values stay whole, and the next try works.
    """
    calls: list[tuple[Any, ...]] = [
        ("read_manifest", KEY),
        ("read_blob", DIGEST),
        ("has_blob", DIGEST),
        ("manifest_keys",),
        ("link_tree", {"a.so": DIGEST, "b.so": DIGEST}),
        ("quarantine_manifest", KEY, "reason"),
        ("quarantine_blob", DIGEST, "reason"),
        ("write_manifest", KEY, OLD),
        ("delete_manifest", KEY),
    ]
    for fault in every_fault():
        root = tmp_path / str(fault.n)
        DiskCache(root).write_manifest(KEY, OLD)
        DiskCache(root).write_blob(DIGEST, BLOB)
        cache = DiskCache(root)
        with fault:
            for method, *args in calls:
                with suppress(StoreError):
                    result = getattr(cache, method)(*args)
                    if method == "manifest_keys":
                        list(result)
        assert cache.read_manifest(KEY) in (None, OLD)
        assert cache.read_blob(DIGEST) in (None, BLOB)
        assert files_in(root / "v1" / "tmp") == []
        cache.write_manifest(KEY, NEW)
        cache.write_blob(DIGEST, BLOB)
        directory = Path(cache.link_tree({"a.so": DIGEST, "b.so": DIGEST}))
        assert {path.read_bytes() for path in files_in(directory)} == {BLOB}


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    cache = DiskCache(tmp_path)
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.write_blob(sha256(b"x").hexdigest(), b"x")
    assert files_in(tmp_path) == []
