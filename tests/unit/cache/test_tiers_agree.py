"""All tiers do what a pair of dictionaries does, whatever is asked of them in whatever order."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.cache.guarded import GuardedCache
from precast.cache.interface import CacheInterface
from precast.cache.layered import LayeredCache
from precast.cache.object_store import ObjectStoreCache
from precast.cache.redis import RedisCache
from precast.events import ArtifactQuarantined, Event
from precast.testing import make_manifest
from servers import RedisServer, S3Server

KEYS = [sha256(bytes([i])).hexdigest() for i in range(3)]
BLOBS = [b"", b"\0", b"a blob", bytes(range(256)) * 50]

keys = st.sampled_from(KEYS)
blobs = st.sampled_from(BLOBS)


def digest_of(blob: bytes) -> str:
    return sha256(blob).hexdigest()


class TiersAgree(RuleBasedStateMachine):
    """Each rule is done to every tier and to the model."""

    redis_server: ClassVar[RedisServer]  # Set by the test that runs this.
    s3_server: ClassVar[S3Server]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.memory = MemoryCache()
        self.s3 = ObjectStoreCache(
            f"s3://bucket/agree/{self.folder.name}", **self.s3_server.options
        )
        self.manifests: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.start_a_new_process()

    @rule()
    def start_a_new_process(self) -> None:
        """Tiers are opened anew; layered ones forget the memory before what is behind it."""
        name = self.folder.name
        redis = RedisCache(self.redis_server.url, prefix=name, most_string_bytes=1000)
        guarded = GuardedCache(redis, self.fail_on_event, time.monotonic, deadline_s=30.0)
        self.tiers: list[CacheInterface] = [
            self.memory,
            DiskCache(self.folder / "disk"),
            guarded,
            self.s3,
            self.layer(MemoryCache(), DiskCache(self.folder / "layered")),
            self.layer(
                MemoryCache(),
                DiskCache(self.folder / "near"),
                RedisCache(self.redis_server.url, prefix=f"{name}/layered"),
                ObjectStoreCache(f"memory://agree/{name}"),
            ),
        ]

    def layer(self, *tiers: CacheInterface) -> CacheInterface:
        return LayeredCache(tiers, self.fail_on_event, lambda: 0.0)

    def fail_on_event(self, event: Event) -> None:
        raise AssertionError(event)

    def for_each_tier(self, use: Callable[[CacheInterface], object]) -> None:
        for tier in self.tiers:
            use(tier)

    @rule(key=keys, note=st.integers(0, 3))
    def write_manifest(self, key: str, note: int) -> None:
        self.manifests[key] = make_manifest(key, note)
        self.for_each_tier(lambda tier: tier.write_manifest(key, self.manifests[key]))

    @rule(key=keys)
    def delete_manifest(self, key: str) -> None:
        self.manifests.pop(key, None)
        self.for_each_tier(lambda tier: tier.delete_manifest(key))

    @rule(key=keys)
    def quarantine_manifest(self, key: str) -> None:
        self.manifests.pop(key, None)
        self.for_each_tier(lambda tier: tier.quarantine_manifest(key, "reason"))

    @rule(blob=blobs)
    def write_blob(self, blob: bytes) -> None:
        self.blobs[digest_of(blob)] = blob
        self.for_each_tier(lambda tier: tier.write_blob(digest_of(blob), blob))

    @rule(blob=blobs)
    def quarantine_blob(self, blob: bytes) -> None:
        self.blobs.pop(digest_of(blob), None)
        self.for_each_tier(lambda tier: tier.quarantine_blob(digest_of(blob), "reason"))

    @rule(blob=blobs)
    def delete_blob(self, blob: bytes) -> None:
        self.blobs.pop(digest_of(blob), None)
        self.for_each_tier(lambda tier: tier.delete_blob(digest_of(blob)))

    @rule(key=keys)
    def touch_manifest(self, key: str) -> None:
        self.for_each_tier(lambda tier: tier.touch_manifest(key))

    @rule()
    def sweep(self) -> None:
        self.for_each_tier(lambda tier: tier.sweep(3600.0))

    @precondition(lambda self: self.blobs)
    @rule(data=st.data())
    def link_tree(self, data: st.DataObject) -> None:
        digests = data.draw(st.lists(st.sampled_from(sorted(self.blobs)), min_size=1, max_size=3))
        files = {f"file-{i}": digest for i, digest in enumerate(digests)}
        for tier in (tier for tier in self.tiers if tier.keeps_files):
            directory = tier.link_tree(files)
            assert directory is not None
            found = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
            assert found == {name: self.blobs[digest] for name, digest in files.items()}

    @invariant()
    def they_agree(self) -> None:
        for tier in self.tiers:
            assert {key: tier.read_manifest(key) for key in tier.manifest_keys()} == self.manifests
            entries = {(entry.is_manifest, entry.name) for entry in tier.entries()}
            assert entries == {(True, key) for key in self.manifests} | {
                (False, digest) for digest in self.blobs
            }
            for blob in BLOBS:
                digest = digest_of(blob)
                assert tier.read_blob(digest) == self.blobs.get(digest)
                assert tier.has_blob(digest) == (digest in self.blobs)

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class DamageNeverShows(RuleBasedStateMachine):
    """Whatever is damaged on disk, a loader gives what was published last, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.events: list[Event] = []
        self.published: dict[str, tuple[int, bytes]] = {}
        self.open()

    @rule()
    def open(self) -> None:
        """Start anew, as the next process does."""
        tiers: list[CacheInterface] = [MemoryCache(), DiskCache(self.folder)]
        self.loader = CacheLoader(tiers, self.events.append, lambda: 0.0)
        self.storage = CacheStorage(tiers, self.events.append, lambda: 0.0)

    @rule(key=keys, note=st.integers(0, 3), blob=blobs)
    def publish(self, key: str, note: int, blob: bytes) -> None:
        self.published[key] = (note, blob)
        self.storage.publish(key, {"note": note}, {"file": blob, "same": b"same"})

    @rule(data=st.data(), position=st.floats(0, 1), how=st.sampled_from(["flip", "cut", "empty"]))
    def damage(self, data: st.DataObject, position: float, how: str) -> None:
        files = sorted(
            path for part in ("ac", "cas", "tree") for path in self.folder.glob(f"v1/{part}/**/*")
        )
        files = [path for path in files if path.is_file() and path.stat().st_size]
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        content = path.read_bytes()
        i = int(position * (len(content) - 1))
        flipped = content[:i] + bytes([content[i] ^ 0x40]) + content[i + 1 :]
        path.unlink()  # So that it is another file, as after a restore from a bad backup.
        path.write_bytes({"flip": flipped, "cut": content[:i], "empty": b""}[how])

    @rule(key=keys)
    def load(self, key: str) -> None:
        manifest = self.loader.manifest(key)
        if manifest is None:
            return
        note, blob = self.published[key]
        assert manifest["note"] == note
        paths = self.loader.files(manifest["files"])
        if paths is not None:
            assert Path(paths["file"]).read_bytes() == blob
            assert Path(paths["same"]).read_bytes() == b"same"

    @rule(key=keys, note=st.integers(0, 3), blob=blobs)
    def publishing_mends(self, key: str, note: int, blob: bytes) -> None:
        self.publish(key, note, blob)
        self.open()
        manifest = self.loader.manifest(key)
        assert manifest is not None
        assert self.loader.files(manifest["files"]) is not None
        self.load(key)

    @invariant()
    def nothing_worse_than_a_quarantine_happens(self) -> None:
        for event in self.events:
            assert type(event).__name__ != "TierFailed", event
            if isinstance(event, ArtifactQuarantined):
                assert event.reason.code == "artifact-corrupt"
        self.events.clear()

    def teardown(self) -> None:
        self.loader.close()
        shutil.rmtree(self.folder, ignore_errors=True)


quick = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_tiers_agree(redis_server: RedisServer, s3_server: S3Server) -> None:
    TiersAgree.redis_server, TiersAgree.s3_server = redis_server, s3_server
    # Each step asks each tier some fifteen times, and two of them over a connection.
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        TiersAgree, settings=settings(quick, max_examples=12, stateful_step_count=12)
    )


TestDamageNeverShows = DamageNeverShows.TestCase
TestDamageNeverShows.settings = quick
