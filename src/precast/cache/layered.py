# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""Several tiers as one: what fails is skipped, what is damaged is set aside.

Everything read here is checked, so that a nearer tier is only ever filled with sound bytes, and a
damaged copy in one tier does not hide a sound one in the next. Retrying and deadlines are not
here; they wrap a single tier (`guarded.py`).
"""

from __future__ import annotations

from hashlib import sha256

from precast.cache.attempt import try_quarantine, try_read, try_write
from precast.cache.manifest import decode_manifest
from precast.cache.names import check_digest, check_key
from precast.cache.trust import NO_KEYS, is_unsigned, mark_unsigned, untrusted_reason
from precast.errors import ArtifactCorruptError
from precast.events import ArtifactRefused, BlobFetched

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from precast.cache.interface import CacheInterface, Entry, LeaseInterface
    from precast.cache.trust import Trust
    from precast.cache.writer import BackgroundWriter
    from precast.events import Emit


class FoundManifest:
    """A sound manifest: its payload, its bytes and the name of the tier that had it."""

    __slots__ = ("data", "payload", "tier")

    def __init__(self, payload: dict[str, Any], data: bytes, tier: str) -> None:
        self.payload = payload
        self.data = data
        self.tier = tier


class LayeredCache:
    """Reads tiers in order, nearest first, and fills the nearer ones from the one that answers.

    A tier that fails is skipped and reported: a cache must never stop a model. So no `StoreError`
    comes out of this one, and that no tier took a write is only to be seen in the events.
    Manifests must be as `encode_manifest` writes them; anything else is damage.

    Source: follows `CacheInterface`, where the methods are described.
    """

    name = "layered"

    def __init__(
        self,
        tiers: Sequence[CacheInterface],
        emit: Emit,
        clock: Callable[[], float],
        *,
        trust: Trust = NO_KEYS,
        writer: BackgroundWriter | None = None,
    ) -> None:
        """Read from `tiers`, nearest first; those that `writer` names are filled by it."""
        self.tiers = tuple(tiers)
        self._emit = emit
        self._clock = clock
        self.trust = trust
        self._refused: set[tuple[str, str]] = set()  # Tier and key of what was reported.
        self._writer = writer

    @property
    def is_writable(self) -> bool:
        """Whether a write has a chance in any tier."""
        return any(tier.is_writable for tier in self.tiers)

    @property
    def is_shared(self) -> bool:
        """Whether any tier is: what is found may come from there."""
        return any(tier.is_shared for tier in self.tiers)

    @property
    def is_in_memory(self) -> bool:
        """Whether all tiers are."""
        return all(tier.is_in_memory for tier in self.tiers)

    @property
    def keeps_files(self) -> bool:
        """Whether any tier does."""
        return any(tier.keeps_files for tier in self.tiers)

    def find_manifest(self, key: str) -> FoundManifest | None:
        """Return the nearest manifest that is sound and may be used; fill nearer tiers with it."""
        check_key(key)
        for i, tier in enumerate(self.tiers):
            found = self.find_in(tier, key)
            if found is None:
                continue
            self._write_later(tier, tier.touch_manifest, key)
            for nearer in self.tiers[:i]:
                if nearer.is_writable:
                    self._write_later(nearer, nearer.write_manifest, key, found.data)
            return found
        return None

    def find_in(self, tier: CacheInterface, key: str) -> FoundManifest | None:
        """Return the manifest that one tier has, where it is sound and may be used."""
        data = try_read(self._emit, tier, tier.read_manifest, key)
        if data is None:
            return None
        try:
            payload = decode_manifest(key, data, f"{tier.name}:{key}")
        except ArtifactCorruptError as error:
            try_quarantine(self._emit, tier, tier.quarantine_manifest, key, error.reason)
            return None
        problem = self.trust.find_problem(tier, payload)
        if problem is not None:
            if not self.trust.allow_unsigned:
                self._refuse(tier, key, problem)
                return None
            if not is_unsigned(payload):
                try:
                    payload, data = mark_unsigned(payload)
                except (ValueError, RecursionError) as error:
                    self._refuse(tier, key, str(error))
                    return None
        return FoundManifest(payload, data, tier.name)

    def _refuse(self, tier: CacheInterface, key: str, problem: str) -> None:
        """Leave a manifest where it is, since it may be good for others, and say so once."""
        if (tier.name, key) not in self._refused:
            self._refused.add((tier.name, key))
            what = f"{tier.name}:{key}"
            self._emit(ArtifactRefused(tier.name, key, untrusted_reason(what, problem)))

    def read_manifest(self, key: str) -> bytes | None:
        found = self.find_manifest(key)
        return None if found is None else found.data

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        for tier in self._writable_tiers():
            try_write(self._emit, tier, tier.write_manifest, key, data)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        for tier in self._writable_tiers():
            try_write(self._emit, tier, tier.delete_manifest, key)

    def manifest_keys(self) -> Iterator[str]:
        seen: set[str] = set()
        for tier in self.tiers:
            keys = try_read(self._emit, tier, _list_manifests, tier)
            new = (keys or set()) - seen
            seen |= new
            yield from new

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        for i, tier in enumerate(self.tiers):
            started_s = self._clock()
            data = try_read(self._emit, tier, tier.read_blob, digest)
            if data is None:
                continue
            seconds = self._clock() - started_s
            found = sha256(data).hexdigest()
            if found != digest:
                damage = ArtifactCorruptError(f"{tier.name}:{digest}", f"digest {digest}", found)
                try_quarantine(self._emit, tier, tier.quarantine_blob, digest, damage.reason)
                continue
            if tier.is_shared:
                self._emit(BlobFetched(digest, tier.name, seconds, len(data)))
            for nearer in self.tiers[:i]:
                if nearer.is_writable and not nearer.is_in_memory:
                    self._write_later(nearer, nearer.write_blob, digest, data)
            return data
        return None

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        is_kept = False
        for tier in sorted(self._writable_tiers(), key=lambda tier: tier.is_in_memory):
            if not (tier.is_in_memory and is_kept):
                is_kept |= try_write(self._emit, tier, tier.write_blob, digest, data)

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        return any(try_read(self._emit, tier, tier.has_blob, digest) for tier in self.tiers)

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        for tier in self.tiers:
            path = try_read(self._emit, tier, tier.local_blob_path, digest)
            if path is not None:
                return path
        return None

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        for tier in self.tiers:
            directory = try_read(self._emit, tier, tier.link_tree, files)
            if directory is not None:
                return directory
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        places = [
            try_read(self._emit, tier, tier.quarantine_manifest, key, reason)
            for tier in self._writable_tiers()
            if try_read(self._emit, tier, tier.read_manifest, key) is not None
        ]
        return ", ".join(place for place in places if place)

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        places = [
            try_read(self._emit, tier, tier.quarantine_blob, digest, reason)
            for tier in self._writable_tiers()
            if try_read(self._emit, tier, tier.has_blob, digest)
        ]
        return ", ".join(place for place in places if place)

    def _write_later(self, tier: CacheInterface, method: Callable[..., None], *args: Any) -> None:
        """Write to a tier, behind the caller's back where that is how the tier is written."""
        if self._writer is not None and tier.name in self._writer.tiers:
            self._writer.submit(tier.name, lambda: try_write(self._emit, tier, method, *args))
        else:
            try_write(self._emit, tier, method, *args)

    def touch_manifest(self, key: str) -> None:
        check_key(key)
        for tier in self._writable_tiers():
            try_write(self._emit, tier, tier.touch_manifest, key)

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        for tier in self._writable_tiers():
            try_write(self._emit, tier, tier.delete_blob, digest)

    def entries(self) -> Iterator[Entry]:
        """Iterate over what any tier keeps, each once; times are those of the nearest tier."""
        seen: set[tuple[bool, str]] = set()
        for tier in self.tiers:
            for entry in try_read(self._emit, tier, _list_entries, tier) or ():
                if (entry.is_manifest, entry.name) not in seen:
                    seen.add((entry.is_manifest, entry.name))
                    yield entry

    def now_s(self) -> float:
        """Return the latest of the tiers' clocks; to decide what may go, ask a single tier."""
        times = [try_read(self._emit, tier, tier.now_s) for tier in self.tiers]
        return max((time for time in times if time is not None), default=0.0)

    def sweep(self, grace_s: float) -> None:
        for tier in self._writable_tiers():
            try_write(self._emit, tier, tier.sweep, grace_s)

    @property
    def leases(self) -> LeaseInterface | None:
        """Those that reach farthest; `lease.Leases` goes on to the next ones where they fail."""
        for tier in reversed(self.tiers):
            leases = try_read(self._emit, tier, _leases_of, tier)
            if leases is not None:
                return leases
        return None

    def _writable_tiers(self) -> list[CacheInterface]:
        return [tier for tier in self.tiers if tier.is_writable]


def _list_manifests(tier: CacheInterface) -> set[str]:
    return set(tier.manifest_keys())


def _list_entries(tier: CacheInterface) -> list[Entry]:
    return list(tier.entries())


def _leases_of(tier: CacheInterface) -> LeaseInterface | None:
    return tier.leases
