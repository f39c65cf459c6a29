"""The seam of the cache: what a tier must be able to do.

A tier only keeps bytes. What they mean, whether they are undamaged and what happens when a tier
fails is decided above it: `manifest.py` frames and checks, `layered.py` skips what fails,
`loader.py` and `storage.py` are what the rest of Precast talks to. To write a tier of your own,
follow this page and inherit `precast.testing.CacheContract` in its tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from precast.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Entry(Value):
    """One thing that a tier keeps, for whoever decides what may go.

    `name` is the key of a manifest or the digest of a blob, `num_bytes` what it takes of the tier.
    `used_s` is when a manifest was last written or touched, and when a blob was last written (an
    idle write of bytes that were there already counts), by the tier's clock `now_s`.
    """

    is_manifest: bool
    name: str
    num_bytes: int
    used_s: float


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

    # -- What deciding about old entries needs (`collect.py`); none of it is on the hot path.

    def touch_manifest(self, key: str) -> None:
        """Note that `key` was used, so that it counts as younger; costs microseconds.

        Called at each hit, so a tier may note it once an hour at most, and need not where its
        reads count by themselves. Never an error: what cannot be noted is not.
        """

    def delete_blob(self, digest: str) -> None:
        """Forget a blob; one that is not there is no error. What is mapped from it stays mapped."""

    def entries(self) -> Iterator[Entry]:
        """Iterate over all manifests and blobs, in no order. Others may add and remove meanwhile.

        One that is there from before the first step to after the last is in it.
        """

    def now_s(self) -> float:
        """Return the time by the clock that `Entry.used_s` goes by.

        Which is the tier's own, a server's say: machines that share a tier may disagree.
        """

    def sweep(self, grace_s: float) -> None:
        """Remove what is no entry and nobody can need: leavings of processes that were killed.

        Args:
            grace_s: What is younger may still be in use and stays.
        """

    # -- One compile for all who share this tier.

    @property
    def leases(self) -> LeaseInterface | None:
        """Where those who share this tier agree on who does a piece of work; None: not here.

        StoreError: there could be some, and they may not be used now.
        """


class LeaseInterface(Protocol):
    """Leases in one place. Names are cache keys; an owner is any text that nobody else uses.

    Safe to call from several threads and processes at once. Nothing but `StoreError` comes out of
    it (and `ValueError` for a name that is no key).
    """

    def try_acquire(self, name: str, owner: str, ttl_s: float) -> bool:
        """Take a lease that nobody holds, for `ttl_s` seconds; return whether it is ours now.

        True, too, where this owner has it already; it is renewed then. Does not wait.
        """
        ...

    def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        """Hold a lease for `ttl_s` seconds from now. False: it is not, or no longer, ours."""
        ...

    def release(self, name: str, owner: str) -> None:
        """Give a lease up; one that is not ours is left alone, and that is no error."""
