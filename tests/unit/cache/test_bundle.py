from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.cache.bundle import BundleCache
from precast.cache.bundle_format import write_bundle
from precast.cache.bundle_reading import inspect_bundle, load_bundle, verify_bundle
from precast.cache.bundle_writing import create_bundle, keys_of
from precast.cache.collect import prune
from precast.cache.interface import CacheInterface
from precast.cache.manifest import encode_body
from precast.cache.trust import NO_KEYS, SigningKey, Trust
from precast.errors import (
    BundleError,
    BundleIncompatibleError,
    BundleIncompleteError,
    BundleUntrustedError,
    PrecastError,
    StoreError,
)
from precast.events import ArtifactRefused, Event, TierFailed
from precast.machine import parts_without_torch, python_identity
from precast.testing import BLOB, DIGEST, KEY, CacheContract, every_fault

LIBRARY = bytes(range(256)) * 5
PIECE = sha256(b"piece").hexdigest()
ASSEMBLY = f"{sha256(b'assembly').hexdigest()}-1"
UNSIGNED = Trust(allow_unsigned=True)


class WrittenAnew:
    """A bundle as if it could be written: each write makes another file of it."""

    is_writable = True
    is_in_memory = False
    is_shared = True
    keeps_files = False
    name = "bundle"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = MemoryCache()
        self._digests: set[str] = set()
        self._lock = threading.Lock()
        self._write()

    def _write(self) -> None:
        kept = self._kept
        manifests = {key: kept.read_manifest(key) or b"" for key in kept.manifest_keys()}
        write_bundle(
            str(self._path), manifests, self._digests, lambda digest: kept.read_blob(digest) or b""
        )
        self._bundle = BundleCache(self._path)

    def write_manifest(self, key: str, data: bytes) -> None:
        with self._lock:
            self._kept.write_manifest(key, data)
            self._write()

    def delete_manifest(self, key: str) -> None:
        with self._lock:
            self._kept.delete_manifest(key)
            self._write()

    def write_blob(self, digest: str, data: bytes) -> None:
        with self._lock:
            self._kept.write_blob(digest, data)
            self._digests.add(digest)
            self._write()

    def delete_blob(self, digest: str) -> None:
        with self._lock:
            self._kept.delete_blob(digest)
            self._digests.discard(digest)
            self._write()

    def __getattr__(self, method: str) -> Any:
        return getattr(self._bundle, method)


class TestBundleCache(CacheContract):
    """Everything that a tier promises to its readers."""

    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return WrittenAnew(tmp_path / "a.bundle")  # type: ignore[return-value]


def fill(tier: CacheInterface, trust: Trust = NO_KEYS, **parts: str) -> dict[str, Any]:
    """Publish a piece, and an assembly that names it, with the one that starts try before."""
    storage = CacheStorage([tier], lambda _: None, lambda: 0.0, trust=trust)
    named = {**parts_without_torch("cpu"), "threads": "many", **parts}
    piece = storage.publish(
        PIECE,
        {"kind": "piece", "compiler": "aot_inductor", "parts": named, "seconds": 8.5},
        {"model.so": LIBRARY, "model.json": b"{}"},
    )
    record = {"key": PIECE, "compiler": "aot_inductor", "files": piece["files"]}
    for number in (0, 1):
        storage.publish(
            f"{ASSEMBLY[:-1]}{number}",
            {"kind": "assembly", "python": python_identity(), "pieces": [record, {"eager": {}}]},
            {},
        )
    storage.publish(KEY, {"kind": "another"}, {"x": BLOB})
    return piece


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    disk = DiskCache(tmp_path / "disk")
    fill(disk)
    return disk


@pytest.fixture
def bundle(tmp_path: Path, disk: DiskCache) -> Path:
    path = tmp_path / "model.bundle"
    create_bundle(path, [disk], [ASSEMBLY])
    return path


def contents(tier: CacheInterface) -> dict[str, bytes | None]:
    return {key: tier.read_manifest(key) for key in tier.manifest_keys()}


# -- what is in it --------------------------------------------------------------------------


def test_a_bundle_holds_what_an_assembly_needs_and_nothing_else(
    bundle: Path, disk: DiskCache, tmp_path: Path
) -> None:
    """The assemblies before it too: a start stops looking where a number is missing."""
    wanted = {ASSEMBLY, f"{ASSEMBLY[:-1]}0", PIECE}
    into = DiskCache(tmp_path / "into")
    assert load_bundle(bundle, into, trust=UNSIGNED)["manifests"] == 3
    assert set(into.manifest_keys()) == wanted
    assert into.read_blob(sha256(LIBRARY).hexdigest()) == LIBRARY
    assert not into.has_blob(DIGEST)
    said = inspect_bundle(bundle)
    assert {entry["key"] for entry in said["manifests"]} == wanted
    assert said["bytes"] == bundle.stat().st_size
    assert said["needs"]["pythons"] == [python_identity()]
    assert said["needs"]["toolchains"] == [parts_without_torch("cpu")]
    piece = next(entry for entry in said["manifests"] if entry["key"] == PIECE)
    assert piece == {
        "key": PIECE,
        "kind": "piece",
        "compiler": "aot_inductor",
        "seconds": 8.5,
        "bytes": len(LIBRARY) + 2,
        "signed_by": None,
    }


def test_without_keys_everything_is_in_it(disk: DiskCache, tmp_path: Path) -> None:
    path = tmp_path / "all.bundle"
    made = create_bundle(path, [disk])
    assert made == {
        "path": str(path),
        "bytes": path.stat().st_size,
        "manifests": 4,
        "blobs": 3,
    }
    assert contents(BundleCache(path)) == contents(disk)
    assert verify_bundle(path) == {**made, "signed": 0}


def test_what_is_only_about_one_cache_is_not_in_it(disk: DiskCache, tmp_path: Path) -> None:
    """
    When it was collected, and what failed there.
    """
    expected = create_bundle(tmp_path / "a.bundle", [disk])
    storage = CacheStorage([disk], lambda _: None, lambda: 0.0)
    storage.publish("failed-0123", {"kind": "failure", "failure": {}}, {})
    prune([disk], emit=lambda _: None, max_bytes=None, max_age_s=None)
    found = create_bundle(tmp_path / "b.bundle", [disk])
    assert found == {**expected, "path": found["path"]}
    assert (tmp_path / "a.bundle").read_bytes() == (tmp_path / "b.bundle").read_bytes()


def test_an_assembly_is_enough_where_its_pieces_manifests_are_gone(
    disk: DiskCache, tmp_path: Path
) -> None:
    disk.delete_manifest(PIECE)
    assert create_bundle(tmp_path / "b", [disk], [ASSEMBLY])["blobs"] == 2


def test_same_input_same_bytes(disk: DiskCache, tmp_path: Path, key: SigningKey) -> None:
    """Wherever it is made, whatever lies beside it, and in whatever order it was published."""
    other = DiskCache(tmp_path / "other")
    for name in sorted(contents(disk), reverse=True):
        other.write_manifest(name, disk.read_manifest(name) or b"")
    for path in (tmp_path / "disk" / "v1" / "cas").rglob("*"):
        if path.is_file():
            other.write_blob(path.name, path.read_bytes())
    other.write_manifest("unrelated", b"damaged")
    for trust in (NO_KEYS, Trust(signing_key=key)):
        create_bundle(tmp_path / "one", [disk], [ASSEMBLY, KEY], trust=trust)
        create_bundle(tmp_path / "two", [MemoryCache(), other], [KEY, ASSEMBLY], trust=trust)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_status_names_the_keys(tmp_path: Path) -> None:
    status = {
        "assemblies": [{"key": "a-0"}],
        "blocks": [{"assemblies": [{"key": "b-0"}], "blocks": []}],
    }
    assert keys_of(status) == ["a-0", "b-0"]


def test_what_is_nowhere_cannot_be_bundled(disk: DiskCache, tmp_path: Path) -> None:
    with pytest.raises(BundleIncompleteError, match="no tier has absent-key"):
        create_bundle(tmp_path / "b", [disk], ["absent-key"])
    with pytest.raises(BundleIncompleteError, match="nothing to put"):
        create_bundle(tmp_path / "b", [MemoryCache()])
    disk.quarantine_blob(sha256(LIBRARY).hexdigest(), "")
    with pytest.raises(BundleIncompleteError, match="no tier has a sound blob"):
        create_bundle(tmp_path / "b", [disk], [ASSEMBLY])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]


def test_writing_may_fail_at_any_step(disk: DiskCache, tmp_path: Path) -> None:
    """The old file or the new one is there, whole, and nothing beside it."""
    create_bundle(tmp_path / "reference", [disk], [ASSEMBLY])
    for fault in every_fault(operations=("open", "fsync", "replace")):
        folder = tmp_path / str(fault.n)
        folder.mkdir()
        (folder / "b").write_bytes(b"old")
        with fault, suppress(StoreError, BundleIncompleteError):
            create_bundle(folder / "b", [disk], [ASSEMBLY])
        assert (folder / "b").read_bytes() in (b"old", (tmp_path / "reference").read_bytes())
        assert [path.name for path in folder.iterdir()] == ["b"]
    assert (folder / "b").read_bytes() != b"old"


# -- damage -----------------------------------------------------------------------------------


def reading(path: Path, folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: verify_bundle(path)
    yield lambda: load_bundle(path, DiskCache(folder), trust=UNSIGNED)


@pytest.mark.parametrize("change", [lambda byte: byte ^ 1, lambda byte: byte ^ 0x80])
def test_any_flipped_byte_is_refused_with_a_sentence(
    bundle: Path, tmp_path: Path, disk: DiskCache, change: Callable[[int], int]
) -> None:
    """Every byte of the file matters: there is no padding in which a change would not show."""
    sound = bundle.read_bytes()
    damaged = tmp_path / "damaged"
    places = {*range(400), *range(len(sound) - 50, len(sound)), *range(0, len(sound), 61)}
    for place in sorted(places):
        data = bytearray(sound)
        data[place] = change(data[place])
        damaged.write_bytes(data)
        with pytest.raises(BundleError) as error:
            verify_bundle(damaged)
        assert str(damaged) in str(error.value), place
    into = DiskCache(tmp_path / "into")
    for place in sorted(random.Random(7).sample(range(len(sound)), 60)):
        data = bytearray(sound)
        data[place] = change(data[place])
        damaged.write_bytes(data)
        with pytest.raises(BundleError):
            load_bundle(damaged, into, trust=UNSIGNED)
        assert contents(into) == {}


def test_a_tier_never_gives_wrong_bytes_of_a_damaged_bundle(
    bundle: Path, tmp_path: Path, events: list[Event]
) -> None:
    """What is found is what was stored; the rest is a miss, and is reported."""
    sound = bundle.read_bytes()
    damaged = tmp_path / "damaged"
    digest = sha256(LIBRARY).hexdigest()
    num_misses = 0
    for place in range(0, len(sound), 97):
        data = bytearray(sound)
        data[place] ^= 0x10
        damaged.write_bytes(data)
        events.clear()
        tier = BundleCache(damaged)
        loader = CacheLoader([tier], events.append, lambda: 0.0, trust=UNSIGNED)
        found = [loader.manifest(ASSEMBLY), loader.manifest(PIECE), loader.blob(digest)]
        assert found[0] is None or found[0]["kind"] == "assembly"
        assert found[1] is None or found[1]["seconds"] == 8.5
        assert found[2] in (None, LIBRARY)
        num_misses += None in found
        loader.close()
    assert num_misses > 20


def test_a_bundle_cut_anywhere_is_refused(bundle: Path, tmp_path: Path) -> None:
    sound = bundle.read_bytes()
    damaged = tmp_path / "damaged"
    for length in [*range(0, 200, 7), *range(200, len(sound), 211), len(sound) - 1]:
        damaged.write_bytes(sound[:length])
        with pytest.raises(BundleError):
            verify_bundle(damaged)
        with pytest.raises(StoreError):
            BundleCache(damaged).read_manifest(ASSEMBLY)
    damaged.write_bytes(sound + b"x")
    with pytest.raises(BundleError, match="cut off or mixed"):
        verify_bundle(damaged)


def with_index(index: object, data: bytes = b"") -> bytes:
    body = index if isinstance(index, bytes) else encode_body(index)  # type: ignore[arg-type]
    return b"precast-bundle 1 %s %012d\n" % (sha256(body).hexdigest().encode(), len(body)) + (
        body + data
    )


def hostile() -> dict[str, bytes]:
    needs = {"pythons": [], "toolchains": []}
    sound = {"blobs": {}, "format": 1, "manifests": {}, "needs": needs}
    digest = sha256(b"x").hexdigest()
    header = b"precast-bundle 1 " + b"0" * 64
    return {
        "no object": with_index([1]),
        "no JSON": with_index(b"{"),
        "nested": with_index(b"[" * 100_000),
        "a field more": with_index({**sound, "more": 1}),
        "another format": with_index({**sound, "format": 2}),
        "a path as a key": with_index({**sound, "manifests": {"../../etc/passwd": [digest, 0]}}),
        "a path as a digest": with_index({**sound, "blobs": {"../" * 21 + "x": 0}}),
        "an absolute path": with_index({**sound, "manifests": {"/etc/passwd": [digest, 0]}}),
        "a negative size": with_index({**sound, "blobs": {digest: -1}}, b"x"),
        "a size that is true": with_index({**sound, "blobs": {digest: True}}, b"x"),
        "a huge size": with_index({**sound, "blobs": {digest: 2**70}}, b"x"),
        "a huge manifest": with_index({**sound, "manifests": {"abcd": [digest, 2**40]}}),
        "no digest": with_index({**sound, "manifests": {"abcd": ["x", 1]}}, b"x"),
        "needs of no kind": with_index({**sound, "needs": {"pythons": 1, "toolchains": []}}),
        "needs that are numbers": with_index(
            {**sound, "needs": {"pythons": [], "toolchains": [{"cpu": 1}]}}
        ),
        "needs that are no tables": with_index(
            {**sound, "needs": {"pythons": [], "toolchains": ["x"]}}
        ),
        "a huge index": header + b" 999999999999\n",
        "a signed length": header + b" -00000000001\n",
        "not a manifest": with_index({**sound, "manifests": {"abcd": [digest, 1]}}, b"x"),
        "a tar file": b"model/" + b"\0" * 600,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", hostile())
def test_a_hostile_bundle_is_a_sentence_and_leads_nowhere(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(hostile()[kind])
    for read in reading(path, tmp_path / "into"):
        with pytest.raises(BundleError):
            read()
    if kind != "not a manifest":
        with pytest.raises(StoreError):
            BundleCache(path).read_manifest(KEY)
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["hostile"]


def test_a_bundle_that_lacks_a_file_it_names_is_refused(disk: DiskCache, tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_bundle(str(path), {PIECE: disk.read_manifest(PIECE) or b""}, [], lambda _: b"")
    for read in reading(path, tmp_path / "into"):
        with pytest.raises(BundleError, match="not in it"):
            read()
    assert not (tmp_path / "into").exists()


def test_a_bundle_that_is_not_there_is_a_failing_tier(tmp_path: Path, events: list[Event]) -> None:
    with pytest.raises(StoreError, match="No such file"):
        verify_bundle(tmp_path / "absent")
    loader = CacheLoader([BundleCache(tmp_path / "absent")], events.append, lambda: 0.0)
    assert loader.manifest(KEY) is None
    assert [e.reason.code for e in events if isinstance(e, TierFailed)] == ["tier-failed"]


# -- another machine ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"torch": "1.0.0 abc"}, "torch '1.0.0 abc', this machine has"),
        ({"cpu": "sparc64 VIS 0123"}, "cpu 'sparc64 VIS 0123', this machine has"),
        ({"device": "cuda", "runtime": "cuda 1.1 hip None"}, "runtime 'cuda 1.1 hip None'"),
    ],
)
def test_a_bundle_for_another_machine_is_refused_with_a_sentence(
    tmp_path: Path, events: list[Event], parts: dict[str, str], words: str
) -> None:
    disk = DiskCache(tmp_path / "disk")
    fill(disk, **parts)
    path = tmp_path / "b"
    create_bundle(path, [disk], [ASSEMBLY])
    with pytest.raises(BundleIncompatibleError, match=words):
        load_bundle(path, DiskCache(tmp_path / "into"), trust=UNSIGNED)
    assert not (tmp_path / "into").exists()
    loader = CacheLoader([BundleCache(path)], events.append, lambda: 0.0, trust=UNSIGNED)
    assert loader.manifest(ASSEMBLY) is None
    assert words in next(e.reason.message for e in events if isinstance(e, TierFailed))
    assert verify_bundle(path)["blobs"] == 2  # It can be checked anywhere.


def test_a_bundle_for_another_gpu_or_python_is_refused(tmp_path: Path, disk: DiskCache) -> None:
    gpu = DiskCache(tmp_path / "gpu")
    fill(gpu, device="cuda", architecture="sm_90")
    create_bundle(tmp_path / "b", [gpu], [ASSEMBLY])

    def other_gpu(device: str) -> Mapping[str, Any]:
        return {**parts_without_torch("cpu"), "device": device, "architecture": "sm_80"}

    def no_gpu(device: str) -> Mapping[str, Any]:
        raise RuntimeError(f"no {device} here")

    for parts_of, words in ((other_gpu, "'sm_90', this machine has 'sm_80'"), (no_gpu, "no cuda")):
        with pytest.raises(BundleIncompatibleError, match=words):
            load_bundle(tmp_path / "b", MemoryCache(), trust=UNSIGNED, parts_of=parts_of)
    manifests = {KEY: disk.read_manifest(KEY) or b""}
    needs = {"pythons": ["cpython-27 (2, 7, 18)"], "toolchains": []}
    write_bundle(str(tmp_path / "c"), manifests, [DIGEST], lambda _: BLOB, needs=needs)
    with pytest.raises(BundleIncompatibleError, match="is for Python cpython-27"):
        load_bundle(tmp_path / "c", MemoryCache(), trust=UNSIGNED)


def test_what_is_known_without_torch_agrees_with_torch() -> None:
    """Read from its files, without importing it."""
    from precast.cache.bundle_format import _is_alike
    from precast.graph.key import toolchain_parts

    known, exact = parts_without_torch("cpu"), toolchain_parts("cpu")
    assert known.keys() == {"cpu", "torch"}
    assert known["torch"] == exact["torch"]
    assert _is_alike(known["cpu"], exact["cpu"])
    assert not _is_alike(known["cpu"], exact["cpu"] + "x")


# -- who vouches for it -------------------------------------------------------------------


def trusting(*keys: SigningKey) -> Trust:
    return Trust({key.key_id: key.public_key for key in keys})


def test_a_signed_bundle_is_used_where_its_key_is_trusted(
    disk: DiskCache, tmp_path: Path, key: SigningKey, other_key: SigningKey, events: list[Event]
) -> None:
    """Read in place or copied into the own tier, where it needs no further permission."""
    path = tmp_path / "b"
    create_bundle(path, [disk], [ASSEMBLY], trust=Trust(signing_key=key))
    assert verify_bundle(path, trusting(key))["signed"] == 3
    assert {entry["signed_by"] for entry in inspect_bundle(path)["manifests"]} == {key.key_id}
    into = DiskCache(tmp_path / "into")
    load_bundle(path, into, trust=trusting(key, other_key))
    payload = CacheLoader([into], events.append, lambda: 0.0).manifest(ASSEMBLY)
    assert payload is not None
    assert "unsigned" not in payload
    own = DiskCache(tmp_path / "own")
    tiers = [MemoryCache(), own, BundleCache(path)]
    loader = CacheLoader(tiers, events.append, lambda: 0.0, trust=trusting(key))
    piece = loader.manifest(PIECE)
    assert piece is not None
    paths = loader.files(piece["files"])
    assert paths is not None
    assert Path(paths["model.so"]).read_bytes() == LIBRARY
    assert paths["model.so"].startswith(own.root)
    for trust in (trusting(other_key), NO_KEYS):
        with pytest.raises(BundleUntrustedError, match="not a trusted one"):
            verify_bundle(path, trust)
        with pytest.raises(BundleUntrustedError, match="trusted_keys"):
            load_bundle(path, MemoryCache(), trust=trust)
        refused = CacheLoader([BundleCache(path)], events.append, lambda: 0.0, trust=trust)
        assert refused.manifest(PIECE) is None
    assert any(isinstance(event, ArtifactRefused) for event in events)


def test_an_unsigned_bundle_needs_permission_for_ever(bundle: Path, tmp_path: Path) -> None:
    """What it brought into the own tier is marked: without permission it is not used."""
    into = DiskCache(tmp_path / "into")
    with pytest.raises(BundleUntrustedError, match="it is not signed"):
        load_bundle(bundle, into)
    assert not (tmp_path / "into").exists()
    load_bundle(bundle, into, trust=UNSIGNED)
    assert CacheLoader([into], lambda _: None, lambda: 0.0).manifest(PIECE) is None
    admitted = CacheLoader([into], lambda _: None, lambda: 0.0, trust=UNSIGNED).manifest(PIECE)
    assert admitted is not None
    assert admitted["unsigned"] is True


def test_an_unsigned_bundle_replaces_nothing_of_the_tiers_own(bundle: Path, tmp_path: Path) -> None:
    """But what the tier lacks a file of."""
    into = DiskCache(tmp_path / "into")
    fill(into)
    load_bundle(bundle, into, trust=UNSIGNED)
    loader = CacheLoader([into], lambda _: None, lambda: 0.0)
    piece = loader.manifest(PIECE)
    assert piece is not None
    into.delete_blob(piece["files"]["model.so"])
    load_bundle(bundle, into, trust=UNSIGNED)
    assert CacheLoader([into], lambda _: None, lambda: 0.0).manifest(PIECE) is None


def test_what_nobody_vouches_for_is_not_signed_by_bundling_it(
    bundle: Path, tmp_path: Path, key: SigningKey
) -> None:
    into = DiskCache(tmp_path / "into")
    load_bundle(bundle, into, trust=UNSIGNED)
    trust = Trust(signing_key=key, allow_unsigned=True)
    with pytest.raises(BundleUntrustedError, match="nobody signed"):
        create_bundle(tmp_path / "b", [into], [ASSEMBLY], trust=trust)


def test_nothing_is_written_into_a_bundle(bundle: Path, tmp_path: Path) -> None:
    before = bundle.read_bytes()
    tier = BundleCache(bundle)
    for write in (
        lambda: tier.write_manifest(KEY, b""),
        lambda: tier.delete_manifest(KEY),
        lambda: tier.write_blob(DIGEST, BLOB),
    ):
        with pytest.raises(StoreError, match="never written"):
            write()
    tier.quarantine_manifest(PIECE, "")
    assert tier.read_manifest(PIECE) is None
    assert bundle.read_bytes() == before


def test_a_bundle_holds_one_file_open_and_gives_it_back(bundle: Path) -> None:
    def num_open() -> int:
        return sum(link.resolve() == bundle for link in Path("/proc/self/fd").iterdir())

    tier = BundleCache(bundle)
    for _ in range(3):
        tier.read_manifest(PIECE)
    assert num_open() == 1
    del tier
    assert num_open() == 0
    with pytest.raises(PrecastError):
        load_bundle(bundle, MemoryCache())
    assert num_open() == 0
