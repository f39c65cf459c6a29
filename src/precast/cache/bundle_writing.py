"""Making a bundle: what a model needs is looked for in tiers and put into one file."""

from __future__ import annotations

import os

from precast.cache.bundle_format import blobs_of, needs_of, records_of, write_bundle
from precast.cache.layered import LayeredCache
from precast.cache.manifest import encode_manifest
from precast.cache.names import earlier_keys, is_internal_key
from precast.cache.trust import NO_KEYS, is_unsigned
from precast.errors import BundleIncompleteError, BundleUntrustedError
from precast.events import ArtifactRefused, TierFailed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from precast.cache.interface import CacheInterface
    from precast.cache.trust import Trust
    from precast.events import Emit, Event


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
    digests = sorted({digest for payload in found.values() for digest in blobs_of(payload)})

    def blob(digest: str) -> bytes:
        data = cache.read_blob(digest)
        if data is None:
            raise BundleIncompleteError(place, f"no tier has a sound blob {digest}")
        return data

    return write_bundle(place, manifests, digests, blob, needs=needs_of(found.values()))


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
            for record in records_of(payload):
                find(record["key"], is_needed=False)
    if not found:
        raise BundleIncompleteError(path, "there is nothing to put into it")
    return found
