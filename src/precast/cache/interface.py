"""The seam of the cache: what a tier must be able to do.

A tier only keeps bytes. What they mean, whether they are undamaged and what happens when a tier
fails is decided above it: `manifest.py` frames and checks, `layered.py` skips what fails,
`loader.py` and `storage.py` are what the rest of Precast talks to. To write a tier of your own,
follow this page and inherit `precast.testing.CacheContract` in its tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class CacheInterface(Protocol):
    """One tier: one place that keeps artifacts.

    It keeps two kinds of things. A *manifest* is a small value under a key and may be replaced, as
    a whole. A *blob* is named by the SHA-256 of its bytes (64 lowercase hex digits), so it never
    changes; the tier takes the name on trust and whoever reads checks it. A key is 4 to 128
    characters out of `a-z 0-9 - _`; another key, or a digest that is none, is a `ValueError`.

    Safe to call from several threads and processes at once. A reader sees a whole value or none,
    never part of one. Nothing but `StoreError` (and the `ValueError` above) comes out of it.
    """

    @property
    def name(self) -> str:
        """What reports call this tier, for example `disk`."""

    @property
    def is_writable(self) -> bool:
        """Whether a write has a chance. A tier that is not is read, and otherwise left in peace."""

    @property
    def is_in_memory(self) -> bool:
        """Whether what is kept counts as this process's memory, and ends with it.

        Such a tier is spared the blobs that another tier keeps.
        """

    @property
    def is_shared(self) -> bool:
        """Whether others than this user may write here, so that what is read may be foreign.

        Such a tier may be far away, too: it is written behind the caller's back.
        """

    @property
    def keeps_files(self) -> bool:
        """Whether blobs are files of this machine, so that `local_blob_path` can answer."""

    def read_manifest(self, key: str) -> bytes | None:
        """Return the bytes last written. None: not there. StoreError: could not look."""

    def write_manifest(self, key: str, data: bytes) -> None:
        """Keep `data` under `key` in place of what was there. StoreError: the old still is."""

    def delete_manifest(self, key: str) -> None:
        """Forget `key`; one that is not there is no error."""

    def manifest_keys(self) -> Iterator[str]:
        """Iterate over the keys there are, in no order. Others may add and remove meanwhile."""

    def read_blob(self, digest: str) -> bytes | None:
        """Return the bytes kept under a digest, unchecked. None: not there."""

    def write_blob(self, digest: str, data: bytes) -> None:
        """Keep `data` under its digest. Damaged bytes that lie there already are replaced."""

    def has_blob(self, digest: str) -> bool:
        """Whether bytes are kept under this digest, damaged or not."""

    def local_blob_path(self, digest: str) -> str | None:
        """Return the absolute path where the kernel can map the blob, unchecked.

        None: not there, or the tier keeps no files.
        """

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        """Return one directory in which blobs lie under names of their own, made where need be.

        Args:
            files: Name to digest. Each blob is in this tier; names are plain, without a separator.

        None: the tier keeps no files. StoreError: could not make it, a read-only tier say.
        """

    def quarantine_manifest(self, key: str, reason: str) -> str:
        """Set a bad manifest aside, so that it is not found again; return where it now lies.

        One that is not there is no error: another process may have been faster.
        """

    def quarantine_blob(self, digest: str, reason: str) -> str:
        """Set a bad blob aside, so that it is not found again; return where it now lies."""
