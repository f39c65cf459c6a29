# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""A tier that is read and never written, because the user said so."""

from __future__ import annotations

from precast.cache.names import check_digest, check_key
from precast.cache.wrapped import WrappedCache
from precast.errors import StoreError

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from precast.cache.interface import CacheInterface, Entry


class ReadOnlyCache(WrappedCache):
    """Passes reads on. What is bad there stays there, and is not found again by this object.

    Source: follows `CacheInterface`, where the methods are described.
    """

    def __init__(self, tier: CacheInterface) -> None:
        super().__init__(tier)
        self._ignored_keys: set[str] = set()
        self._ignored_blobs: set[str] = set()

    @property
    def is_writable(self) -> bool:
        """Never."""
        return False

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        return None if key in self._ignored_keys else self._tier.read_manifest(key)

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        raise self._refusal("write manifest")

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        self._ignored_keys.add(key)

    def manifest_keys(self) -> Iterator[str]:
        return (key for key in self._tier.manifest_keys() if key not in self._ignored_keys)

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        return None if digest in self._ignored_blobs else self._tier.read_blob(digest)

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        raise self._refusal("write blob")

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        return digest not in self._ignored_blobs and self._tier.has_blob(digest)

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        return None if digest in self._ignored_blobs else self._tier.local_blob_path(digest)

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        if self._tier.keeps_files:
            raise self._refusal("link tree")
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        self._ignored_keys.add(key)
        return f"{self.name} (ignored: it is read-only)"

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        self._ignored_blobs.add(digest)
        return f"{self.name} (ignored: it is read-only)"

    def touch_manifest(self, key: str) -> None:
        check_key(key)  # A note would be a write.

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        self._ignored_blobs.add(digest)

    def entries(self) -> Iterator[Entry]:
        return (
            entry
            for entry in self._tier.entries()
            if entry.name not in (self._ignored_keys if entry.is_manifest else self._ignored_blobs)
        )

    def now_s(self) -> float:
        return self._tier.now_s()

    def sweep(self, grace_s: float) -> None:
        pass  # It is for those who write.

    @property
    def leases(self) -> None:
        """None: who publishes nothing has nothing to agree on."""

    def _refusal(self, operation: str) -> StoreError:
        return StoreError(self.name, operation, "it is read-only by the cache's settings")
