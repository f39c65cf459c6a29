# ruff: noqa: D102
# D102: `CacheInterface` describes the methods of `BundleCache`.
"""Bundles: manifests and blobs as one file, for container images and machines without a network.

Here a bundle is a tier, which a start reads where it lies. Who vouches for it is said by the
signatures of the manifests in it (`trust.py`): it is read like a tier that others may write to.
`bundle_format.py` is the file, `bundle_writing.py` makes one, `bundle_reading.py` shows, checks
and unpacks one.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager, suppress

from precast.cache.bundle_format import OpenBundle, why_not_here
from precast.cache.names import check_digest, check_key
from precast.errors import BundleError, StoreError
from precast.machine import parts_without_torch

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from precast.cache.bundle_format import PartsOf
    from precast.cache.interface import Entry


class BundleCache:
    """A bundle as a tier: read where it lies, never written.

    Opened when it is first asked for something. Of what turns out to be damaged, nothing more is
    read for as long as this lives.

    Source: follows `CacheInterface`, where the methods are described.
    """

    is_writable = False
    is_in_memory = False
    is_shared = True  # Whoever made the file wrote it: its manifests need signatures.
    keeps_files = False
    leases = None

    def __init__(
        self, path: str | os.PathLike[str], *, parts_of: PartsOf = parts_without_torch
    ) -> None:
        """Open nothing yet.

        Args:
            path: Of the file.
            parts_of: Returns this machine's parts of a key for a type of device; a bundle for
                other machines only is a `StoreError` that says so.
        """
        self.path = os.path.abspath(os.fspath(path))  # noqa: PTH100
        self.name = f"bundle {os.path.basename(self.path)}"  # noqa: PTH119
        self._parts_of = parts_of
        self._lock = threading.Lock()
        self._open_bundle: OpenBundle | None = None
        self._set_aside: set[str] = set()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def close(self) -> None:
        """Close the file; it is opened again where that is needed."""
        with self._lock:
            bundle, self._open_bundle = self._open_bundle, None
        if bundle is not None:
            bundle.close()

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        with self._store_errors("read manifest") as bundle:
            if key not in bundle.manifests or key in self._set_aside:
                return None
            return bundle.read(bundle.manifests[key])

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        raise self._read_only("write manifest")

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        raise self._read_only("delete manifest")

    def manifest_keys(self) -> Iterator[str]:
        with self._store_errors("list manifests") as bundle:
            keys = [key for key in bundle.manifests if key not in self._set_aside]
        return iter(keys)

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        with self._store_errors("read blob") as bundle:
            if digest not in bundle.blobs or digest in self._set_aside:
                return None
            return bundle.read(bundle.blobs[digest])

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        raise self._read_only("write blob")

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        with self._store_errors("look for blob") as bundle:
            return digest in bundle.blobs and digest not in self._set_aside

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        return None

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        self._set_aside.add(key)
        return f"{self.path} (left where it is, not read again)"

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        self._set_aside.add(digest)
        return f"{self.path} (left where it is, not read again)"

    def touch_manifest(self, key: str) -> None:
        check_key(key)  # A bundle does not change, and nothing in it grows old.

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        raise self._read_only("delete blob")

    def entries(self) -> Iterator[Entry]:
        from precast.cache.interface import Entry

        with self._store_errors("list entries") as bundle:
            found = [
                Entry(is_manifest, name, entry.size, 0.0)
                for is_manifest, part in ((True, bundle.manifests), (False, bundle.blobs))
                for name, entry in part.items()
                if name not in self._set_aside
            ]
        return iter(found)

    def now_s(self) -> float:
        return 0.0

    def sweep(self, grace_s: float) -> None:
        pass  # Nothing lies in it but entries.

    def _read_only(self, operation: str) -> StoreError:
        return StoreError(self.name, operation, "a bundle is never written")

    @contextmanager
    def _store_errors(self, operation: str) -> Iterator[OpenBundle]:
        try:
            with self._lock:
                if self._open_bundle is None:
                    self._open_bundle = self._open()
                bundle = self._open_bundle
            yield bundle
        except OSError as error:
            problem = f"{error.strerror or error}: {self.path}"
            raise StoreError(self.name, operation, problem) from error
        except BundleError as error:
            raise StoreError(self.name, operation, error.problem) from error

    def _open(self) -> OpenBundle:
        bundle = OpenBundle(self.path)
        if problem := why_not_here(bundle.needs, self._parts_of):
            bundle.close()
            raise BundleError(self.path, problem)
        return bundle
