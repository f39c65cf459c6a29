"""What is done with a bundle besides starting from it: shown, checked, copied into a tier.

Who vouches for a bundle is said by the signatures of the manifests in it (`trust.py`).
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from precast.cache.bundle_format import OpenBundle, blobs_of, why_not_here
from precast.cache.catalog import read_payload
from precast.cache.trust import NO_KEYS, is_unsigned, mark_unsigned
from precast.errors import (
    ArtifactCorruptError,
    BundleError,
    BundleIncompatibleError,
    BundleUntrustedError,
    StoreError,
)
from precast.machine import parts_without_torch

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from precast.cache.bundle_format import PartsOf
    from precast.cache.interface import CacheInterface
    from precast.cache.trust import Trust


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
            if missing := [d for d in blobs_of(payload) if d not in bundle.blobs]:
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
        if problem := why_not_here(bundle.needs, parts_of):
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
            wanted.update(blobs_of(payload))
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
        return payload is not None and all(map(tier.has_blob, blobs_of(payload)))
    except ArtifactCorruptError:
        return False


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[OpenBundle]:
    place = os.fspath(path)
    try:
        bundle = OpenBundle(place)
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
