"""A manifest as bytes: one line that proves the rest whole, then JSON.

```
precast-manifest 1 <SHA-256 of everything after this line>\\n
{"files":{"piece.so":"<digest>"},"format":1,"key":"<key>","sizes":{"piece.so":1234}, …}
```

`docs/format.md` is the specification. Nothing here reads or writes a tier.
"""

from __future__ import annotations

import json
from hashlib import sha256

from precast.cache.names import check_file_name, check_key, is_digest, is_file_name
from precast.errors import ArtifactCorruptError

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: Stands in every manifest. One of another format lies in another bucket, see `disk.py`.
FORMAT = 1

#: A manifest that is larger is not read, whatever it says: a reader's memory is bounded.
MAX_MANIFEST_BYTES = 32 << 20

#: What `complete_payload` adds; a payload may not bring these itself.
RESERVED_FIELDS = ("files", "format", "key", "signature", "sizes")

_MAGIC = b"precast-manifest %d " % FORMAT
_HEADER_BYTES = len(_MAGIC) + 64 + 1


def complete_payload(
    key: str, payload: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return the payload with what every manifest says: its key, its files and their sizes."""
    check_key(key)
    if taken := [name for name in RESERVED_FIELDS if name in payload]:
        raise ValueError(f"the cache writes {', '.join(taken)} itself; leave it out of the payload")
    for name in files:
        check_file_name(name)
    return {
        **payload,
        "files": {name: sha256(data).hexdigest() for name, data in files.items()},
        "format": FORMAT,
        "key": key,
        "sizes": {name: len(data) for name, data in files.items()},
    }


def encode_manifest(payload: Mapping[str, Any]) -> bytes:
    """Return a complete payload as bytes; the same payload always gives the same bytes.

    Raises:
        ValueError, TypeError: The payload cannot be written as JSON, or is too large.
    """
    body = encode_body(payload)
    if _HEADER_BYTES + len(body) > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"a manifest of {len(body)} bytes would not be read again (at most "
            f"{MAX_MANIFEST_BYTES}); put what is large into a file"
        )
    return _MAGIC + sha256(body).hexdigest().encode() + b"\n" + body


def encode_body(payload: Mapping[str, Any]) -> bytes:
    """Return plain values as the one JSON text that they have here.

    Raises:
        ValueError, TypeError: They cannot be written as JSON.
    """
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode_manifest(key: str, data: bytes, where: str) -> dict[str, Any]:
    """Return the payload of a manifest, every promise of the format checked.

    Args:
        key: What it was found under; a manifest of another key is damage, not a hit.
        data: As a tier gave it, at worst chosen by an attacker.
        where: Names it in the error.

    Raises:
        ArtifactCorruptError: It is not what `encode_manifest` wrote for this key.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactCorruptError(
            where, f"at most {MAX_MANIFEST_BYTES} bytes", f"at least {len(data)}"
        )
    if not data.startswith(_MAGIC) or data[_HEADER_BYTES - 1 : _HEADER_BYTES] != b"\n":
        raise ArtifactCorruptError(
            where, f"a line beginning {_MAGIC.decode()!r}", repr(data[:24]) if data else "no bytes"
        )
    body = memoryview(data)[_HEADER_BYTES:]
    expected = data[len(_MAGIC) : _HEADER_BYTES - 1]
    found = sha256(body).hexdigest()
    if found.encode() != expected:
        raise ArtifactCorruptError(where, f"digest {expected.decode('ascii', 'replace')}", found)
    try:
        payload = json.loads(bytes(body), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # Deep nesting is a RecursionError.
        raise ArtifactCorruptError(where, "JSON", str(error)) from error
    if problem := _find_problem(key, payload):
        raise ArtifactCorruptError(where, *problem)
    return payload  # type: ignore[no-any-return]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _find_problem(key: str, payload: Any) -> tuple[str, str] | None:
    """Return what was expected and what was found instead, or None for a sound payload."""
    if not isinstance(payload, dict):
        return "a JSON object", type(payload).__name__
    if payload.get("format") != FORMAT:
        return f"format {FORMAT}", repr(payload.get("format"))
    if payload.get("key") != key:
        return f"key {key}", repr(payload.get("key"))
    files, sizes = payload.get("files"), payload.get("sizes")
    if not isinstance(files, dict) or not isinstance(sizes, dict) or files.keys() != sizes.keys():
        return "files and their sizes", "something else"
    for name, digest in files.items():
        if not is_file_name(name) or not is_digest(digest):
            return "a file name and its digest", f"{name!r}: {digest!r}"
    if bad := [size for size in sizes.values() if type(size) is not int or size < 0]:
        return "sizes in bytes", repr(bad[0])
    return None
