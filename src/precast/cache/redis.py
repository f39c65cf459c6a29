# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""The tier in a Redis server, shared by a fleet. `docs/format.md` lists its keys.

Needs the package `redis` (`pip install precast[redis]`), which is imported when the tier is first
asked. Deadlines and skipping a server that is gone are not here, see `guarded.py`.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from precast.cache.disk import BUCKET, QUARANTINE_AGE_S
from precast.cache.guarded import note_progress
from precast.cache.manifest import MAX_MANIFEST_BYTES
from precast.cache.names import check_digest, check_key, is_key
from precast.errors import ConfigError, StoreError
from precast.plugins import check_installed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

#: The longest string that a server keeps is 512 MiB; a larger blob is a hash of parts.
MOST_STRING_BYTES = 256 << 20
PART_BYTES = 8 << 20

#: How much of a blob is fetched at a time. Each part that comes shows that the server lives.
READ_BYTES = 1 << 20

#: A write that stalls this long has failed; reads have a deadline of their own.
SOCKET_TIMEOUT_S = 10.0

#: What is being written as parts is forgotten after this, should the writer have been killed.
_TEMPORARY_AGE_S = 3600
_CLIENT_OPTIONS = (
    *("client_name", "db", "password", "protocol", "ssl_ca_certs", "ssl_cert_reqs"),
    *("ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "username"),
)


class RedisCache:
    """Keeps manifests and blobs as strings, each written by one command.

    `redis://[user:password@]host[:port][/db]`, `rediss://…` (TLS), `unix:///path/to/socket?db=0`.
    What is found damaged is renamed and expires after 30 days. Blobs do not expire: give the server
    a `maxmemory` and an `allkeys-lru` policy.

    Source: follows `CacheInterface`, where the methods are described.
    """

    is_writable = True
    is_in_memory = False
    is_shared = True
    keeps_files = False

    def __init__(
        self,
        url: str,
        *,
        name: str = "redis",
        prefix: str = "precast",
        most_string_bytes: int = MOST_STRING_BYTES,
        **options: str,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: Where the server is.
            name: What reports call the tier.
            prefix: What all keys begin with, so that fleets can share a server.
            most_string_bytes: A larger blob is kept as a hash of parts.
            **options: Further parameters of the client, as in the query of its URL.

        Raises:
            ConfigError: An option is unknown, or the package `redis` is missing.
        """
        for option in options:
            if option not in _CLIENT_OPTIONS:
                raise ConfigError(
                    "cache_url",
                    option,
                    "an option of a Redis tier: prefix, " + ", ".join(_CLIENT_OPTIONS),
                    "Leave it out, or spell it as in redis-py",
                )
        check_installed("redis", "precast[redis]", setting="cache_url", wanted_by="redis://")
        self.name = name
        self._url = url
        self._options = options
        self._bucket = f"{prefix}/{BUCKET}" if prefix else BUCKET
        self._most_string_bytes = most_string_bytes
        self._client: Any = None
        self._client_pid = 0

    def knock(self, timeout_s: float) -> None:
        """Find out whether a server answers at all. Imports nothing.

        Raises:
            OSError: Nobody does within the time.
        """
        parts = urlsplit(self._url)
        if parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout_s)
                connection.connect(unquote(parts.path))
                _exchange_ping(connection)
            return
        address = (parts.hostname or "localhost", parts.port or 6379)
        with socket.create_connection(address, timeout_s) as connection:
            if parts.scheme == "redis":  # With TLS, that somebody listens must do.
                _exchange_ping(connection)

    def prepare(self) -> None:
        """Import and make the client; it connects when it is first used."""
        if self._client is not None and self._client_pid == os.getpid():
            return
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options: dict[str, Any] = {
            "protocol": 2,  # Has all that is needed, and greets in fewer steps.
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": SOCKET_TIMEOUT_S,
            # Once, for a connection that was left from before the server's restart.
            "retry": Retry(NoBackoff(), 1),
            **{name: _as_value(name, text) for name, text in self._options.items()},
        }
        self._client = redis.Redis.from_url(self._url, **options)
        self._client_pid = os.getpid()

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        with self._using("read manifest") as client:
            # One byte more than allowed: enough for the reader to see that it is too large.
            try:
                return self._read_range(client, self._manifest_name(key), 0, MAX_MANIFEST_BYTES)
            except _NotAStringError:
                return b""  # Damage that can be set aside.

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._using("write manifest") as client:
            client.set(self._manifest_name(key), data)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        with self._using("delete manifest") as client:
            client.delete(self._manifest_name(key))

    def manifest_keys(self) -> Iterator[str]:
        start = self._manifest_name("")
        with self._using("list manifests") as client:
            seen = set()  # A scan may give a name twice.
            for name in client.scan_iter(match=_escaped(start) + "*.json", count=1000):
                note_progress()
                key = name.decode("utf-8", "replace").removeprefix(start).removesuffix(".json")
                if is_key(key) and key not in seen:
                    seen.add(key)
                    yield key

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        name = self._blob_name(digest)
        with self._using("read blob") as client:
            try:
                return self._read_string(client, name)
            except _NotAStringError:
                return self._read_hash(client, name)

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        name = self._blob_name(digest)
        with self._using("write blob") as client:
            if len(data) <= self._most_string_bytes:
                client.set(name, data)
                return
            # Whole at once for a reader: its name is given to it when all parts are there.
            temporary = f"{self._bucket}/tmp/{os.urandom(8).hex()}"
            for i, at in enumerate(range(0, len(data), PART_BYTES)):
                client.hset(temporary, str(i), data[at : at + PART_BYTES])
                client.expire(temporary, _TEMPORARY_AGE_S)
            client.rename(temporary, name)
            client.persist(name)

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        with self._using("look for a blob") as client:
            return bool(client.exists(self._blob_name(digest)))

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        return None

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        return None

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        return self._set_aside("quarantine manifest", self._manifest_name(key), reason)

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        return self._set_aside("quarantine blob", self._blob_name(digest), reason)

    def _manifest_name(self, key: str) -> str:
        return f"{self._bucket}/ac/{key}.json" if key else f"{self._bucket}/ac/"

    def _blob_name(self, digest: str) -> str:
        return f"{self._bucket}/cas/sha256/{digest[:2]}/{digest}"

    @contextmanager
    def _using(self, operation: str) -> Iterator[Any]:
        """Give the client; what it raises comes out as a `StoreError`."""
        try:
            self.prepare()
            yield self._client
        except Exception as error:
            # The client's errors have no base of their own with those of sockets.
            raise StoreError(self.name, operation, f"{type(error).__name__}: {error}") from error

    def _read_string(self, client: Any, name: str) -> bytes | None:
        """Return a string part by part, None where there is none."""
        parts: list[bytes] = []
        while True:
            at = len(parts) * READ_BYTES
            part = self._read_range(client, name, at, at + READ_BYTES - 1)
            if part is None:
                return None
            note_progress()
            parts.append(part)
            if len(part) < READ_BYTES:
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_range(self, client: Any, name: str, first: int, last: int) -> bytes | None:
        """Return some of a string's bytes; None: no such name.

        Raises:
            _NotAStringError: Something else lies there.
        """
        import redis

        try:
            data: bytes = client.getrange(name, first, last)
        except redis.ResponseError as error:
            if _is_wrong_type(error):
                raise _NotAStringError from error
            raise
        return data if data or client.exists(name) else None

    def _read_hash(self, client: Any, name: str) -> bytes:
        """Return a blob that was kept in parts; no bytes for whatever else lies there."""
        import redis

        parts: list[bytes] = []
        try:
            while (part := client.hget(name, str(len(parts)))) is not None:
                note_progress()
                parts.append(part)
        except redis.ResponseError as error:
            if not _is_wrong_type(error):
                raise
            return b""  # A list, say: damage that can be set aside.
        return b"".join(parts)

    def _set_aside(self, operation: str, name: str, reason: str) -> str:
        import redis

        place = f"{self._bucket}/quarantine/{name.rpartition('/')[2]}.{os.urandom(4).hex()}"
        with self._using(operation) as client:
            try:
                client.rename(name, place)
            except redis.ResponseError as error:
                if "no such key" not in str(error):
                    raise
                return f"{self.name}:{name}"  # Another process was faster.
            client.expire(place, int(QUARANTINE_AGE_S))
            client.set(f"{place}.reason", reason, ex=int(QUARANTINE_AGE_S))
        return f"{self.name}:{place}"


class _NotAStringError(Exception):
    """Something else than a string lies under a name."""


def _exchange_ping(connection: socket.socket) -> None:
    connection.sendall(b"PING\r\n")
    if not connection.recv(1):  # Even a refusal is an answer.
        raise ConnectionError("the server closed the connection")


def _as_value(name: str, text: str) -> object:
    if name in ("db", "protocol"):
        return int(text)
    return text.lower() in ("1", "true", "yes") if name == "ssl_check_hostname" else text


def _is_wrong_type(error: Exception) -> bool:
    return str(error).startswith("WRONGTYPE")


def _escaped(text: str) -> str:
    """Quote what a pattern of the server's would read as a wildcard."""
    return "".join("\\" + sign if sign in "*?[]\\" else sign for sign in text)
