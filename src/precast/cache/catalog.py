"""What lies in one tier, for people and for tools: list, check and copy it.

Reads what a start has no need of, and takes as long as it takes. Of a manifest's payload it looks
at what publishers write for people (`kind`, `model`, `parts`, …), and at the artifacts that an
assembly names; whatever is missing there is shown as missing.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from precast.cache.manifest import decode_manifest, encode_manifest
from precast.cache.names import is_internal_key
from precast.cache.trust import NO_KEYS, Trust, is_shared, is_unsigned, mark_unsigned
from precast.errors import ArtifactCorruptError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from precast.cache.interface import CacheInterface


def read_payload(tier: CacheInterface, key: str) -> dict[str, Any] | None:
    """Return the payload under a key, None where there is none.

    Raises:
        ArtifactCorruptError: It is damaged; it is left where it is.
        StoreError: The tier failed.
    """
    data = tier.read_manifest(key)
    return None if data is None else decode_manifest(key, data, f"{tier.name}:{key}")


def list_entries(tier: CacheInterface) -> list[dict[str, Any]]:
    """Return a line for each artifact of a tier; one that is damaged says so as `problem`.

    Raises:
        StoreError: The tier failed.
    """
    found = []
    used_by: dict[str, set[str]] = {}
    for key in sorted(key for key in tier.manifest_keys() if not is_internal_key(key)):
        data = tier.read_manifest(key)
        if data is None:
            continue  # Removed meanwhile.
        entry: dict[str, Any] = {"key": key, "manifest_bytes": len(data)}
        try:
            payload = decode_manifest(key, data, f"{tier.name}:{key}")
        except ArtifactCorruptError as error:
            found.append({**entry, **_labels({}), "problem": error.problem})
            continue
        found.append({**entry, **_labels(payload), "problem": None})
        for record in _records(payload):
            used_by.setdefault(record.get("key", ""), set()).add(payload.get("model", key))
    for entry in found:
        entry["used_by"] = sorted(used_by.get(entry["key"], ()))
    return found


def _labels(payload: Mapping[str, Any]) -> dict[str, Any]:
    parts = payload.get("parts")
    parts = parts if isinstance(parts, dict) else {}
    records = _records(payload)
    return {
        "kind": payload.get("kind", "unknown"),
        "model": payload.get("model"),
        "compiler": payload.get("compiler"),
        "device": parts.get("architecture") or parts.get("device", "cpu") if parts else None,
        "torch": str(parts.get("torch", "")).partition(" ")[0] or None,
        "seconds": payload.get("seconds"),
        "num_pieces": len(records) if records else None,
        "files": payload.get("files", {}),
        "file_bytes": sum(payload.get("sizes", {}).values()),
    }


def _records(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of the artifacts that an assembly names."""
    pieces = payload.get("pieces") if payload.get("kind") == "assembly" else None
    records = pieces if isinstance(pieces, list) else []
    return [record for record in records if isinstance(record, dict) and record.get("files")]


def stored_parts(
    tier: CacheInterface, clock: Callable[[], float], budget_s: float | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the keys of a tier and what they were made from.

    What is damaged or says nothing is left out; a tier that fails ends it.

    Args:
        tier: Where to look.
        clock: Seconds that only grow.
        budget_s: End after so many seconds, whatever is left.
    """
    end_s = None if budget_s is None else clock() + budget_s
    try:
        for key in tier.manifest_keys():
            if end_s is not None and clock() > end_s:
                return
            try:
                payload = read_payload(tier, key)
            except ArtifactCorruptError:
                continue
            if payload is not None and isinstance(payload.get("parts"), dict):
                yield key, payload["parts"]
    except StoreError:
        return


def find_damage(
    tier: CacheInterface, keys: Iterable[str], *, should_set_aside: bool = False
) -> dict[str, Any]:
    """Read manifests and every file that they name, and return what is wrong with them.

    An assembly whose artifacts are gone is listed as well: nothing is damaged, but the model will
    be captured again.

    Args:
        tier: Where they lie.
        keys: Of the manifests.
        should_set_aside: Move what is damaged into the tier's quarantine.

    Raises:
        StoreError: The tier failed.
    """
    problems: list[dict[str, Any]] = []
    digests: dict[str, str | None] = {}
    num_manifests = num_bytes = 0

    def problem_of_blob(digest: str) -> str | None:
        nonlocal num_bytes
        if digest not in digests:
            data = tier.read_blob(digest)
            if data is None:
                digests[digest] = "missing"
            else:
                num_bytes += len(data)
                found = sha256(data).hexdigest()
                digests[digest] = None if found == digest else f"has digest {found}"
                if found != digest and should_set_aside:
                    tier.quarantine_blob(digest, f"found by a check: {digests[digest]}")
        return digests[digest]

    for key in keys:
        try:
            payload = read_payload(tier, key)
        except ArtifactCorruptError as error:
            problems.append({"key": key, "file": None, "problem": error.problem})
            if should_set_aside:
                tier.quarantine_manifest(key, error.problem)
            continue
        if payload is None:
            continue
        num_manifests += 1
        for files in (payload["files"], *(record["files"] for record in _records(payload))):
            for name, digest in files.items():
                if problem := problem_of_blob(digest):
                    problems.append({"key": key, "file": name, "problem": problem})
    return {
        "tier": tier.name,
        "num_manifests": num_manifests,
        "num_blobs": len(digests),
        "num_bytes": num_bytes,
        "problems": problems,
        "is_set_aside": should_set_aside and bool(problems),
    }


def with_named(tier: CacheInterface, keys: Iterable[str]) -> list[str]:
    """Return keys and those of the artifacts that assemblies among them name, these first.

    Raises:
        StoreError: The tier failed.
    """
    ordered: dict[str, None] = {}
    for key in keys:
        try:
            payload = read_payload(tier, key)
        except ArtifactCorruptError:
            payload = None  # Whoever works on the key will find out.
        for record in _records(payload or {}):
            ordered.setdefault(record["key"])
        ordered.setdefault(key)
    return list(ordered)


def copy_entries(
    source: CacheInterface,
    target: CacheInterface,
    keys: Sequence[str],
    *,
    trust: Trust = NO_KEYS,
) -> dict[str, Any]:
    """Copy manifests with their blobs from one tier to another, and return what became of them.

    Nothing is copied that is not sound, and from a shared tier nothing that may not be used. Blobs
    first, so that a reader never finds a manifest without them.

    Args:
        source: Where to read.
        target: Where to write.
        keys: Of the manifests.
        trust: Whose signatures count; signs what goes to a shared tier.

    Raises:
        StoreError: A tier failed; what was copied until then is whole.
    """
    copied, present, problems = [], [], []
    num_bytes = 0
    for key in keys:
        data = source.read_manifest(key)
        if data is None:
            problems.append({"key": key, "problem": f"{source.name} does not have it"})
            continue
        try:
            payload = decode_manifest(key, data, f"{source.name}:{key}")
        except ArtifactCorruptError as error:
            problems.append({"key": key, "problem": error.problem})
            continue
        problem = trust.find_problem(source, payload)
        if problem is not None and not trust.allow_unsigned:
            problems.append({"key": key, "problem": problem})
            continue
        if problem is not None and not is_unsigned(payload):
            payload, data = mark_unsigned(payload)
        elif trust.signing_key is not None and is_shared(target):
            data = encode_manifest(trust.sign(payload))
        missing = [d for d in payload["files"].values() if not target.has_blob(d)]
        there = target.read_manifest(key)
        # What the target vouches for is not replaced by what nobody signed.
        if not missing and (there == data or (there is not None and problem is not None)):
            present.append(key)
            continue
        blobs = {digest: source.read_blob(digest) for digest in missing}
        bad = [d for d, blob in blobs.items() if blob is None or sha256(blob).hexdigest() != d]
        if bad:
            problem = f"its file {bad[0][:12]} is missing or damaged in {source.name}"
            problems.append({"key": key, "problem": problem})
            continue
        for digest, blob in blobs.items():
            assert blob is not None
            target.write_blob(digest, blob)
            num_bytes += len(blob)
        target.write_manifest(key, data)
        num_bytes += len(data)
        copied.append(key)
    return {
        "from": source.name,
        "to": target.name,
        "copied": copied,
        "present": present,
        "problems": problems,
        "num_bytes": num_bytes,
    }
