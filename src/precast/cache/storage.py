"""Writes the cache: blobs first, then the manifest that names them.

So a manifest is never found before its files, except where a tier lost them since, and that is a
miss. Reading is `loader.py`.
"""

from __future__ import annotations

import json
import os
from functools import partial
from hashlib import sha256

from precast.cache.attempt import try_quarantine, try_read, try_write
from precast.cache.layered import LayeredCache
from precast.cache.manifest import complete_payload, encode_manifest
from precast.cache.names import check_digest, check_key
from precast.cache.trust import NO_KEYS, is_shared
from precast.errors import StoreError
from precast.events import ArtifactPublished, TierFailed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import Any

    from precast.cache.collect import Collector
    from precast.cache.interface import CacheInterface
    from precast.cache.lease import Leases
    from precast.cache.trust import Trust
    from precast.cache.writer import BackgroundWriter
    from precast.errors import Reason
    from precast.events import Emit

#: How long a lease is kept after the work is done, so that a shared tier has the result first.
SETTLE_S = 10.0


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
        writer: BackgroundWriter | None = None,
        read_only: Collection[str] = (),
        make_collector: Callable[[], Collector] | None = None,
    ) -> None:
        """Write into `tiers`.

        Args:
            tiers: Nearest first.
            emit: Is told what happens, also by the writer's thread.
            clock: Seconds, for durations.
            trust: Signs what is published, where it has a key.
            writer: Writes those tiers that it names, behind the caller's back.
            read_only: Names of tiers that are never published into, which is no failure.
            make_collector: Makes what keeps the tiers within their bounds, at the first publishing.
        """
        self._layered = LayeredCache(tiers, emit, clock, trust=trust)
        self._emit = emit
        self._clock = clock
        self._writer = writer
        self._read_only = frozenset(read_only)
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

        Tiers of the background writer get it a while later; `flush` waits for that.

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
        tiers = [
            tier
            for tier in self._layered.tiers
            if tier.name not in self._read_only
            and (tier.is_in_memory or tier.keeps_files or not is_local)
        ]
        is_kept = False
        for tier in sorted(tiers, key=lambda tier: tier.is_in_memory):
            if self._is_behind(tier):
                continue
            # Memory is for the blobs that nothing else took, lest each costs its size in RAM.
            has_stored = self._store(
                tier, key, manifest, {} if is_kept and tier.is_in_memory else blobs
            )
            is_kept |= has_stored and not tier.is_in_memory
        # What a nearer tier keeps is read there when its turn comes: a queue of bytes has no bound.
        later: Mapping[str, bytes | None] = dict.fromkeys(blobs) if is_kept else blobs
        for tier in filter(self._is_behind, tiers):
            self._submit(tier, partial(self._store, tier, key, manifest, later))
        if self._make_collector is not None:
            if self._collector is None:
                self._collector = self._make_collector()
            self._collector.note_publish()
        return json.loads(manifest[manifest.index(b"\n") :])  # type: ignore[no-any-return]

    def open_leases(self) -> Leases:
        """Return leases in the tier that most others share, for work whose result comes here.

        Others cannot use what nobody signs, unless they are set to: then they would wait in vain,
        one for the other, so leases are left to the tiers that are this user's own.
        """
        from precast.cache.lease import Leases  # Few starts compile.

        trust = self._layered.trust
        is_of_use = trust.allow_unsigned or trust.signing_key is not None
        tiers = [tier for tier in self._layered.tiers if is_of_use or not is_shared(tier)]
        return Leases(tiers, self._emit, settle=self._settle)

    def discard(self, key: str) -> None:
        """Forget a key in each tier. Its blobs stay: other keys may share them."""
        check_key(key)
        for tier in self._layered.tiers:
            if tier.is_writable or tier.name in self._read_only:
                self._forget(tier, key)
                if self._is_behind(tier):  # A write of that key may be waiting still.
                    self._submit(tier, partial(self._forget, tier, key))

    def discard_blobs(self, digests: Iterable[str]) -> None:
        """Remove blobs in each tier, whatever key names them: that is a miss from now on."""
        for digest in digests:
            check_digest(digest)
            for tier in self._layered.tiers:
                if tier.is_writable or tier.name in self._read_only:
                    self._remove_blob(tier, digest)
                    if self._is_behind(tier):
                        self._submit(tier, partial(self._remove_blob, tier, digest))

    def quarantine(self, key: str, reason: Reason) -> None:
        """Set aside in each tier what a key names, because it turned out not to be usable.

        For what only shows in use: its bytes are what was stored, so its blobs stay. What nobody
        trusted vouches for was not used, and is left to others.
        """
        check_key(key)
        for tier in self._layered.tiers:
            if self._layered.find_in(tier, key) is not None:
                try_quarantine(self._emit, tier, tier.quarantine_manifest, key, reason)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all tiers have what was published so far; False where time ran out."""
        return self._writer is None or self._writer.flush(timeout_s)

    def close(self) -> None:
        """End what runs in the background; give waiting writes a last while.

        Publishing goes on working.
        """
        if self._collector is not None:
            self._collector.close()
        if self._writer is not None:
            self._writer.close()

    def _settle(self, tier: CacheInterface) -> bool:
        """Wait until a tier has what was published so far, for a while where that is slow."""
        return not self._is_behind(tier) or self.flush(SETTLE_S)

    def _forget(self, tier: CacheInterface, key: str) -> None:
        try_write(self._emit, tier, tier.delete_manifest, key)

    def _remove_blob(self, tier: CacheInterface, digest: str) -> None:
        try_write(self._emit, tier, tier.delete_blob, digest)

    def _is_behind(self, tier: CacheInterface) -> bool:
        return self._writer is not None and tier.name in self._writer.tiers

    def _submit(self, tier: CacheInterface, job: Callable[[], object]) -> None:
        assert self._writer is not None
        self._writer.submit(tier.name, job)

    def _store(
        self, tier: CacheInterface, key: str, manifest: bytes, blobs: Mapping[str, bytes | None]
    ) -> bool:
        """Write to one tier, and say whether it has all of it now.

        Args:
            tier: Where to.
            key: Of the manifest.
            manifest: As it is stored.
            blobs: Digest to bytes; None: a nearer tier keeps them.
        """
        started_s = self._clock()
        if not tier.is_writable:
            failure = StoreError(tier.name, "write manifest", "it cannot be written")
            self._emit(TierFailed(failure.tier, failure.operation, failure.reason))
            return False
        num_bytes = len(manifest)
        for digest, given in blobs.items():
            # What lies in a shared tier is not compared: whoever found it damaged set it aside.
            if tier.is_shared and try_read(self._emit, tier, tier.has_blob, digest):
                continue
            data = self._read_nearer(tier, digest) if given is None else given
            if data is None or not try_write(self._emit, tier, tier.write_blob, digest, data):
                return False
            num_bytes += len(data)
        if not try_write(self._emit, tier, tier.write_manifest, key, manifest):
            return False
        if not tier.is_in_memory:  # Nobody else could find it there.
            self._emit(ArtifactPublished(key, tier.name, num_bytes, self._clock() - started_s))
        return True

    def _read_nearer(self, tier: CacheInterface, digest: str) -> bytes | None:
        """Return the bytes of a blob for a shared tier; it may be gone or damaged by now."""
        for nearer in self._layered.tiers:
            if not self._is_behind(nearer):
                data = try_read(self._emit, nearer, nearer.read_blob, digest)
                if data is not None and sha256(data).hexdigest() == digest:
                    return data
        failure = StoreError(tier.name, "write blob", f"no nearer tier has blob {digest} any more")
        self._emit(TierFailed(failure.tier, failure.operation, failure.reason))
        return None


def _read_source(source: bytes | os.PathLike[str]) -> bytes:
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:  # noqa: PTH123 - any path-like, not only pathlib's
        return file.read()
