# ruff: noqa: D102
# D102: `CacheInterface` describes the methods of `BundleCache`.
"""Bundles: manifests and blobs as one file, for container images and machines without a network.

The same content gives the same bytes. Nothing in a bundle is a path, a time or an owner, and
nothing is unpickled; `docs/format.md` is the specification. Who vouches for a bundle is said by
the signatures of the manifests in it (`trust.py`): it is read like a tier that others may write to.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager, suppress
from hashlib import sha256

from precast.cache.catalog import read_payload
from precast.cache.layered import LayeredCache
from precast.cache.manifest import MAX_MANIFEST_BYTES, decode_manifest, encode_body, encode_manifest
from precast.cache.names import (
    check_digest,
    check_key,
    earlier_keys,
    is_digest,
    is_file_name,
    is_internal_key,
    is_key,
)
from precast.cache.trust import NO_KEYS, is_unsigned, mark_unsigned
from precast.errors import (
    ArtifactCorruptError,
    BundleError,
    BundleIncompatibleError,
    BundleIncompleteError,
    BundleUntrustedError,
    PrecastError,
    StoreError,
)
from precast.events import ArtifactRefused, TierFailed
from precast.machine import UNKNOWN, parts_without_torch, python_identity

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from precast.cache.interface import CacheInterface, Entry
    from precast.cache.trust import Trust
    from precast.events import Emit, Event

    PartsOf = Callable[[str], Mapping[str, Any]]

FORMAT = 1
_MAGIC = b"precast-bundle %d " % FORMAT
_LENGTH_DIGITS = 12
_HEADER_BYTES = len(_MAGIC) + 64 + 1 + _LENGTH_DIGITS + 1
_MAX_INDEX_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
#: The parts of a piece's key that say where its code runs. `threads` may differ from one start to
#: the next on one machine.
_NEEDED_PARTS = ("architecture", "cpu", "device", "runtime", "torch")


class _Entry:
    """Where in the file something lies."""

    __slots__ = ("digest", "offset", "size")

    def __init__(self, digest: str, offset: int, size: int) -> None:
        self.digest = digest
        self.offset = offset
        self.size = size


class _OpenBundle:
    """A bundle whose index was read and checked; what the index names is checked when read."""

    def __init__(self, path: str) -> None:
        """Open it.

        Raises:
            BundleError: It is damaged or no bundle.
            OSError: It cannot be read.
        """
        self.path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            self.num_bytes = os.fstat(self._file).st_size
            index, start = self._read_index()
            self.needs: dict[str, Any] = index["needs"]
            self.manifests, end = _entries(index["manifests"], start)
            self.blobs, end = _entries(index["blobs"], end)
            if end != self.num_bytes:
                raise BundleError(
                    path, f"it should have {end} bytes and has {self.num_bytes}: cut off or mixed"
                )
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> _OpenBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def manifest(self, key: str) -> tuple[dict[str, Any], bytes]:
        """Return the payload and the bytes of a manifest, checked.

        Raises:
            BundleError: They are damaged.
        """
        data = self.checked(self.manifests[key], f"manifest {key}")
        try:
            return decode_manifest(key, data, f"{self.path}:{key}"), data
        except ArtifactCorruptError as error:
            raise BundleError(self.path, f"manifest {key}: {error.problem}") from error

    def blob(self, digest: str) -> bytes:
        """Return a blob, checked.

        Raises:
            BundleError: It is damaged.
        """
        return self.checked(self.blobs[digest], f"blob {digest}")

    def checked(self, entry: _Entry, what: str) -> bytes:
        data = self.read(entry)
        found = sha256(data).hexdigest()
        if found != entry.digest:
            raise BundleError(self.path, f"{what} should have digest {entry.digest}, has {found}")
        return data

    def read(self, entry: _Entry) -> bytes:
        """Return what lies in the file at an entry's place, unchecked."""
        return self._read(entry.offset, entry.size)

    def _read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0 and (part := os.pread(self._file, min(size, 1 << 30), offset)):
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_index(self) -> tuple[dict[str, Any], int]:
        """Return the index and where the data begins."""
        header = self._read(0, _HEADER_BYTES)
        if not header.startswith(_MAGIC):
            raise BundleError(
                self.path, f"it begins with {header[:24]!r}: no bundle of this format"
            )
        digest, _, length = header[len(_MAGIC) : -1].partition(b" ")
        if not length.isdigit() or len(header) != _HEADER_BYTES or header[-1:] != b"\n":
            raise BundleError(self.path, "its first line is damaged")
        size = int(length)
        if size > _MAX_INDEX_BYTES:
            raise BundleError(self.path, f"its index should have {size} bytes: too many")
        body = self._read(_HEADER_BYTES, size)
        found = sha256(body).hexdigest()
        if len(body) != size or found.encode() != digest:
            raise BundleError(
                self.path, f"its index should have digest {digest.decode('ascii', 'replace')}"
            )
        try:
            index = json.loads(body)
            problem = _find_problem(index)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise BundleError(self.path, f"its index is not sound: {problem}")
        return index, _HEADER_BYTES + size


class BundleCache:
    """A bundle as a tier: read where it lies, never written.

    Opened when it is first asked for something. Of what turns out to be damaged, nothing more is
    read for as long as this lives.

    Source: follows `CacheInterface`, where the methods are described.
    """

    is_writable = False
    is_in_memory = False
    is_shared = True  # Whoever made the file wrote it: its manifests need signatures.
    keeps_files = False
    leases = None

    def __init__(
        self, path: str | os.PathLike[str], *, parts_of: PartsOf = parts_without_torch
    ) -> None:
        """Open nothing yet.

        Args:
            path: Of the file.
            parts_of: Returns this machine's parts of a key for a type of device; a bundle for
                other machines only is a `StoreError` that says so.
        """
        self.path = os.path.abspath(os.fspath(path))  # noqa: PTH100
        self.name = f"bundle {os.path.basename(self.path)}"  # noqa: PTH119
        self._parts_of = parts_of
        self._lock = threading.Lock()
        self._open_bundle: _OpenBundle | None = None
        self._set_aside: set[str] = set()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def close(self) -> None:
        """Close the file; it is opened again where that is needed."""
        with self._lock:
            bundle, self._open_bundle = self._open_bundle, None
        if bundle is not None:
            bundle.close()

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        with self._store_errors("read manifest") as bundle:
            if key not in bundle.manifests or key in self._set_aside:
                return None
            return bundle.read(bundle.manifests[key])

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        raise self._read_only("write manifest")

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        raise self._read_only("delete manifest")

    def manifest_keys(self) -> Iterator[str]:
        with self._store_errors("list manifests") as bundle:
            keys = [key for key in bundle.manifests if key not in self._set_aside]
        return iter(keys)

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        with self._store_errors("read blob") as bundle:
            if digest not in bundle.blobs or digest in self._set_aside:
                return None
            return bundle.read(bundle.blobs[digest])

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        raise self._read_only("write blob")

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        with self._store_errors("look for blob") as bundle:
            return digest in bundle.blobs and digest not in self._set_aside

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        return None

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        self._set_aside.add(key)
        return f"{self.path} (left where it is, not read again)"

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        self._set_aside.add(digest)
        return f"{self.path} (left where it is, not read again)"

    def touch_manifest(self, key: str) -> None:
        check_key(key)  # A bundle does not change, and nothing in it grows old.

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        raise self._read_only("delete blob")

    def entries(self) -> Iterator[Entry]:
        from precast.cache.interface import Entry

        with self._store_errors("list entries") as bundle:
            found = [
                Entry(is_manifest, name, entry.size, 0.0)
                for is_manifest, part in ((True, bundle.manifests), (False, bundle.blobs))
                for name, entry in part.items()
                if name not in self._set_aside
            ]
        return iter(found)

    def now_s(self) -> float:
        return 0.0

    def sweep(self, grace_s: float) -> None:
        pass  # Nothing lies in it but entries.

    def _read_only(self, operation: str) -> StoreError:
        return StoreError(self.name, operation, "a bundle is never written")

    @contextmanager
    def _store_errors(self, operation: str) -> Iterator[_OpenBundle]:
        try:
            with self._lock:
                if self._open_bundle is None:
                    self._open_bundle = self._open()
                bundle = self._open_bundle
            yield bundle
        except OSError as error:
            problem = f"{error.strerror or error}: {self.path}"
            raise StoreError(self.name, operation, problem) from error
        except BundleError as error:
            raise StoreError(self.name, operation, error.problem) from error

    def _open(self) -> _OpenBundle:
        bundle = _OpenBundle(self.path)
        if problem := _why_not_here(bundle.needs, self._parts_of):
            bundle.close()
            raise BundleError(self.path, problem)
        return bundle


# -- making one -------------------------------------------------------------------


def keys_of(status: Mapping[str, Any]) -> list[str]:
    """Return the keys of all assemblies that `precast.status(model)` names, blocks included."""
    keys = [assembly["key"] for assembly in status.get("assemblies", ())]
    for block in status.get("blocks", ()):
        keys.extend(keys_of(block))
    return keys


def create_bundle(
    path: str | os.PathLike[str],
    tiers: Sequence[CacheInterface],
    keys: Iterable[str] | None = None,
    *,
    trust: Trust = NO_KEYS,
    emit: Emit = lambda _: None,
) -> dict[str, Any]:
    """Write what a model needs, or all that is in a cache, into one file.

    The manifests of pieces that an assembly names come along, and those that a warm start passes
    on its way to it. The file takes the place of another one at once, or not at all.

    Args:
        path: Of the new file.
        tiers: Where to read, nearest first.
        keys: Of assemblies or pieces; None: everything that may be used.
        trust: With its signing key, every manifest is signed anew. Says too what of shared tiers
            may be used.
        emit: Is told of damage and failures of tiers.

    Returns:
        `path`, `bytes`, and how many `manifests` and `blobs`.

    Raises:
        BundleIncompleteError: A key, or a file that it names, is nowhere.
        BundleUntrustedError: It should be signed, and holds what nobody vouches for.
        StoreError: The file cannot be written.
    """
    place = os.fspath(path)
    failures: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, (TierFailed, ArtifactRefused)):
            failures.append(event.reason.message)
        emit(event)

    cache = LayeredCache(tiers, note, lambda: 0.0, trust=trust)
    found = _gather(place, cache, keys, failures)
    manifests: dict[str, bytes] = {}
    for key, payload in found.items():
        if trust.signing_key is not None and is_unsigned(payload):
            raise BundleUntrustedError(place, f"{key} holds code that nobody signed")
        manifests[key] = encode_manifest(trust.sign(payload))
    digests = sorted({digest for payload in found.values() for digest in _digests(payload)})

    def blob(digest: str) -> bytes:
        data = cache.read_blob(digest)
        if data is None:
            raise BundleIncompleteError(place, f"no tier has a sound blob {digest}")
        return data

    return write_bundle(place, manifests, digests, blob, needs=_needs(found.values()))


def write_bundle(
    path: str,
    manifests: Mapping[str, bytes],
    digests: Collection[str],
    read_blob: Callable[[str], bytes],
    *,
    needs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a bundle of manifests by key and blobs by digest; `create_bundle` finds these.

    Raises:
        StoreError: It cannot be written.
    """
    import shutil
    import tempfile

    folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        with tempfile.TemporaryFile(dir=folder) as data:
            index: dict[str, Any] = {
                "blobs": {name: data.write(read_blob(name)) for name in sorted(digests)},
                "format": FORMAT,
                "manifests": {
                    key: [sha256(manifests[key]).hexdigest(), len(manifests[key])]
                    for key in sorted(manifests)
                },
                "needs": dict(needs or {"pythons": [], "toolchains": []}),
            }
            body = encode_body(index)
            digest = sha256(body).hexdigest().encode()
            data.seek(0)
            with open(temporary, "xb") as file:  # noqa: PTH123
                file.write(_MAGIC + digest + b" %0*d\n" % (_LENGTH_DIGITS, len(body)) + body)
                for key in sorted(manifests):
                    file.write(manifests[key])
                shutil.copyfileobj(data, file, _CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
                num_bytes = file.tell()
        os.replace(temporary, path)  # noqa: PTH105
    except OSError as error:
        raise StoreError("bundle", "write", f"{error.strerror or error}: {path}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
    return {
        "path": path,
        "bytes": num_bytes,
        "manifests": len(manifests),
        "blobs": len(index["blobs"]),
    }


# -- reading one ------------------------------------------------------------------


def inspect_bundle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a bundle says it holds; its manifests are read, its blobs are not.

    Returns:
        `path`, `bytes`, `blobs`, `blob_bytes`, `needs` (`toolchains` and `pythons`), and
        `manifests`: for each its `key`, `kind`, `compiler`, `seconds`, `bytes` of its files and
        `signed_by`, a key id that was not checked.

    Raises:
        BundleError: It is damaged or no bundle.
        StoreError: It cannot be read.
    """
    with _opened(path) as bundle:
        return {
            "path": bundle.path,
            "bytes": bundle.num_bytes,
            "blobs": len(bundle.blobs),
            "blob_bytes": sum(entry.size for entry in bundle.blobs.values()),
            "needs": bundle.needs,
            "manifests": [_describe(key, bundle.manifest(key)[0]) for key in bundle.manifests],
        }


def verify_bundle(path: str | os.PathLike[str], trust: Trust | None = None) -> dict[str, Any]:
    """Check every byte of a bundle, that nothing is missing, and who signed it.

    Args:
        path: Of the file.
        trust: Whose signatures count; None: signatures are not looked at.

    Returns:
        `path`, `bytes`, and how many `manifests`, `blobs` and manifests `signed` by trusted keys.

    Raises:
        BundleError: It is damaged, or lacks a file that it names.
        BundleUntrustedError: A manifest is not signed by a trusted key, and none may be unsigned.
        StoreError: It cannot be read.
    """
    with _opened(path) as bundle:
        num_signed = 0
        for key in bundle.manifests:
            payload, _ = bundle.manifest(key)
            if missing := [d for d in _digests(payload) if d not in bundle.blobs]:
                raise BundleError(bundle.path, f"{key} needs blob {missing[0]}, which is not in it")
            if trust is not None:
                num_signed += _is_trusted(bundle.path, key, payload, trust)
        for digest in bundle.blobs:
            bundle.blob(digest)
        return {
            "path": bundle.path,
            "bytes": bundle.num_bytes,
            "manifests": len(bundle.manifests),
            "blobs": len(bundle.blobs),
            "signed": num_signed,
        }


def load_bundle(
    path: str | os.PathLike[str],
    tier: CacheInterface,
    *,
    trust: Trust = NO_KEYS,
    parts_of: PartsOf = parts_without_torch,
) -> dict[str, Any]:
    """Copy what a bundle holds into a tier. Needs no compiler.

    Everything is checked before anything is written, except blobs, which are checked one by one
    and mean nothing before their manifests come, last.

    Args:
        path: Of the file.
        tier: Takes it, usually a `DiskCache`.
        trust: Whose signatures count. What is unsigned and admitted is marked as such.
        parts_of: Returns this machine's parts of a key for a type of device. The default does not
            import torch, and so cannot tell GPUs apart; `graph.key.toolchain_parts` can.

    Returns:
        `path`, `bytes`, and how many `manifests` and `blobs` the tier has now.

    Raises:
        BundleError: It is damaged, or lacks a file that it names.
        BundleIncompatibleError: It is for other machines or versions.
        BundleUntrustedError: A manifest is not signed by a trusted key, and none may be unsigned.
        StoreError: The bundle cannot be read, or the tier not written.
    """
    with _opened(path) as bundle:
        if problem := _why_not_here(bundle.needs, parts_of):
            raise BundleIncompatibleError(bundle.path, problem)
        wanted: set[str] = set()
        manifests: dict[str, bytes] = {}
        num_kept = 0
        for key in bundle.manifests:
            payload, data = bundle.manifest(key)
            if not _is_trusted(bundle.path, key, payload, trust):
                if _has_whole(tier, key):
                    num_kept += 1  # What the tier vouches for itself is not replaced.
                    continue
                data = _marked(bundle.path, key, payload)
            manifests[key] = data
            wanted.update(_digests(payload))
        if missing := sorted(wanted - bundle.blobs.keys()):
            raise BundleError(bundle.path, f"blob {missing[0]} is not in it, which it names")
        for digest in sorted(wanted):
            tier.write_blob(digest, bundle.blob(digest))
        for key, data in manifests.items():
            tier.write_manifest(key, data)
        return {
            "path": bundle.path,
            "bytes": bundle.num_bytes,
            "manifests": len(manifests) + num_kept,
            "blobs": len(wanted),
        }


def _has_whole(tier: CacheInterface, key: str) -> bool:
    """Whether a tier has a manifest with all its files."""
    try:
        payload = read_payload(tier, key)
        return payload is not None and all(map(tier.has_blob, _digests(payload)))
    except ArtifactCorruptError:
        return False


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_OpenBundle]:
    place = os.fspath(path)
    try:
        bundle = _OpenBundle(place)
    except OSError as error:
        problem = f"{error.strerror or error}: {place}"
        raise StoreError("bundle", "read", problem) from error
    with bundle:
        yield bundle


def _is_trusted(path: str, key: str, payload: Mapping[str, Any], trust: Trust) -> bool:
    """Whether somebody vouches for a manifest.

    Raises:
        BundleUntrustedError: Nobody does, and that matters.
    """
    problem = (
        "it holds code that nobody signed"
        if is_unsigned(payload)
        else trust.find_signature_problem(payload)
    )
    if problem is not None and not trust.allow_unsigned:
        raise BundleUntrustedError(path, f"manifest {key}: {problem}")
    return problem is None


def _marked(path: str, key: str, payload: Mapping[str, Any]) -> bytes:
    try:
        return mark_unsigned(payload)[1]
    except (ValueError, RecursionError) as error:
        raise BundleError(path, f"manifest {key}: {error}") from error


# -- what is in a manifest -----------------------------------------------------------


def _gather(
    path: str, cache: LayeredCache, keys: Iterable[str] | None, failures: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the payloads of the keys, of the pieces that they name and of those before them.

    Args:
        path: Of the bundle.
        cache: Has them.
        keys: What is asked for; None: all.
        failures: What went wrong with tiers so far; added to by the cache.
    """
    found: dict[str, dict[str, Any]] = {}

    def find(key: str, *, is_needed: bool) -> None:
        num_failures = len(failures)
        manifest = None if key in found else cache.find_manifest(key)
        if manifest is not None:
            found[key] = manifest.payload
        elif key not in found and (is_needed or len(failures) > num_failures):
            why = "".join(f"; {failure}" for failure in failures[num_failures:])
            raise BundleIncompleteError(path, f"no tier has {key}{why}")

    if keys is None:
        for key in sorted(key for key in cache.manifest_keys() if not is_internal_key(key)):
            manifest = cache.find_manifest(key)  # What may not be used stays away.
            if manifest is not None:
                found[key] = manifest.payload
    else:
        for key in keys:
            find(key, is_needed=True)
            for before in earlier_keys(key):
                find(before, is_needed=True)
        # An assembly does with the files of its pieces; their manifests serve other models.
        for payload in list(found.values()):
            for record in _records(payload):
                find(record["key"], is_needed=False)
    if not found:
        raise BundleIncompleteError(path, "there is nothing to put into it")
    return found


def _records(payload: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of artifacts that an assembly has, or a piece in parts; else none."""
    details = payload.get("details")
    records = payload.get("pieces")
    if payload.get("kind") == "parts" and isinstance(details, dict):
        records = details.get("records")
    if not isinstance(records, list):
        return []
    found = [
        record
        for record in records
        if isinstance(record, dict)
        and is_key(record.get("key"))
        and isinstance(record.get("files"), dict)
        and all(is_file_name(n) and is_digest(d) for n, d in record["files"].items())
    ]
    return [*found, *(inner for record in found for inner in _records(record))]


def _digests(payload: Mapping[str, Any]) -> set[str]:
    """Return all blobs that a manifest needs."""
    files = [payload["files"], *(record["files"] for record in _records(payload))]
    return {digest for names in files for digest in names.values()}


def _needs(payloads: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for which machines the pieces are, and for which Pythons the assemblies."""
    toolchains, pythons = [], set()
    for payload in payloads:
        parts = payload.get("parts")
        if isinstance(parts, dict) and "torch" in parts:
            needed = {name: str(parts[name]) for name in _NEEDED_PARTS if name in parts}
            if needed not in toolchains:
                toolchains.append(needed)
        if isinstance(payload.get("python"), str):
            pythons.add(payload["python"])
    return {"pythons": sorted(pythons), "toolchains": sorted(toolchains, key=encode_body)}


def _describe(key: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    signature = payload.get("signature")
    return {
        "key": key,
        "kind": payload.get("kind"),
        "compiler": payload.get("compiler"),
        "seconds": payload.get("seconds"),
        "bytes": sum(payload["sizes"].values()),
        "signed_by": signature.get("key") if isinstance(signature, dict) else None,
    }


def _why_not_here(needs: Mapping[str, Any], parts_of: PartsOf) -> str | None:
    """Return why nothing of a bundle can run on this machine; None: something may."""
    problems = []
    for toolchain in needs["toolchains"]:
        try:
            here = parts_of(toolchain.get("device", "cpu"))
        except (PrecastError, ImportError, RuntimeError, AssertionError) as error:
            # What torch raises where a device is missing.
            problems.append(f"it is for {toolchain.get('device', 'cpu')}: {error}")
            continue
        differing = [
            f"{name} {toolchain[name]!r}, this machine has {here[name]!r}"
            for name in _NEEDED_PARTS
            if name in toolchain and name in here and not _is_alike(toolchain[name], here[name])
        ]
        problems.append(", and ".join(differing))
    if problems and all(problems):
        return f"it is for {min(problems, key=len)}"
    pythons = needs["pythons"]
    if pythons and python_identity() not in pythons:
        return f"it is for Python {' or '.join(pythons)}, this is {python_identity()}"
    return None


def _is_alike(one: str, other: str) -> bool:
    """Whether two parts are the same as far as both are known."""
    words, others = one.split(" "), str(other).split(" ")
    return len(words) == len(others) and all(
        a == b or UNKNOWN in (a, b) for a, b in zip(words, others, strict=True)
    )


# -- the file ------------------------------------------------------------------------


def _entries(names: Mapping[str, Any], offset: int) -> tuple[dict[str, _Entry], int]:
    """Return where each thing lies, one after the other in the order of names, and the end."""
    entries = {}
    for name in sorted(names):
        value = names[name]
        digest, size = (name, value) if isinstance(value, int) else value
        entries[name] = _Entry(digest, offset, size)
        offset += size
    return entries, offset


def _find_problem(index: Any) -> str | None:
    """Return what is wrong with an index, None if it is sound."""
    if not isinstance(index, dict) or index.keys() != {"blobs", "format", "manifests", "needs"}:
        return "it has other fields"
    if index["format"] != FORMAT:
        return f"format {index['format']!r}"
    blobs, manifests, needs = index["blobs"], index["manifests"], index["needs"]
    if not isinstance(blobs, dict) or not isinstance(manifests, dict):
        return "no tables of manifests and blobs"
    for digest, size in blobs.items():
        if not is_digest(digest) or not _is_size(size):
            return f"no blob: {digest!r}: {size!r}"
    for key, value in manifests.items():
        if (
            not is_key(key)
            or not isinstance(value, list)
            or len(value) != 2
            or not is_digest(value[0])
            or not _is_size(value[1])
            or value[1] > MAX_MANIFEST_BYTES
        ):
            return f"no manifest: {key!r}: {value!r}"
    if not isinstance(needs, dict) or needs.keys() != {"pythons", "toolchains"}:
        return "it does not say what it needs"
    texts = [needs["pythons"], *([list(t.values()) for t in _tables(needs["toolchains"])])]
    if not isinstance(needs["toolchains"], list) or len(texts) != len(needs["toolchains"]) + 1:
        return "toolchains of another kind"
    if any(not isinstance(t, list) or not all(isinstance(x, str) for x in t) for t in texts):
        return "needs that are no texts"
    return None


def _tables(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0
