"""What tests of a plug-in need, ours and yours: contracts of a tier and its leases, and faults.

```python
class TestMyCache(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return MyCache(tmp_path)
```

Needs pytest. Nothing outside tests imports this module.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from precast.cache.manifest import complete_payload, encode_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from precast.cache.interface import CacheInterface, LeaseInterface

#: Functions of `os` that `every_fault` can make fail.
FILE_OPERATIONS = (
    "close",
    "fstat",
    "fsync",
    "link",
    "listdir",
    "lstat",
    "mkdir",
    "open",
    "read",
    "replace",
    "rmdir",
    "stat",
    "unlink",
    "utime",
    "write",
)

KEY = sha256(b"key").hexdigest()
OTHER_KEY = sha256(b"other key").hexdigest()
BLOB = bytes(range(256)) * 300
DIGEST = sha256(BLOB).hexdigest()


def make_manifest(key: str, note: object, files: dict[str, bytes] | None = None) -> bytes:
    """Return a sound manifest, as `CacheStorage` writes it, that differs by its note."""
    return encode_manifest(complete_payload(key, {"note": note}, files or {}))


class CacheContract(ABC):
    """What each tier promises; inherit it and say how one is made."""

    @abstractmethod
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        """Return an empty tier that can be written and holds at least 1 MiB."""

    @pytest.fixture
    def cache(self, tmp_path: Path) -> CacheInterface:
        """Return the tier under test."""
        return self.make_cache(tmp_path)

    def test_it_has_a_name_and_takes_writes(self, cache: CacheInterface) -> None:
        """A tier says what it is, in plain values."""
        assert isinstance(cache.name, str)
        assert cache.name
        assert cache.is_writable is True
        assert isinstance(cache.is_in_memory, bool)
        assert isinstance(cache.is_shared, bool)
        assert isinstance(cache.keeps_files, bool)

    def test_what_is_not_there_is_none(self, cache: CacheInterface) -> None:
        """Nothing is found in an empty tier, and looking is no error."""
        assert cache.read_manifest(KEY) is None
        assert cache.read_blob(DIGEST) is None
        assert cache.has_blob(DIGEST) is False
        assert cache.local_blob_path(DIGEST) is None
        assert list(cache.manifest_keys()) == []

    def test_a_manifest_is_read_as_it_was_written(self, cache: CacheInterface) -> None:
        """Under its own key, and only there."""
        cache.write_manifest(KEY, make_manifest(KEY, 1))
        assert cache.read_manifest(KEY) == make_manifest(KEY, 1)
        assert cache.read_manifest(OTHER_KEY) is None
        assert list(cache.manifest_keys()) == [KEY]

    def test_a_manifest_is_replaced_as_a_whole(self, cache: CacheInterface) -> None:
        """A shorter one leaves nothing of a longer one."""
        cache.write_manifest(KEY, make_manifest(KEY, "long" * 1000))
        cache.write_manifest(KEY, make_manifest(KEY, "short"))
        assert cache.read_manifest(KEY) == make_manifest(KEY, "short")
        assert list(cache.manifest_keys()) == [KEY]

    def test_a_deleted_manifest_is_gone(self, cache: CacheInterface) -> None:
        """Deleting forgets one key, and one that is not there is no error."""
        cache.write_manifest(KEY, make_manifest(KEY, 1))
        cache.write_manifest(OTHER_KEY, make_manifest(OTHER_KEY, 2))
        cache.delete_manifest(KEY)
        cache.delete_manifest(KEY)
        assert cache.read_manifest(KEY) is None
        assert list(cache.manifest_keys()) == [OTHER_KEY]

    @pytest.mark.parametrize("blob", [b"", b"\0", BLOB], ids=["empty", "one byte", "77 kB"])
    def test_a_blob_is_read_as_it_was_written(self, cache: CacheInterface, blob: bytes) -> None:
        """Any bytes, none at all too; writing it again changes nothing."""
        digest = sha256(blob).hexdigest()
        cache.write_blob(digest, blob)
        cache.write_blob(digest, blob)
        assert cache.read_blob(digest) == blob
        assert cache.has_blob(digest) is True
        assert list(cache.manifest_keys()) == []  # Blobs and manifests do not mix.

    def test_a_local_path_leads_to_the_blob(self, cache: CacheInterface) -> None:
        """Exactly those tiers that keep files have a path for a blob they hold."""
        cache.write_blob(DIGEST, BLOB)
        path = cache.local_blob_path(DIGEST)
        assert (path is not None) == cache.keeps_files
        if path is not None:
            assert Path(path).is_absolute()
            assert Path(path).read_bytes() == BLOB

    def test_a_tree_holds_blobs_under_their_own_names(self, cache: CacheInterface) -> None:
        """The same names and blobs have the same directory; other ones another."""
        cache.write_blob(DIGEST, BLOB)
        files = {"a.so": DIGEST, "b.cubin": DIGEST}
        directory = cache.link_tree(files)
        assert (directory is not None) == cache.keeps_files
        if directory is not None:
            found = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
            assert found == {"a.so": BLOB, "b.cubin": BLOB}
            assert cache.link_tree(dict(reversed(files.items()))) == directory
            assert cache.link_tree({"a.so": DIGEST}) != directory

    def test_what_is_quarantined_is_not_found_again(self, cache: CacheInterface) -> None:
        """But it can be written anew; what is not there cannot be set aside, and that is fine."""
        cache.write_manifest(KEY, make_manifest(KEY, 1))
        cache.write_blob(DIGEST, BLOB)
        for _ in range(2):
            assert isinstance(cache.quarantine_manifest(KEY, "a reason"), str)
            assert isinstance(cache.quarantine_blob(DIGEST, "a reason"), str)
        assert cache.read_manifest(KEY) is None
        assert list(cache.manifest_keys()) == []
        assert cache.read_blob(DIGEST) is None
        assert cache.has_blob(DIGEST) is False
        assert cache.local_blob_path(DIGEST) is None
        cache.write_manifest(KEY, make_manifest(KEY, 2))
        cache.write_blob(DIGEST, BLOB)
        assert cache.read_manifest(KEY) == make_manifest(KEY, 2)
        assert cache.read_blob(DIGEST) == BLOB

    @pytest.mark.parametrize("name", ["", "abc", "../../etc/passwd", "a" * 129, "AAAA", "ab\n\0"])
    def test_names_that_could_lead_elsewhere_are_refused(
        self, cache: CacheInterface, name: str
    ) -> None:
        """A key or digest is checked before anything is read or written."""
        for use in (
            lambda: cache.read_manifest(name),
            lambda: cache.write_manifest(name, b""),
            lambda: cache.delete_manifest(name),
            lambda: cache.quarantine_manifest(name, ""),
            lambda: cache.read_blob(name),
            lambda: cache.write_blob(name, b""),
            lambda: cache.has_blob(name),
            lambda: cache.local_blob_path(name),
            lambda: cache.quarantine_blob(name, ""),
            lambda: cache.touch_manifest(name),
            lambda: cache.delete_blob(name),
        ):
            with pytest.raises(ValueError, match="not a"):
                use()

    def test_entries_are_all_that_is_kept(self, cache: CacheInterface) -> None:
        """Each manifest and blob once, with its size and a time by the tier's clock."""
        assert list(cache.entries()) == []
        before_s = cache.now_s()
        manifest = make_manifest(KEY, 1)
        cache.write_manifest(KEY, manifest)
        cache.write_manifest(OTHER_KEY, make_manifest(OTHER_KEY, "other"))
        cache.write_blob(DIGEST, BLOB)
        cache.delete_manifest(OTHER_KEY)
        found = {(entry.is_manifest, entry.name): entry for entry in cache.entries()}
        assert set(found) == {(True, KEY), (False, DIGEST)}
        assert len(list(cache.entries())) == 2
        # A tier may keep a blob smaller than it is, but a server's clock may count whole seconds.
        assert found[True, KEY].num_bytes >= len(manifest)
        assert found[False, DIGEST].num_bytes > 0
        for entry in found.values():
            assert before_s - 2 <= entry.used_s <= cache.now_s() + 2

    def test_a_deleted_blob_is_gone(self, cache: CacheInterface) -> None:
        """It can be written again; one that is not there is no error; manifests stay."""
        cache.write_manifest(KEY, make_manifest(KEY, 1))
        cache.write_blob(DIGEST, BLOB)
        path = cache.local_blob_path(DIGEST)
        opened = open(path, "rb") if path is not None else None  # noqa: PTH123, SIM115
        cache.delete_blob(DIGEST)
        cache.delete_blob(DIGEST)
        assert cache.read_blob(DIGEST) is None
        assert cache.has_blob(DIGEST) is False
        assert cache.local_blob_path(DIGEST) is None
        assert cache.read_manifest(KEY) == make_manifest(KEY, 1)
        if opened is not None:  # A reader that had it keeps it.
            with opened:
                assert opened.read() == BLOB
        cache.write_blob(DIGEST, BLOB)
        assert cache.read_blob(DIGEST) == BLOB

    def test_touching_keeps_what_is_there(self, cache: CacheInterface) -> None:
        """Noting a use changes no byte and makes nothing; what is not there is no error."""
        cache.touch_manifest(KEY)
        assert list(cache.entries()) == []
        cache.write_manifest(KEY, make_manifest(KEY, 1))
        [before] = cache.entries()
        cache.touch_manifest(KEY)
        [after] = cache.entries()
        assert after.used_s >= before.used_s
        assert cache.read_manifest(KEY) == make_manifest(KEY, 1)

    def test_sweeping_takes_no_entry(self, cache: CacheInterface) -> None:
        """Only what is no entry, and nobody uses, may go."""
        cache.write_manifest(KEY, make_manifest(KEY, 1))
        cache.write_blob(DIGEST, BLOB)
        directory = cache.link_tree({"a": DIGEST})
        cache.sweep(3600.0)
        assert cache.read_manifest(KEY) == make_manifest(KEY, 1)
        assert cache.read_blob(DIGEST) == BLOB
        assert directory is None or (Path(directory) / "a").read_bytes() == BLOB

    def test_leases_if_any_are_no_entries(self, cache: CacheInterface) -> None:
        """A tier that offers leases offers the same ones each time, and lists none of them."""
        if cache.leases is None:
            return
        assert cache.leases.try_acquire(KEY, "a", 60.0)
        assert cache.leases is not None
        assert not cache.leases.try_acquire(KEY, "b", 60.0)
        assert list(cache.entries()) == []
        assert list(cache.manifest_keys()) == []
        cache.leases.release(KEY, "a")

    def test_threads_see_whole_values(self, cache: CacheInterface) -> None:
        """Readers beside writers of one key see one of the values, never a mixture."""
        values = [make_manifest(KEY, str(i) * (1 + 997 * i)) for i in range(8)]
        cache.write_manifest(KEY, values[0])

        def write(i: int) -> None:
            for _ in range(10):
                cache.write_manifest(KEY, values[i])
                cache.write_blob(DIGEST, BLOB)

        def read(_: int) -> None:
            for _ in range(50):
                assert cache.read_manifest(KEY) in values
                assert cache.read_blob(DIGEST) in (None, BLOB)

        with ThreadPoolExecutor(8) as pool:
            writers = [pool.submit(write, i) for i in range(4)]
            readers = [pool.submit(read, i) for i in range(4)]
            for future in writers + readers:
                future.result()


class LeaseContract(ABC):
    """What each kind of lease promises; inherit it and say how one is made."""

    @abstractmethod
    def make_leases(self, tmp_path: Path) -> LeaseInterface:
        """Return leases in one place, the same for each call of one test: as two processes."""

    @pytest.fixture
    def both(self, tmp_path: Path) -> tuple[LeaseInterface, LeaseInterface]:
        """Return two views of one place."""
        return self.make_leases(tmp_path), self.make_leases(tmp_path)

    def test_one_holds_it(self, both: tuple[LeaseInterface, LeaseInterface]) -> None:
        """Until it is released; asking again is renewing."""
        mine, other = both
        assert mine.try_acquire(KEY, "me", 60.0)
        assert mine.try_acquire(KEY, "me", 60.0)
        assert not other.try_acquire(KEY, "you", 60.0)
        assert not mine.try_acquire(KEY, "another of my threads", 60.0)
        assert other.try_acquire(OTHER_KEY, "you", 60.0)
        mine.release(KEY, "me")
        assert other.try_acquire(KEY, "you", 60.0)
        assert not mine.renew(KEY, "me", 60.0)
        assert other.renew(KEY, "you", 60.0)
        other.release(KEY, "you")
        other.release(OTHER_KEY, "you")

    def test_only_the_holder_renews_and_releases(
        self, both: tuple[LeaseInterface, LeaseInterface]
    ) -> None:
        """What others try is no error, and changes nothing."""
        mine, other = both
        assert not mine.renew(KEY, "me", 60.0)
        mine.release(KEY, "me")
        assert mine.try_acquire(KEY, "me", 60.0)
        assert not other.renew(KEY, "you", 60.0)
        other.release(KEY, "you")
        mine.release(KEY, "another of my threads")
        assert not other.try_acquire(KEY, "you", 60.0)
        mine.release(KEY, "me")

    def test_it_expires_unless_it_is_renewed(
        self, both: tuple[LeaseInterface, LeaseInterface]
    ) -> None:
        """The old holder finds out when it renews, and cannot release what is another's."""
        mine, other = both
        assert mine.try_acquire(KEY, "me", 0.5)
        deadline_s = time.monotonic() + 1.0
        while time.monotonic() < deadline_s:
            assert mine.renew(KEY, "me", 0.5)
            assert not other.try_acquire(KEY, "you", 60.0)
            time.sleep(0.05)
        deadline_s = time.monotonic() + 30
        while not other.try_acquire(KEY, "you", 60.0):
            assert time.monotonic() < deadline_s, "it never expired"
            time.sleep(0.05)
        assert not mine.renew(KEY, "me", 60.0)
        mine.release(KEY, "me")
        assert not mine.try_acquire(KEY, "me", 60.0)
        assert other.renew(KEY, "you", 60.0)
        other.release(KEY, "you")

    def test_of_many_at_once_one_gets_it(self, both: tuple[LeaseInterface, LeaseInterface]) -> None:
        """Again and again."""
        with ThreadPoolExecutor(8) as pool:
            for number in range(20):
                name = f"{KEY[:8]}-{number}"
                got = list(
                    pool.map(
                        lambda i, name=name: both[i % 2].try_acquire(name, f"o{i}", 60.0), range(8)
                    )
                )
                assert sum(got) == 1
                both[got.index(True) % 2].release(name, f"o{got.index(True)}")

    @pytest.mark.parametrize("name", ["", "abc", "../../etc/passwd", "AAAA"])
    def test_names_that_are_no_keys_are_refused(
        self, both: tuple[LeaseInterface, LeaseInterface], name: str
    ) -> None:
        """As in a tier."""
        for use in (both[0].renew, both[0].try_acquire):
            with pytest.raises(ValueError, match="not a"):
                use(name, "me", 1.0)
        with pytest.raises(ValueError, match="not a"):
            both[0].release(name, "me")


class Fault:
    """Within `with`, the n-th file operation of this thread fails with an `OSError`.

    A failing `write` has written half of its bytes, as on a full disk, and a failing `close` has
    closed its file.
    """

    def __init__(
        self, n: int, error_number: int, operations: tuple[str, ...], lasting: bool
    ) -> None:
        self.n = n
        self.operation: str | None = None  # What failed, once it has.
        self.was_entered = False
        self._error_number = error_number
        self._operations = operations
        self._lasting = lasting
        self._num_calls = 0
        self._real: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Fault(n={self.n}, operation={self.operation!r})"

    def __enter__(self) -> Self:
        self.was_entered = True
        thread = threading.get_ident()
        for name in self._operations:
            self._real[name] = getattr(os, name)
            setattr(os, name, self._failing(name, self._real[name], thread))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def _failing(self, name: str, function: Callable[..., Any], thread: int) -> Callable[..., Any]:
        def maybe_fail(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*args, **kwargs)
            self._num_calls += 1
            if not (self._num_calls == self.n or (self._lasting and self._num_calls > self.n)):
                return function(*args, **kwargs)
            self.operation = self.operation or name
            if name == "write":
                function(args[0], args[1][: len(args[1]) // 2])
            elif name == "close":
                function(*args, **kwargs)
            raise OSError(self._error_number, f"{os.strerror(self._error_number)} (fault {self.n})")

        maybe_fail.__name__ = name
        return maybe_fail


def every_fault(
    *,
    error_number: int = errno.EIO,
    operations: tuple[str, ...] = FILE_OPERATIONS,
    lasting: bool = False,
) -> Iterator[Fault]:
    """Iterate over faults: the first file operation fails, then the second, until none is left.

    Give each fault fresh state, or later operations are never reached. The last fault of all is
    past the end, so that nothing fails.

    ```python
    for fault in every_fault():
        cache = DiskCache(tmp_path / str(fault.n))
        with fault, suppress(StoreError):
            cache.write_blob(DIGEST, BLOB)
        assert cache.read_blob(DIGEST) in (None, BLOB)
    ```

    Args:
        error_number: Of the `OSError`.
        operations: Names of functions in `os`. Files that are opened by `open` are not seen.
        lasting: All later operations fail too, cleaning up included: the disk is gone.
    """
    n = 1
    while True:
        fault = Fault(n, error_number, operations, lasting)
        yield fault
        if not fault.was_entered:
            raise RuntimeError(f"fault {n} was never entered; write `with fault:` in the loop")
        if fault.operation is None:
            return
        n += 1
