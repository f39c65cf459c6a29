# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""The tier in an object store, or wherever else fsspec reaches; shared by a fleet.

`s3://` needs s3fs (`pip install precast[s3]`), `gs://` gcsfs, `az://` adlfs, `hf://`
huggingface_hub; others see fsspec. All is imported when the tier is first asked. Deadlines and
skipping a store that is gone are not here, see `guarded.py`.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from precast.cache.disk import BUCKET, QUARANTINE_AGE_S, TEMPORARY_FILE_AGE_S
from precast.cache.guarded import note_progress
from precast.cache.manifest import MAX_MANIFEST_BYTES
from precast.cache.names import check_digest, check_key, is_digest, is_key
from precast.errors import ConfigError, StoreError
from precast.plugins import check_installed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from precast.cache.interface import Entry

#: Where a write is seen whole or not at all, whatever its size: no need to write beside and rename.
_WHOLE_OBJECTS = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory", "oss", "tos", "r2"}
)

#: What fsspec needs for a scheme, and what pip installs it by; others say it when they are used.
_NEEDED = {
    "s3": ("s3fs", "precast[s3]"),
    "s3a": ("s3fs", "precast[s3]"),
    "gs": ("gcsfs", "gcsfs"),
    "gcs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "abfss": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
}

#: What clients call the time of an object's writing; the first that is there counts.
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")

#: How much of a blob is fetched at a time. Each part that comes shows that the store lives.
READ_BYTES = 8 << 20

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 15


class ObjectStoreCache:
    """Keeps each manifest and each blob as one object, written whole.

    Credentials, regions and endpoints come from where the store's own client looks (`AWS_*`
    variables and files, fsspec's configuration), or from the query of the URL.

    Source: follows `CacheInterface`, where the methods are described.
    """

    is_writable = True
    is_in_memory = False
    is_shared = True
    leases = None  # Few stores can say "only if nobody else has".
    keeps_files = False  # Also with `file://`: for files that can be mapped there is `disk:/path`.

    def __init__(self, url: str, *, name: str | None = None, **options: str) -> None:
        """Connect to nothing yet.

        Args:
            url: `scheme://bucket/prefix`.
            name: What reports call the tier; the scheme, unless it is given.
            **options: Parameters of fsspec's file system, such as `endpoint_url` or `anon`;
                `region` is short for what s3fs hides in `client_kwargs`.

        Raises:
            ConfigError: The URL names no place, or a package is missing.
        """
        parts = urlsplit(url)
        if not parts.netloc and not parts.path.strip("/"):
            raise ConfigError(
                "cache_url",
                url,
                f"a place, such as {parts.scheme}://bucket/prefix",
                "Write where in the store the cache lies",
            )
        if parts.scheme in _NEEDED:
            package, requirement = _NEEDED[parts.scheme]
            wanted_by = f"{parts.scheme}://"
            check_installed(package, requirement, setting="cache_url", wanted_by=wanted_by)
        self.name = parts.scheme if name is None else name
        self._url = url.rstrip("/")
        self._scheme = parts.scheme
        self._options = options
        self._client: tuple[int, Any, str] | None = None

    def knock(self, timeout_s: float) -> None:
        """Find out whether the endpoint answers at all, where one is named. Imports nothing.

        Raises:
            OSError: Nobody does within the time.
        """
        endpoint = self._endpoint()
        if endpoint is None:
            return  # The client knows where; then its first answer is what counts.
        parts = urlsplit(endpoint)
        if parts.hostname is None:
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname, port), timeout_s) as connection:
            if parts.scheme == "http":  # With TLS, that somebody listens must do.
                connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
                if not connection.recv(1):  # Even a refusal is an answer.
                    raise ConnectionError("the endpoint closed the connection")

    def prepare(self) -> None:
        """Import and make the client; it connects when it is first used."""
        self._open()

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        with self._using("read manifest") as (fs, root):
            # In one request, since it may be replaced meanwhile; one byte more than allowed is
            # enough for the reader to see that it is too large.
            return _read_range(fs, _manifest_path(root, key), 0, MAX_MANIFEST_BYTES + 1)

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._using("write manifest") as (fs, root):
            self._write(fs, root, _manifest_path(root, key), data)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        with self._using("delete manifest") as (fs, root), suppress(FileNotFoundError):
            fs.rm_file(_manifest_path(root, key))

    def manifest_keys(self) -> Iterator[str]:
        with self._using("list manifests") as (fs, root):
            for path, _ in _find(fs, f"{root}/ac"):
                name = path.rpartition("/")[2]
                key = name.removesuffix(".json")
                if key != name and is_key(key):
                    yield key

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        with self._using("read blob") as (fs, root):
            path = _blob_path(root, digest)
            part = _read_range(fs, path, 0, READ_BYTES)
            if part is None or len(part) < READ_BYTES:
                return part
            size = fs.info(path)["size"]
            parts = [part]
            for at in range(READ_BYTES, size, READ_BYTES):
                note_progress()
                parts.append(fs.cat_file(path, start=at, end=min(at + READ_BYTES, size)))
            return b"".join(parts)

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        with self._using("write blob") as (fs, root):
            self._write(fs, root, _blob_path(root, digest), data)

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        with self._using("look for a blob") as (fs, root):
            try:
                # Not `exists`, which takes every failure for an absence.
                fs.info(_blob_path(root, digest))
            except FileNotFoundError:
                return False
            return True

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        return None

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        with self._using("quarantine manifest") as (fs, root):
            return self._set_aside(fs, root, _manifest_path(root, key), reason)

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        with self._using("quarantine blob") as (fs, root):
            return self._set_aside(fs, root, _blob_path(root, digest), reason)

    def touch_manifest(self, key: str) -> None:
        check_key(key)  # An object's time is that of its writing, and writing costs its size.

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        with self._using("delete blob") as (fs, root), suppress(FileNotFoundError):
            fs.rm_file(_blob_path(root, digest))

    def entries(self) -> Iterator[Entry]:
        from precast.cache.interface import Entry

        with self._using("list entries") as (fs, root):
            for is_manifest, folder, end, is_name in (
                (True, "ac", ".json", is_key),
                (False, "cas/sha256", "", is_digest),
            ):
                for path, info in _find(fs, f"{root}/{folder}"):
                    file_name = path.rpartition("/")[2]
                    name = file_name.removesuffix(end)
                    if file_name.endswith(end) and is_name(name):
                        yield Entry(is_manifest, name, info["size"] or 0, _written_s(info))

    def now_s(self) -> float:
        """Return the time of an object that is written for that; else this machine's."""
        with self._using("ask for the time") as (fs, root):
            path = f"{root}/tmp/{os.getpid()}-{os.urandom(8).hex()}"
            if self._scheme not in _WHOLE_OBJECTS:
                fs.makedirs(f"{root}/tmp", exist_ok=True)
            fs.pipe_file(path, b"?")
            try:
                return _written_s(fs.info(path))
            finally:
                with suppress(FileNotFoundError):
                    fs.rm_file(path)

    def sweep(self, grace_s: float) -> None:
        now_s = self.now_s()
        with self._using("sweep") as (fs, root):
            for folder, age_s in (("tmp", TEMPORARY_FILE_AGE_S), ("quarantine", QUARANTINE_AGE_S)):
                for path, info in _find(fs, f"{root}/{folder}"):
                    if _written_s(info) < now_s - age_s:
                        with suppress(FileNotFoundError):
                            fs.rm_file(path)

    def _endpoint(self) -> str | None:
        if "endpoint_url" in self._options:
            return self._options["endpoint_url"]
        if self._scheme in ("s3", "s3a"):
            # The client's own variables, not settings of ours.
            return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return None

    def _open(self) -> tuple[Any, str]:
        """Return the file system and where the bucket lies in it, made once in a process."""
        if self._client is None or self._client[0] != os.getpid():
            from fsspec.core import url_to_fs

            options: dict[str, Any] = {
                name: {"true": True, "false": False}.get(text.lower(), text)
                for name, text in self._options.items()
            }
            options["use_listings_cache"] = False  # Others write there, too.
            if self._scheme in ("file", "local"):
                options["auto_mkdir"] = True
            if self._scheme in ("s3", "s3a"):
                region = options.pop("region", None)
                options["client_kwargs"] = {} if region is None else {"region_name": region}
                options["config_kwargs"] = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": READ_TIMEOUT_S,
                    "retries": {"total_max_attempts": 2},
                    # Of all that keep to the protocol of S3, some cannot read the checksums that
                    # new clients send unasked; what is read here is checked by its digest.
                    "request_checksum_calculation": "when_required",
                    "response_checksum_validation": "when_required",
                }
            fs, path = url_to_fs(self._url, **options)
            if hasattr(fs, "retries"):
                fs.retries = 3  # s3fs's own, beside those of its client.
            self._client = (os.getpid(), fs, f"{path.rstrip('/')}/{BUCKET}")
        return self._client[1:]

    @contextmanager
    def _using(self, operation: str) -> Iterator[tuple[Any, str]]:
        """Give the file system and the bucket; what they raise comes out as a `StoreError`."""
        try:
            yield self._open()
        except Exception as error:
            # Each client has errors of its own.
            raise StoreError(self.name, operation, f"{type(error).__name__}: {error}") from error

    def _write(self, fs: Any, root: str, path: str, data: bytes) -> None:
        """Put a whole value in its place."""
        if self._scheme in _WHOLE_OBJECTS:
            fs.pipe_file(path, data)
            return
        temporary = f"{root}/tmp/{os.getpid()}-{os.urandom(8).hex()}"
        for place in (temporary, path):
            fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        try:
            fs.pipe_file(temporary, data)
            self._move(fs, temporary, path)
        except BaseException:
            with suppress(Exception):
                fs.rm_file(temporary)
            raise

    def _move(self, fs: Any, source: str, target: str) -> None:
        if self._scheme in _WHOLE_OBJECTS:
            fs.cp_file(source, target)
            fs.rm_file(source)
        else:
            if fs.isdir(target):  # A folder where a file belongs.
                fs.rm(target, recursive=True)
            fs.mv(source, target)

    def _set_aside(self, fs: Any, root: str, path: str, reason: str) -> str:
        place = f"{root}/quarantine/{path.rpartition('/')[2]}.{os.urandom(4).hex()}"
        try:
            fs.info(path)
            if self._scheme not in _WHOLE_OBJECTS:
                fs.makedirs(f"{root}/quarantine", exist_ok=True)
            self._move(fs, path, place)
        except FileNotFoundError:
            return f"{self._scheme}://{path}"  # Another process was faster.
        with suppress(Exception):
            self._write(fs, root, f"{place}.reason", f"{reason}\n".encode())
        return f"{self._scheme}://{place}"


def _manifest_path(root: str, key: str) -> str:
    return f"{root}/ac/{key}.json"


def _blob_path(root: str, digest: str) -> str:
    return f"{root}/cas/sha256/{digest[:2]}/{digest}"


def _find(fs: Any, folder: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return all objects below a folder, with what the store says of them."""
    try:
        found: dict[str, Mapping[str, Any]] = fs.find(folder, detail=True)
    except FileNotFoundError:
        return []
    return list(found.items())


def _written_s(info: Mapping[str, Any]) -> float:
    """Return when an object was written, by the store's clock.

    What does not say so never grows old: now, by this machine's clock.
    """
    for name in _TIMES:
        value: Any = info.get(name)
        if isinstance(value, str):
            from datetime import datetime

            with suppress(ValueError):
                # Python 3.10 does not know the Z.
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if hasattr(value, "timestamp"):
            return float(value.timestamp())
        if isinstance(value, int | float):
            return float(value)
    return time.time()


def _read_range(fs: Any, path: str, start: int, end: int) -> bytes | None:
    """Return an object's bytes from `start` on, up to `end`, in one request; None: not there.

    A folder reads as no bytes: damage that can be set aside.
    """
    try:
        return fs.cat_file(path, start=start, end=end)  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return b""
    except Exception:
        # A range of an object without bytes is an error to some, so ask how large it is.
        try:
            is_empty = fs.info(path)["size"] == 0
        except FileNotFoundError:
            return None
        if is_empty:
            return b""
        raise
