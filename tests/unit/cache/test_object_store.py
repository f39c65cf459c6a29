from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from precast.cache import object_store
from precast.cache.interface import CacheInterface
from precast.cache.layered import LayeredCache
from precast.cache.object_store import READ_BYTES, ObjectStoreCache, _written_s
from precast.cache.trust import Trust
from precast.errors import ConfigError, StoreError
from precast.events import ArtifactQuarantined, Event
from precast.testing import BLOB, DIGEST, KEY, CacheContract, make_manifest
from servers import S3Server

MANIFEST = make_manifest(KEY, 1)

MakeTier = Callable[[], ObjectStoreCache]


@pytest.fixture(params=["s3", "file", "memory"])
def make_tier(request: pytest.FixtureRequest, tmp_path: Path) -> MakeTier:
    """Return what makes a tier at one place, in several kinds of stores."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return lambda: ObjectStoreCache(f"s3://bucket/{tmp_path.name}", **server.options)
    return lambda: ObjectStoreCache(f"{request.param}://{tmp_path}/store")


class TestS3(CacheContract):
    @pytest.fixture(autouse=True)
    def use_server(self, s3_server: S3Server) -> None:
        self.server = s3_server

    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return ObjectStoreCache(f"s3://bucket/contract/{tmp_path.name}/", **self.server.options)

    def test_threads_see_whole_values(self, cache: CacheInterface) -> None:
        """Each value is written once: unlike S3, this server replaces an object bit by bit."""
        keys = [sha256(bytes([i])).hexdigest() for i in range(20)]

        def write(i: int) -> None:
            for key in keys[i::4]:
                cache.write_manifest(key, make_manifest(key, "long" * 1000))

        def read(_: int) -> None:
            for key in keys * 5:
                assert cache.read_manifest(key) in (None, make_manifest(key, "long" * 1000))

        with ThreadPoolExecutor(8) as pool:
            uses = [pool.submit(use, i) for use in (write, read) for i in range(4)]
            for future in uses:
                future.result()


class TestFiles(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return ObjectStoreCache(f"file://{tmp_path}/store")


class TestMemoryFileSystem(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return ObjectStoreCache(f"memory://{tmp_path}")


def test_the_objects_are_the_documented_ones(s3_server: S3Server, tmp_path: Path) -> None:
    tier = ObjectStoreCache("s3://bucket/layout", **s3_server.options)
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    bucket = s3_server.folder / "data" / "bucket" / "layout"
    found = {str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file()}
    assert found == {f"v1/ac/{KEY}.json", f"v1/cas/sha256/{DIGEST[:2]}/{DIGEST}"}
    place = tier.quarantine_manifest(KEY, "why").removeprefix("s3://bucket/layout/")
    assert (bucket / place).read_bytes() == MANIFEST
    assert (bucket / f"{place}.reason").read_text() == "why\n"


@pytest.mark.parametrize("num_bytes", [READ_BYTES - 1, READ_BYTES, 2 * READ_BYTES + 3])
def test_large_blobs_come_back_whole(make_tier: MakeTier, num_bytes: int) -> None:
    blob = os.urandom(num_bytes)
    make_tier().write_blob(DIGEST, blob)
    assert make_tier().read_blob(DIGEST) == blob


def test_what_others_change_is_seen(make_tier: MakeTier) -> None:
    """
    Nothing that was listed or read once is remembered.
    """
    reader, writer = make_tier(), make_tier()
    assert reader.read_manifest(KEY) is None
    assert list(reader.manifest_keys()) == []
    assert not reader.has_blob(DIGEST)
    writer.write_manifest(KEY, MANIFEST)
    writer.write_blob(DIGEST, BLOB)
    assert reader.read_manifest(KEY) == MANIFEST
    assert list(reader.manifest_keys()) == [KEY]
    assert reader.has_blob(DIGEST)
    writer.quarantine_blob(DIGEST, "why")
    writer.delete_manifest(KEY)
    assert not reader.has_blob(DIGEST)
    assert list(reader.manifest_keys()) == []


@pytest.mark.parametrize("garbage", [b"", MANIFEST[:-1], b"\0" * 100])
def test_damage_is_set_aside_and_written_anew(
    make_tier: MakeTier, garbage: bytes, events: list[Event]
) -> None:
    tier = make_tier()
    tier.write_manifest(KEY, garbage)
    tier.write_blob(DIGEST, garbage)
    layered = LayeredCache([tier], events.append, lambda: 0.0, trust=Trust(allow_unsigned=True))
    assert layered.read_manifest(KEY) is None
    assert layered.read_blob(DIGEST) is None
    assert [type(event) for event in events] == [ArtifactQuarantined] * 2
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    assert layered.read_manifest(KEY) is not None
    assert layered.read_blob(DIGEST) == BLOB


def test_a_folder_where_a_file_belongs_is_damage(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "v1" / "ac" / f"{KEY}.json" / "sub").mkdir(parents=True)
    tier = ObjectStoreCache(f"file://{tmp_path}")
    assert LayeredCache([tier], events.append, lambda: 0.0).read_manifest(KEY) is None
    assert [type(event) for event in events] == [ArtifactQuarantined]
    tier.write_manifest(KEY, MANIFEST)
    assert tier.read_manifest(KEY) == MANIFEST


def test_a_writer_that_fails_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where a file system shows a file while it is written, it is written beside its place.
    """
    tier = ObjectStoreCache(f"file://{tmp_path}")
    fs, _ = tier._open()
    real = type(fs).pipe_file

    def write_half(self: object, path: str, value: bytes, **options: object) -> None:
        real(self, path, value[: len(value) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(fs), "pipe_file", write_half)
    with pytest.raises(StoreError, match="No space left"):
        tier.write_blob(DIGEST, BLOB)
    assert not tier.has_blob(DIGEST)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_endpoint_that_is_gone_is_a_store_error(tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    server.start()
    tier = ObjectStoreCache("s3://bucket/prefix", **server.options)
    tier.write_manifest(KEY, MANIFEST)
    tier.knock(1.0)
    server.stop()
    for use in (
        lambda: tier.read_manifest(KEY),
        lambda: tier.write_blob(DIGEST, BLOB),
        lambda: tier.has_blob(DIGEST),
    ):
        with pytest.raises(StoreError, match="'s3' failed"):
            use()
    with pytest.raises(OSError, match="refused"):
        tier.knock(1.0)
    server.start()
    try:
        assert tier.read_manifest(KEY) == MANIFEST
        server.sleep()
        with pytest.raises(TimeoutError):
            tier.knock(0.05)
    finally:
        server.stop()


def test_a_bucket_that_is_not_there_or_not_ours_is_a_store_error(s3_server: S3Server) -> None:
    absent = ObjectStoreCache("s3://no-such-bucket/prefix", **s3_server.options)
    with pytest.raises(StoreError):
        absent.write_blob(DIGEST, BLOB)
    foreign = ObjectStoreCache("s3://bucket", **{**s3_server.options, "secret": "wrong"})
    with pytest.raises(StoreError):
        foreign.read_manifest(KEY)


def test_the_endpoint_may_come_from_the_clients_own_variables(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.options["secret"])
    tier = ObjectStoreCache("s3://bucket/variables", region="eu-central-1")
    tier.knock(1.0)
    tier.write_manifest(KEY, MANIFEST)
    assert tier.read_manifest(KEY) == MANIFEST
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="refused"):
        tier.knock(1.0)


def test_no_place_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        ObjectStoreCache("s3://")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "s3fs" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"pip install precast\[s3\]"):
        ObjectStoreCache("s3://bucket")


def test_sweeping_removes_old_leavings_and_no_entry(tmp_path: Path) -> None:
    """
    Parts of killed writers after an hour, what was set aside after thirty days.
    """
    tier = ObjectStoreCache(f"file://{tmp_path}")
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    tier.quarantine_blob(DIGEST, "why")
    for folder, age_s in (("tmp", 3601), ("tmp", 3500), ("quarantine", 30 * 86400 + 60)):
        path = tmp_path / "v1" / folder / f"{age_s}"
        path.write_bytes(b"x")
        os.utime(path, (0, path.stat().st_mtime - age_s))
    os.utime(tmp_path / "v1" / "ac" / f"{KEY}.json", (0, 0))
    tier.sweep(0.0)
    assert [path.name for path in (tmp_path / "v1" / "tmp").iterdir()] == ["3500"]
    assert len(list((tmp_path / "v1" / "quarantine").iterdir())) == 2
    [entry] = tier.entries()
    assert (entry.name, entry.used_s) == (KEY, 0.0)


@pytest.mark.parametrize(
    "info",
    [
        {"LastModified": datetime(2001, 9, 9, 1, 46, 40, tzinfo=timezone.utc)},
        {"mtime": 1_000_000_000},
        {"updated": "2001-09-09T01:46:40.000Z", "created": 5.0},
        {"mtime": "not a time", "last_modified": 1e9},
    ],
)
def test_each_client_has_a_name_of_its_own_for_the_time(info: dict[str, Any]) -> None:
    assert _written_s(info) == 1e9


def test_what_does_not_say_how_old_it_is_never_grows_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_TIMES", ())
    tier = ObjectStoreCache(f"memory://{tmp_path}")
    tier.write_manifest(KEY, MANIFEST)
    [entry] = tier.entries()
    assert abs(entry.used_s - tier.now_s()) < 60
