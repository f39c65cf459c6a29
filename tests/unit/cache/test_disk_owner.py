"""The disk tier is read only where nobody else can have put code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from precast.cache import CacheLoader, CacheStorage, DiskCache, open_cache
from precast.cache.interface import CacheInterface
from precast.cache.trust import SigningKey, Trust
from precast.errors import UnsafeStoreError
from precast.events import ArtifactQuarantined, Event, TierFailed
from precast.testing import BLOB, DIGEST, KEY, CacheContract

STRANGER = 4242
FILES = {"piece.so": BLOB}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def filled(root: Path) -> Path:
    open_cache(root, disabled=False, emit=lambda _: None, clock=lambda: 0.0)[1].publish(
        KEY, {}, FILES
    )
    return root


def world_writable(root: Path) -> None:
    root.chmod(0o777)


def group_writable(root: Path) -> None:
    root.chmod(0o770)


def bucket_writable(root: Path) -> None:
    root.chmod(0o755)
    (root / "v1").chmod(0o777)


def bucket_sticky(root: Path) -> None:
    root.chmod(0o755)
    (root / "v1").chmod(0o1777)


def foreign(root: Path) -> None:
    os.chown(root, STRANGER, STRANGER)


def foreign_bucket(root: Path) -> None:
    os.chown(root / "v1", STRANGER, STRANGER)


def foreign_link(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    root.symlink_to(root.with_name("elsewhere"))
    os.chown(root, STRANGER, STRANGER, follow_symlinks=False)


def link_to_foreign(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    root.symlink_to(root.with_name("elsewhere"))
    os.chown(root, STRANGER, STRANGER)


def manifest_writable(root: Path) -> None:
    for path in (root, root / "v1"):
        path.chmod(0o755)
    next((root / "v1" / "ac").rglob("*.json")).chmod(0o666)


def foreign_manifest(root: Path) -> None:
    for path in (root, root / "v1"):
        path.chmod(0o755)
    os.chown(next((root / "v1" / "ac").rglob("*.json")), STRANGER, STRANGER)


UNSAFE = [
    world_writable,
    group_writable,
    bucket_writable,
    bucket_sticky,
    manifest_writable,
    *(
        pytest.param(change, marks=needs_root)
        for change in (foreign, foreign_bucket, foreign_link, link_to_foreign, foreign_manifest)
    ),
]


@pytest.mark.parametrize("change", UNSAFE)
def test_what_others_could_have_written_is_not_read(
    tmp_path: Path, events: list[Event], change: Callable[[Path], None]
) -> None:
    """The start goes on without it, says whose it is and what to do, and keeps what it made."""
    root = filled(tmp_path / "root")
    change(root)
    before = sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    loader, storage = open_cache(root, disabled=False, emit=events.append, clock=lambda: 0.0)
    assert loader.manifest(KEY) is None
    reasons = {e.reason.code: e.reason for e in events if isinstance(e, TierFailed)}
    assert list(reasons) == ["untrusted"]
    assert any(word in reasons["untrusted"].remedy for word in ("chmod 700", "chown", "Remove it"))
    assert not any(isinstance(event, ArtifactQuarantined) for event in events)
    assert before == sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    if change not in (manifest_writable, foreign_manifest):
        published = storage.publish(KEY, {}, FILES)
        paths = loader.files(published["files"])
        assert paths is not None
        assert not paths["piece.so"].startswith(str(tmp_path))
        assert Path(paths["piece.so"]).read_bytes() == BLOB
    loader.close()


class SharedCache(DiskCache):
    is_shared = True


class TestSharedFolder(CacheContract):
    """A folder that others write to as well, which is a tier like any shared one."""

    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return SharedCache(tmp_path / "root")


@pytest.mark.parametrize("change", [world_writable, bucket_writable, manifest_writable])
def test_of_a_shared_folder_signatures_decide_and_nothing_is_opened_in_place(
    tmp_path: Path, events: list[Event], key: SigningKey, change: Callable[[Path], None]
) -> None:
    root = tmp_path / "shared"
    CacheStorage(
        [SharedCache(root)], events.append, lambda: 0.0, trust=Trust(signing_key=key)
    ).publish(KEY, {}, FILES)
    change(root)
    tiers = [DiskCache(tmp_path / "own"), SharedCache(root, name="shared")]
    trust = Trust({key.key_id: key.public_key})
    payload = CacheLoader(tiers, events.append, lambda: 0.0, trust=trust).manifest(KEY)
    assert payload is not None
    loader = CacheLoader(tiers[1:], events.append, lambda: 0.0, trust=trust)
    paths = loader.files(payload["files"])
    assert paths is not None
    assert not paths["piece.so"].startswith(str(tmp_path))
    loader.close()
    assert CacheLoader(tiers[1:], events.append, lambda: 0.0).manifest(KEY) is None


def test_it_is_read_again_once_it_is_closed_to_others(tmp_path: Path) -> None:
    root = filled(tmp_path / "root")
    cache = DiskCache(root)
    root.chmod(0o777)
    for use in (
        lambda: cache.read_manifest(KEY),
        lambda: cache.write_manifest(KEY, b""),
        lambda: cache.delete_manifest(KEY),
        lambda: list(cache.manifest_keys()),
        lambda: cache.read_blob(DIGEST),
        lambda: cache.write_blob(DIGEST, BLOB),
        lambda: cache.has_blob(DIGEST),
        lambda: cache.local_blob_path(DIGEST),
        lambda: cache.link_tree({"a": DIGEST}),
        lambda: cache.quarantine_manifest(KEY, ""),
        lambda: cache.quarantine_blob(DIGEST, ""),
    ):
        with pytest.raises(UnsafeStoreError, match=f"chmod 700 {root}"):
            use()
    root.chmod(0o700)
    assert cache.read_manifest(KEY) is not None
    assert cache.local_blob_path(DIGEST) is not None


SAFE: list[Callable[[Path], object]] = [
    lambda root: root.chmod(0o755),
    lambda root: root.chmod(0o1777),  # As /tmp: the bucket is looked at by itself.
    lambda root: [path.chmod(0o777) for path in (root / "v1").iterdir()],  # Nobody can enter.
    lambda root: root.rename(root.with_name("own")) and root.symlink_to(root.with_name("own")),
]


@pytest.mark.parametrize("change", SAFE)
def test_what_only_the_user_can_have_written_is_read(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    root = filled(tmp_path / "root")
    change(root)
    cache = DiskCache(root)
    assert cache.read_manifest(KEY) is not None
    assert cache.local_blob_path(DIGEST) is not None


@needs_root
def test_another_users_folder_that_root_made_is_read(tmp_path: Path) -> None:
    """A cache baked into a container image by root, read by the user that the container runs as."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest", "popen")):
            parent.chmod(0o755)
    root = filled(tmp_path / "root")
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(STRANGER)
            cache = DiskCache(root)
            found = cache.read_manifest(KEY) is not None and cache.read_blob(DIGEST) == BLOB
            code = 0 if found else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_folder_that_somebody_else_makes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """Absent when first looked at; what is there later is looked at then."""
    root = tmp_path / "root"
    cache = DiskCache(root)
    assert cache.read_manifest(KEY) is None
    filled(root).chmod(0o777)
    with pytest.raises(UnsafeStoreError):
        cache.read_manifest(KEY)


@pytest.mark.parametrize("kind", ["manifest", "blob"])
def test_a_link_in_place_of_a_file_is_damage(tmp_path: Path, kind: str) -> None:
    """Whose file it leads to, and who changes it when, nobody knows."""
    root = filled(tmp_path / "root")
    folder = root / "v1" / ("ac" if kind == "manifest" else "cas")
    path = next(path for path in folder.rglob("*") if path.is_file())
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    events: list[Event] = []
    loader, storage = open_cache(root, disabled=False, emit=events.append, clock=lambda: 0.0)
    if kind == "manifest":
        assert loader.manifest(KEY) is None
    else:
        assert loader.files({"piece.so": DIGEST}) is None
    assert [type(event) for event in events if isinstance(event, ArtifactQuarantined)] != []
    published = storage.publish(KEY, {}, FILES)
    assert loader.manifest(KEY) == published
    assert loader.files({"piece.so": DIGEST}) is not None
    assert not path.is_symlink()


def test_a_link_in_a_tree_is_replaced(tmp_path: Path) -> None:
    cache = DiskCache(filled(tmp_path / "root"))
    directory = Path(str(cache.link_tree({"a": DIGEST, "b": DIGEST})))
    (tmp_path / "elsewhere").write_bytes(BLOB)
    (directory / "a").unlink()
    (directory / "a").symlink_to(tmp_path / "elsewhere")
    cache.link_tree({"a": DIGEST, "b": DIGEST})
    assert not (directory / "a").is_symlink()
