# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""The tier in this process's memory: bounded, and gone with the process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from precast.cache.names import check_digest, check_key
from precast.errors import StoreError

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from precast.cache.interface import Entry

_MANIFEST = "manifest"
_BLOB = "blob"


class MemoryCache:
    """Keeps up to `max_bytes`; what was used least recently is forgotten first.

    Source: follows `CacheInterface`, where the methods are described.
    """

    name = "memory"
    is_writable = True
    is_in_memory = True
    is_shared = False
    keeps_files = False
    leases = None

    def __init__(self, max_bytes: int = 256 << 20, clock: Callable[[], float] = time.time) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._values: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._used_s: dict[tuple[str, str], float] = {}
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """How many bytes are kept now."""
        return self._num_bytes

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        return self._read(_MANIFEST, key)

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        self._write(_MANIFEST, key, data)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        self._delete(_MANIFEST, key)

    def manifest_keys(self) -> Iterator[str]:
        with self._lock:
            keys = [name for kind, name in self._values if kind == _MANIFEST]
        return iter(keys)

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        return self._read(_BLOB, digest)

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        self._write(_BLOB, digest, data)

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        with self._lock:
            return (_BLOB, digest) in self._values

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        return None

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        self.delete_manifest(key)
        return f"{self.name} (dropped)"  # Nobody could look at it later; a copy would only cost.

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        self._delete(_BLOB, digest)
        return f"{self.name} (dropped)"

    def touch_manifest(self, key: str) -> None:
        check_key(key)  # Reading counts by itself.

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        self._delete(_BLOB, digest)

    def entries(self) -> Iterator[Entry]:
        from precast.cache.interface import Entry

        with self._lock:
            found = [
                Entry(kind == _MANIFEST, name, len(data), self._used_s[kind, name])
                for (kind, name), data in self._values.items()
            ]
        return iter(found)

    def now_s(self) -> float:
        return self._clock()

    def sweep(self, grace_s: float) -> None:
        pass  # Nothing lies here but entries.

    def _read(self, kind: str, name: str) -> bytes | None:
        with self._lock:
            data = self._values.get((kind, name))
            if data is not None:
                self._values.move_to_end((kind, name))
                if kind == _MANIFEST:
                    self._used_s[kind, name] = self._clock()
            return data

    def _write(self, kind: str, name: str, data: bytes) -> None:
        data = bytes(data)  # Free for bytes; a caller's buffer could change under us.
        if len(data) > self._max_bytes:
            raise StoreError(
                self.name, f"write {kind}", f"{len(data)} bytes are more than its {self._max_bytes}"
            )
        with self._lock:
            self._num_bytes += len(data) - len(self._values.pop((kind, name), b""))
            self._values[kind, name] = data
            self._used_s[kind, name] = self._clock()
            while self._num_bytes > self._max_bytes:
                oldest, forgotten = self._values.popitem(last=False)
                del self._used_s[oldest]
                self._num_bytes -= len(forgotten)

    def _delete(self, kind: str, name: str) -> None:
        with self._lock:
            self._num_bytes -= len(self._values.pop((kind, name), b""))
            self._used_s.pop((kind, name), None)
