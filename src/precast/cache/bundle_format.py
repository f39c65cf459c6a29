"""The file that a bundle is: its index, and manifests and blobs one after the other.

The same content gives the same bytes. Nothing in a bundle is a path, a time or an owner, and
nothing is unpickled; `docs/format.md` is the specification. What goes into one is decided by
`bundle_writing.py`, what is done with it by `bundle_reading.py` and, as a tier, `bundle.py`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import sha256

from precast.cache.manifest import MAX_MANIFEST_BYTES, decode_manifest, encode_body
from precast.cache.names import is_digest, is_file_name, is_key
from precast.errors import ArtifactCorruptError, BundleError, PrecastError, StoreError
from precast.machine import UNKNOWN, python_identity

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from typing import Any

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


class OpenBundle:
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

    def __enter__(self) -> OpenBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        os.close(self._file)

    def manifest(self, key: str) -> tuple[dict[str, Any], bytes]:
        """Return the payload and the bytes of a manifest, checked.

        Raises:
            BundleError: They are damaged.
        """
        data = self._checked(self.manifests[key], f"manifest {key}")
        try:
            return decode_manifest(key, data, f"{self.path}:{key}"), data
        except ArtifactCorruptError as error:
            raise BundleError(self.path, f"manifest {key}: {error.problem}") from error

    def blob(self, digest: str) -> bytes:
        """Return a blob, checked.

        Raises:
            BundleError: It is damaged.
        """
        return self._checked(self.blobs[digest], f"blob {digest}")

    def _checked(self, entry: _Entry, what: str) -> bytes:
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


# -- what is needed ----------------------------------------------------------------


def records_of(payload: Mapping[str, Any]) -> list[Mapping[str, Any]]:
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
    return [*found, *(inner for record in found for inner in records_of(record))]


def blobs_of(payload: Mapping[str, Any]) -> set[str]:
    """Return all blobs that a manifest needs."""
    files = [payload["files"], *(record["files"] for record in records_of(payload))]
    return {digest for names in files for digest in names.values()}


def needs_of(payloads: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
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


def why_not_here(needs: Mapping[str, Any], parts_of: PartsOf) -> str | None:
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
