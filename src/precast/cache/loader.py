# ruff: noqa: PTH118
# PTH: `pathlib` costs a warm start a millisecond to import and more to use.
"""Reads the cache: what comes out of here has been checked and may be used.

Where nothing sound is found the answer is None and the events say why; nothing here raises for
what lies in a tier. Writing is `storage.py`.
"""

from __future__ import annotations

import os
import threading
from hashlib import sha256

from precast.cache.attempt import report_failure, try_quarantine, try_read, try_write
from precast.cache.layered import LayeredCache
from precast.cache.names import is_digest, is_file_name
from precast.cache.scratch import ScratchCache
from precast.cache.trust import NO_KEYS
from precast.errors import ArtifactCorruptError
from precast.events import CacheHit, CacheMiss, TierFailed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from precast.cache.interface import CacheInterface
    from precast.cache.trust import Trust
    from precast.cache.writer import BackgroundWriter
    from precast.events import Emit

_CHUNK_BYTES = 1 << 20


class CacheLoader:
    """Finds manifests, and the files that they name, in tiers that are asked in order.

    Files are opened where they lie. What lies in no local tier, or cannot be arranged there since
    it is read-only, is put into a private temporary directory that `close` or the end of the
    process removes: keep the loader as long as what it handed out is used.

    Safe to call from several threads at once.
    """

    def __init__(
        self,
        tiers: Sequence[CacheInterface],
        emit: Emit,
        clock: Callable[[], float],
        *,
        scratch: ScratchCache | None = None,
        trust: Trust = NO_KEYS,
        writer: BackgroundWriter | None = None,
    ) -> None:
        """Read from `tiers`, nearest first.

        Args:
            tiers: What is asked.
            emit: Is told what happens.
            clock: Seconds, for durations.
            scratch: The private directory, where there is one already; closed by `close`.
            trust: Which manifests of shared tiers may be used.
            writer: Fills those tiers that it names.
        """
        self._layered = LayeredCache(tiers, emit, clock, trust=trust, writer=writer)
        self._emit = emit
        self._clock = clock
        self._scratch = scratch
        self._scratch_lock = threading.Lock()
        # What was hashed once is not hashed again as long as it is the same file: device, inode,
        # size and time of change. Two names of one file share the entry.
        self._sound_files: dict[tuple[int, int, int, int], str] = {}

    def manifest(self, key: str) -> dict[str, Any] | None:
        """Return a manifest's payload, or None where no tier has a sound one that may be used.

        One that nobody trusted vouches for, and which `allow_unsigned` admits, has `unsigned` set.
        """
        started_s = self._clock()
        found = self._layered.find_manifest(key)
        if found is None:
            self._emit(CacheMiss(key, "no tier has a sound manifest that may be used"))
            return None
        self._emit(CacheHit(key, found.tier, self._clock() - started_s, len(found.data)))
        return found.payload

    def peek(self, key: str) -> dict[str, Any] | None:
        """Return what `manifest` does; for those who wait, so it counts as neither hit nor miss."""
        found = self._layered.find_manifest(key)
        return None if found is None else found.payload

    def blob(self, digest: str) -> bytes | None:
        """Return the bytes that have this digest, or None where no tier has them."""
        if not is_digest(digest):
            self._emit(CacheMiss(repr(digest), "not a digest"))
            return None
        data = self._layered.read_blob(digest)
        if data is None:
            self._emit(CacheMiss(digest, "no tier has a sound blob"))
        return data

    def files(self, files: Mapping[str, str], *, as_tree: bool = False) -> dict[str, str] | None:
        """Return the absolute path of each file, every one checked, or None unless all are there.

        Costs one hash of each file that this loader has not handed out before.

        Args:
            files: Name to digest, as in a manifest's `files`.
            as_tree: A single file, too, lies under its own name instead of its digest. Several
                always do, all in one directory.
        """
        for name, digest in files.items():
            if not is_file_name(name) or not is_digest(digest):
                self._emit(CacheMiss(repr(digest), f"{name!r} is not a file name with a digest"))
                return None
        fetched: dict[str, bytes | None] = {}
        for tier in self._file_tiers():
            paths = self._place_blobs(tier, files, fetched)
            if paths is not None and (as_tree or len(files) > 1):
                paths = self._place_tree(tier, files)
            if paths is not None:
                return paths
            if None in fetched.values():
                break  # Sound bytes are nowhere: another place for them would not help.
        for digest in files.values():
            if fetched.get(digest, b"") is None:
                self._emit(CacheMiss(digest, "no tier has a sound blob"))
        return None

    def save_bundle(
        self, path: str | os.PathLike[str], keys: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Write what some keys need, or everything, into one file: see `create_bundle`."""
        from precast.cache.bundle_writing import create_bundle

        layered = self._layered
        return create_bundle(path, layered.tiers, keys, trust=layered.trust, emit=self._emit)

    def close(self) -> None:
        """Remove the private directory; paths that were handed out from there are gone."""
        with self._scratch_lock:
            if self._scratch is not None:
                self._scratch.close()

    def _file_tiers(self) -> Iterator[CacheInterface]:
        """Iterate over the places where files can lie, the private one made only when reached."""
        yield from (tier for tier in self._layered.tiers if tier.keeps_files)
        with self._scratch_lock:
            if self._scratch is None:
                self._scratch = ScratchCache()
        if self._scratch not in self._layered.tiers:
            yield self._scratch

    def _place_blobs(
        self, tier: CacheInterface, files: Mapping[str, str], fetched: dict[str, bytes | None]
    ) -> dict[str, str] | None:
        """Return where each blob lies in a tier, put there from another tier where need be.

        Args:
            fetched: What other tiers gave for a digest; added to, None where none is sound.
        """
        paths = {}
        for name, digest in files.items():
            path = self._sound_blob_path(tier, digest)
            if path is None:
                if digest not in fetched:
                    fetched[digest] = self._layered.read_blob(digest)
                data = fetched[digest]
                if data is None or not tier.is_writable:
                    return None
                if not try_write(self._emit, tier, tier.write_blob, digest, data):
                    return None
                path = self._sound_blob_path(tier, digest)
                if path is None:
                    return None
            paths[name] = path
        return paths

    def _place_tree(self, tier: CacheInterface, files: Mapping[str, str]) -> dict[str, str] | None:
        """Return where the files lie in one directory of a tier that has their blobs."""
        try:
            directory = tier.link_tree(files)
            if directory is None:
                return None
            paths = {name: os.path.join(directory, name) for name in files}
            for name, digest in files.items():
                if damage := self._find_damage(paths[name], digest):
                    # Not the blob's fault, and the blob makes a sound file elsewhere.
                    self._emit(TierFailed(tier.name, "link tree", damage.reason))
                    return None
        except Exception as error:  # noqa: BLE001 - tiers are plug-ins, and none may stop a model
            if tier.is_writable:  # That a read-only tier lacks the tree is nobody's failure.
                report_failure(self._emit, tier, "link tree", error)
            return None
        return paths

    def _sound_blob_path(self, tier: CacheInterface, digest: str) -> str | None:
        """Return where a blob lies in a tier; if it is damaged, it is set aside instead."""
        path = try_read(self._emit, tier, tier.local_blob_path, digest)
        if path is None:
            return None
        try:
            damage = self._find_damage(path, digest)
        except FileNotFoundError:
            return None  # Somebody set it aside a moment ago.
        except OSError as error:
            report_failure(self._emit, tier, "read blob", error)
            return None
        if damage is not None:
            try_quarantine(self._emit, tier, tier.quarantine_blob, digest, damage.reason)
            return None
        return path

    def _find_damage(self, path: str, digest: str) -> ArtifactCorruptError | None:
        """Return what is wrong with a file that should have this digest, None if it has.

        Raises:
            OSError: It cannot be read.
        """
        try:
            identity, found = self._digest_of(path)
        except IsADirectoryError:
            return ArtifactCorruptError(path, f"digest {digest}", "a folder")
        if found != digest:
            return ArtifactCorruptError(path, f"digest {digest}", found)
        self._sound_files[identity] = digest
        return None

    def _digest_of(self, path: str) -> tuple[tuple[int, int, int, int], str]:
        """Return a file's identity and its digest, hashed now unless it was found sound before."""
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            # Asked of the open file: the path could name another one a moment later.
            stat = os.fstat(file)
            identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            known = self._sound_files.get(identity)
            if known is not None:
                return identity, known
            hasher = sha256()
            while chunk := os.read(file, _CHUNK_BYTES):
                hasher.update(chunk)
            return identity, hasher.hexdigest()
        finally:
            os.close(file)
