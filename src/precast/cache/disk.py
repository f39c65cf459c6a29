# ruff: noqa: D102, PTH100, PTH102, PTH105, PTH106, PTH108, PTH112, PTH116, PTH118, PTH119, PTH120, PTH208
# PTH: `pathlib` costs a warm start a millisecond to import and more to use.
# D102: `CacheInterface` describes the methods.
"""The tier on this machine's disk, shared by all processes of one user.

`docs/format.md` draws the folders. Everything is written beside its place and renamed, so there
are no locks and a reader never sees part of a value. Nothing is created before the first write.
Whether the bytes are undamaged is checked by the readers of the tier, not here; that nobody else
can have put them there is.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import contextmanager, suppress
from hashlib import sha256

from precast.cache.lock import time_at
from precast.cache.manifest import MAX_MANIFEST_BYTES
from precast.cache.names import check_digest, check_file_name, check_key, is_digest, is_key
from precast.errors import StoreError, UnsafeStoreError

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from precast.cache.interface import Entry, LeaseInterface
    from precast.cache.lease import FileLeases

#: The versioned bucket: another version of the layout or of the manifests takes another name, and
#: both share the root without reading each other's files.
BUCKET = "v1"

#: No write takes an hour; a temporary file as old as that belongs to a process that was killed.
TEMPORARY_FILE_AGE_S = 3600.0

#: Bad files are kept this long for whoever wants to know what happened to them.
QUARANTINE_AGE_S = 30 * 24 * 3600.0

#: A hit is noted (in the manifest's time of change) when the last note is as old as that.
TOUCH_INTERVAL_S = 3600.0

_SWEEP_INTERVAL_S = 3600.0
_ABSENT = (FileNotFoundError, NotADirectoryError)  # The second: a file where the root should be.
_NO_HARD_LINKS = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
)
_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NOT_A_FILE = frozenset({errno.EISDIR, errno.ELOOP})
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


class DiskCache:
    """Keeps manifests and blobs in files under one directory, which only the user may enter.

    Works on a directory that cannot be written: reading goes on, writing is a `StoreError`. One
    that belongs to another user (root excepted), or that others may write to, is neither read nor
    written, since whoever can write to it can run code here: `UnsafeStoreError`.

    Where `is_shared` is set others may write to it. Then signatures decide (`trust.py`), and no
    file is opened where it lies: its bytes could change after they were checked.

    Source: follows `CacheInterface`, where the methods are described.
    """

    is_in_memory = False
    is_shared = False

    def __init__(
        self, root: str | os.PathLike[str], *, name: str = "disk", is_shared: bool = False
    ) -> None:
        self.name = name
        if is_shared:  # A folder that other users write too, on a network say.
            self.is_shared = True
        self.root = os.path.abspath(os.fspath(root))
        bucket = os.path.join(self.root, BUCKET)
        self._manifests = os.path.join(bucket, "ac")
        self._blobs = os.path.join(bucket, "cas", "sha256")
        self._trees = os.path.join(bucket, "tree")
        self._quarantine = os.path.join(bucket, "quarantine")
        self._temporary = os.path.join(bucket, "tmp")
        self._lease_folder = os.path.join(bucket, "lease")
        self._leases: FileLeases | None = None
        self._swept_at_s: float | None = None
        self._is_vetted = False
        self._is_private = False  # Others cannot even enter; then modes within do not matter.

    @property
    def keeps_files(self) -> bool:
        """Whether blobs may be opened where they lie."""
        return not self.is_shared

    @property
    def is_writable(self) -> bool:
        """Whether the root, or the place where it would be made, can be written."""
        place = os.path.join(self.root, BUCKET)
        while not os.path.lexists(place):
            parent = os.path.dirname(place)
            if parent == place:
                return False
            place = parent
        return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        with self._store_errors("read manifest"):
            path = self._manifest_path(key)
            # One byte more than allowed: enough for the reader to see that it is too large.
            return _read_file(path, MAX_MANIFEST_BYTES + 1, self._check_file)

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._store_errors("write manifest"):
            self._write_file(self._manifest_path(key), data)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        with self._store_errors("delete manifest"), suppress(*_ABSENT):
            os.unlink(self._manifest_path(key))

    def manifest_keys(self) -> Iterator[str]:
        with self._store_errors("list manifests"):
            for shard in _list_folder(self._manifests):
                for file_name in _list_folder(os.path.join(self._manifests, shard)):
                    key = file_name.removesuffix(".json")
                    if key != file_name and is_key(key):
                        yield key

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        with self._store_errors("read blob"):
            return _read_file(self._blob_path(digest))

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        path = self._blob_path(digest)
        with self._store_errors("write blob"):
            # Reading is cheaper than writing through to the disk, and what other processes have
            # mapped stays the file that new ones will map too.
            if _has_size(path, len(data)) and _read_file(path) == data:
                # A collector must not take it for an orphan before its new manifest is there.
                with suppress(OSError):
                    os.utime(path)
                return
            self._write_file(path, data)

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        with self._store_errors("look for blob"):
            return os.path.lexists(self._blob_path(digest))

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        if self.is_shared:
            return None
        path = self._blob_path(digest)
        with self._store_errors("look for blob"):
            try:
                found = os.lstat(path)
            except _ABSENT:
                return None
            # Checked now and opened a moment later: nobody else may change it in between.
            return None if stat.S_ISLNK(found.st_mode) or self._is_exposed(found) else path

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        for name, digest in files.items():
            check_file_name(name)
            check_digest(digest)
        if self.is_shared:
            return None
        listing = "".join(f"{files[name]} {name}\n" for name in sorted(files))
        directory = os.path.join(self._trees, sha256(listing.encode()).hexdigest())
        with self._store_errors("link tree"):
            for name, digest in files.items():
                self._link(self._blob_path(digest), os.path.join(directory, name))
        return directory

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        with self._store_errors("quarantine manifest"):
            return self._set_aside(self._manifest_path(key), reason)

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        with self._store_errors("quarantine blob"):
            return self._set_aside(self._blob_path(digest), reason)

    def touch_manifest(self, key: str) -> None:
        check_key(key)
        path = self._manifest_path(key)
        # Another user's, a read-only or a vanished file: then it is not noted.
        with suppress(OSError):
            # By this machine's clock, which only decides how often the disk's own is asked for.
            if abs(time.time() - os.stat(path).st_mtime) > TOUCH_INTERVAL_S:
                os.utime(path)

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        with self._store_errors("delete blob"), suppress(*_ABSENT):
            os.unlink(self._blob_path(digest))

    def entries(self) -> Iterator[Entry]:
        from precast.cache.interface import Entry

        with self._store_errors("list entries"):
            for shards, suffix, is_name in (
                (self._manifests, ".json", is_key),
                (self._blobs, "", is_digest),
            ):
                for folder in (os.path.join(shards, shard) for shard in _list_folder(shards)):
                    for file_name in _list_folder(folder):
                        name = file_name.removesuffix(suffix)
                        if not file_name.endswith(suffix) or not is_name(name):
                            continue
                        with suppress(*_ABSENT):
                            found = os.stat(os.path.join(folder, file_name))
                            yield Entry(bool(suffix), name, found.st_size, found.st_mtime)

    def now_s(self) -> float:
        with self._store_errors("ask for the time"):
            self._make_folder(self._temporary)
            return time_at(self._new_temporary_path())

    def sweep(self, grace_s: float) -> None:
        now_s = self.now_s()
        self._swept_at_s = None
        self._sweep(now_s)
        with self._store_errors("sweep trees"):
            for name in _list_folder(self._trees):
                self._sweep_tree(os.path.join(self._trees, name), now_s - grace_s)
        self._file_leases().sweep()

    @property
    def leases(self) -> LeaseInterface | None:
        with self._store_errors("offer leases"):
            return self._file_leases()

    def _file_leases(self) -> FileLeases:
        """Return the file locks in the bucket; made when asked for, since few starts compile."""
        if self._leases is None:
            from precast.cache.lease import FileLeases

            self._leases = FileLeases(self._lease_folder, self._make_folder, self.name)
        return self._leases

    def _manifest_path(self, key: str) -> str:
        return os.path.join(self._manifests, key[:2], f"{key}.json")

    def _blob_path(self, digest: str) -> str:
        return os.path.join(self._blobs, digest[:2], digest)

    def _vet(self, operation: str) -> None:
        """Check, once, that nobody else can have put code here; three calls of the system.

        Raises:
            UnsafeStoreError: Says whose the directory is, or who may write to it, and what to do.
        """
        try:
            root = _check_folder(self.root, may_be_sticky=True)
            bucket = _check_folder(os.path.join(self.root, BUCKET))
        except _UnsafeError as found:
            raise UnsafeStoreError(self.name, operation, found.problem, found.remedy) from None
        except _ABSENT:
            return  # It is made by us, or by somebody else and then looked at.
        self._is_private = not (root & _OTHERS_ENTER and bucket & _OTHERS_ENTER)
        self._is_vetted = True

    def _is_exposed(self, found: os.stat_result) -> bool:
        """Whether somebody else wrote a file, or may write to it."""
        return not (self._is_private or self.is_shared) and (
            not _is_own(found) or bool(found.st_mode & _OTHERS_WRITE)
        )

    def _check_file(self, path: str, found: os.stat_result) -> None:
        """Refuse a manifest that somebody else wrote or may write to.

        Raises:
            UnsafeStoreError: It is such a one.
        """
        if self._is_exposed(found):
            problem = f"{path} belongs to user {found.st_uid}, mode {found.st_mode & 0o777:o}"
            remedy = f"Close the folder to others: chmod 700 {self.root}"
            raise UnsafeStoreError(self.name, "read manifest", problem, remedy)

    @contextmanager
    def _store_errors(self, operation: str) -> Iterator[None]:
        try:
            if not self._is_vetted and not self.is_shared:
                self._vet(operation)
            yield
        except OSError as error:
            problem = f"{error.strerror or error}: {error.filename or self.root}"
            raise StoreError(self.name, operation, problem) from error

    def _write_file(self, path: str, data: bytes) -> None:
        """Put a whole file in its place, or leave what is there and nothing else."""
        # Written beside its place: a rename is only atomic within one file system.
        temporary = self._new_temporary_path()
        try:
            file = self._create(temporary)
            try:
                now_s = os.fstat(file).st_mtime
                _write_all(file, data)
                # A rename can reach the disk before the bytes do: power lost in between would
                # leave an empty file under a good name.
                os.fsync(file)
            finally:
                os.close(file)
            self._replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._sweep(now_s)

    def _create(self, path: str) -> int:
        """Open a new file in the folder for temporary ones, made where need be."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            self._make_folder(os.path.dirname(path))
            return os.open(path, flags, 0o600)

    def _replace(self, temporary: str, path: str) -> None:
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            self._make_folder(os.path.dirname(path))
            os.replace(temporary, path)
        except IsADirectoryError:
            self._set_aside(path, "a folder where a file belongs")
            os.replace(temporary, path)

    def _make_folder(self, path: str) -> None:
        """Make a folder and those above it that are missing; ours only the user may enter."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except FileNotFoundError:
            self._make_folder(os.path.dirname(path))
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)

    def _new_temporary_path(self) -> str:
        return os.path.join(self._temporary, f"{os.getpid()}-{os.urandom(8).hex()}")

    def _link(self, blob: str, path: str) -> None:
        """Make `path` another name of a blob, or a copy where the file system has no hard links."""
        if _is_same_content(blob, path):
            return
        # Linked beside its place and renamed, since what is there may be a damaged file.
        temporary = self._new_temporary_path()
        self._make_folder(self._temporary)
        try:
            os.link(blob, temporary)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            data = _read_file(blob)
            if data is None:
                raise FileNotFoundError(errno.ENOENT, "no such blob", blob) from error
            self._write_file(path, data)
            return
        try:
            self._replace(temporary, path)
        finally:
            # Renaming onto another name of the same file does nothing and leaves both: another
            # process that linked this tree meanwhile.
            with suppress(OSError):
                os.unlink(temporary)

    def _set_aside(self, path: str, reason: str) -> str:
        """Move a bad file into the quarantine, a note of the reason beside it."""
        place = os.path.join(self._quarantine, f"{os.path.basename(path)}.{os.urandom(4).hex()}")
        if not os.path.lexists(path):
            return path  # Another process was faster.
        try:
            self._replace(path, place)
        except _ABSENT:
            return path
        with suppress(OSError):
            os.utime(place)  # Its age in quarantine counts from now.
            self._write_file(f"{place}.reason", f"{reason}\n".encode())
        return place

    def _sweep_tree(self, tree: str, before_s: float) -> None:
        """Remove a tree that holds files whose blobs are gone; else it would keep their bytes.

        Where there are no hard links that is every old tree. It is made again when it is wanted.
        """
        with suppress(*_ABSENT):
            if os.stat(tree).st_mtime >= before_s:
                return
            paths = [os.path.join(tree, name) for name in _list_folder(tree)]
            if paths and all(os.stat(path).st_nlink > 1 for path in paths):
                return
            for path in paths:
                os.unlink(path)
            os.rmdir(tree)

    def _sweep(self, now_s: float) -> None:
        """Remove what killed writers left, at most once an interval; failing at that is no matter.

        Args:
            now_s: The time by the clock that stamps these files, which on a network file system
                is not this machine's.
        """
        if self._swept_at_s is not None and now_s - self._swept_at_s < _SWEEP_INTERVAL_S:
            return
        self._swept_at_s = now_s
        for folder, age_s in (
            (self._temporary, TEMPORARY_FILE_AGE_S),
            (self._quarantine, QUARANTINE_AGE_S),
        ):
            with suppress(OSError):
                for name in _list_folder(folder):
                    path = os.path.join(folder, name)
                    with suppress(OSError):
                        if os.lstat(path).st_mtime < now_s - age_s:
                            os.unlink(path)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # One call writes 2 GiB at most.
        view = view[os.write(file, view) :]


class _UnsafeError(Exception):
    """A folder is not only this user's."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy


def _is_own(found: os.stat_result) -> bool:
    """Whether a file is this user's, or root's, who could do anything anyway."""
    return not hasattr(os, "geteuid") or found.st_uid in (0, os.geteuid())


def _check_folder(path: str, *, may_be_sticky: bool = False) -> int:
    """Return the mode of a folder that only this user, or root, can have filled.

    Args:
        path: The folder, or a link to it.
        may_be_sticky: Others may add to it, but not replace what is there; what we use in it is
            checked by itself.

    Raises:
        _UnsafeError: Others can, or could.
        OSError: There is none, or it cannot be looked at.
    """
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        if not _is_own(found):
            raise _UnsafeError(
                f"{path} is a link that user {found.st_uid} made",
                "Remove it, or set `cache_dir` to a folder of your own",
            )
        found = os.stat(path)
    if not _is_own(found):
        raise _UnsafeError(
            f"{path} belongs to user {found.st_uid}, and this process runs as {os.geteuid()}",
            "Set `cache_dir` to a folder of your own, or give this one to the user: chown",
        )
    if found.st_mode & _OTHERS_WRITE and not (may_be_sticky and found.st_mode & stat.S_ISVTX):
        raise _UnsafeError(
            f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):o})",
            f"Make sure that all in it is yours, then: chmod 700 {path}",
        )
    return found.st_mode


def _read_file(
    path: str,
    limit: int | None = None,
    check: Callable[[str, os.stat_result], None] | None = None,
) -> bytes | None:
    """Return a file's bytes, `limit` of them at most, or None where there is none.

    A folder or a link where a file belongs reads as no bytes: damage that can be set aside like
    any other. `check` may refuse the file once it is open.
    """
    try:
        file = os.open(path, os.O_RDONLY | _FLAGS | _NO_FOLLOW)
    except _ABSENT:
        return None
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            return b""
        raise
    try:
        found = os.fstat(file)
        if check is not None:
            check(path, found)
        wanted = found.st_size if limit is None else min(limit, found.st_size)
        parts = []
        while wanted > 0 and (part := os.read(file, min(wanted, 1 << 30))):
            parts.append(part)
            wanted -= len(part)
    except IsADirectoryError:
        return b""
    finally:
        os.close(file)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _list_folder(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except _ABSENT:
        return []


def _has_size(path: str, num_bytes: int) -> bool:
    try:
        return os.lstat(path).st_size == num_bytes
    except _ABSENT:
        return False


def _is_same_content(blob: str, path: str) -> bool:
    """Whether a name in a tree is the blob itself or an undamaged copy of it."""
    try:
        found, wanted = os.lstat(path), os.lstat(blob)
    except _ABSENT:
        return False
    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
        return True
    return found.st_size == wanted.st_size and _read_file(path) == _read_file(blob)
