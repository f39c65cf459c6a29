"""Writes the cache: blobs first, then the manifest that names them.

So a manifest is never found before its files, except where a tier lost them since, and that is a
miss. Reading is `loader.py`.
"""

from __future__ import annotations

import json
import os

from precast.cache.attempt import try_quarantine, try_write
from precast.cache.layered import LayeredCache
from precast.cache.manifest import complete_payload, encode_manifest
from precast.cache.names import check_key
from precast.cache.trust import NO_KEYS
from precast.errors import StoreError
from precast.events import ArtifactPublished, TierFailed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from precast.cache.collect import Collector
    from precast.cache.interface import CacheInterface
    from precast.cache.lease import Leases
    from precast.cache.trust import Trust
    from precast.errors import Reason
    from precast.events import Emit


class CacheStorage:
    """Publishes artifacts into tiers, and takes them back.

    A tier that fails is reported and left out; what no tier took is simply not found again.

    Safe to call from several threads at once.
    """

    def __init__(
        self,
        tiers: Sequence[CacheInterface],
        emit: Emit,
        clock: Callable[[], float],
        *,
        trust: Trust = NO_KEYS,
        make_collector: Callable[[], Collector] | None = None,
    ) -> None:
        """Write to `tiers`.

        Args:
            trust: Signs what is published, where it has a key.
            make_collector: Makes what keeps the tiers within their bounds, at the first publishing.
        """
        self._layered = LayeredCache(tiers, emit, clock, trust=trust)
        self._emit = emit
        self._clock = clock
        self._make_collector = make_collector
        self._collector: Collector | None = None

    def publish(
        self,
        key: str,
        payload: Mapping[str, Any],
        files: Mapping[str, bytes | os.PathLike[str]],
        *,
        is_local: bool = False,
    ) -> dict[str, Any]:
        """Store an artifact in each tier and return its payload as a loader will give it.

        Args:
            key: What it will be found under; an older manifest of that key is replaced.
            payload: Plain JSON values; with `unsigned` set it is not signed.
                `RESERVED_FIELDS` are added: `files`, name to digest, is what `CacheLoader.files`
                wants.
            files: Name to bytes, or to the path of a file that is read now.
            is_local: It concerns this machine alone: leave out tiers that others read.

        Raises:
            ValueError, TypeError: A name, the key or the payload cannot be stored anywhere.
            OSError: A file that was given as a path cannot be read.
        """
        contents = {name: _read_source(source) for name, source in files.items()}
        complete = complete_payload(key, payload, contents)
        manifest = encode_manifest(self._layered.trust.sign(complete))
        blobs = {complete["files"][name]: data for name, data in contents.items()}
        is_kept = False
        for tier in sorted(self._layered.tiers, key=lambda tier: tier.is_in_memory):
            if is_local and not (tier.is_in_memory or tier.keeps_files):
                continue
            # Memory is for the blobs that nothing else took, lest each costs its size in RAM.
            has_stored = self._store(
                tier, key, manifest, {} if is_kept and tier.is_in_memory else blobs
            )
            is_kept |= has_stored
        if self._make_collector is not None:
            if self._collector is None:
                self._collector = self._make_collector()
            self._collector.note_publish()
        return json.loads(manifest[manifest.index(b"\n") :])  # type: ignore[no-any-return]

    def open_leases(self) -> Leases:
        """Return leases in the tier that most others share, for work whose result comes here."""
        from precast.cache.lease import Leases  # Few starts compile.

        return Leases(self._layered.tiers, self._emit)

    def close(self) -> None:
        """End what runs in the background. Publishing goes on working."""
        if self._collector is not None:
            self._collector.close()

    def discard(self, key: str) -> None:
        """Forget a key in each tier. Its blobs stay: other keys may share them."""
        self._layered.delete_manifest(key)

    def quarantine(self, key: str, reason: Reason) -> None:
        """Set aside in each tier what a key names, because it turned out not to be usable.

        For what only shows in use: its bytes are what was stored, so its blobs stay. What nobody
        trusted vouches for was not used, and is left to others.
        """
        check_key(key)
        for tier in self._layered.tiers:
            if self._layered.find_in(tier, key) is not None:
                try_quarantine(self._emit, tier, tier.quarantine_manifest, key, reason)

    def _store(
        self, tier: CacheInterface, key: str, manifest: bytes, blobs: Mapping[str, bytes]
    ) -> bool:
        """Write to one tier, and say whether it has all of it now."""
        started_s = self._clock()
        if not tier.is_writable:
            failure = StoreError(tier.name, "write manifest", "it cannot be written")
            self._emit(TierFailed(failure.tier, failure.operation, failure.reason))
            return False
        for digest, data in blobs.items():
            if not try_write(self._emit, tier, tier.write_blob, digest, data):
                return False
        if not try_write(self._emit, tier, tier.write_manifest, key, manifest):
            return False
        if not tier.is_in_memory:  # Nobody else could find it there.
            num_bytes = len(manifest) + sum(len(data) for data in blobs.values())
            self._emit(ArtifactPublished(key, tier.name, num_bytes, self._clock() - started_s))
        return True


def _read_source(source: bytes | os.PathLike[str]) -> bytes:
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:  # noqa: PTH123 - any path-like, not only pathlib's
        return file.read()
