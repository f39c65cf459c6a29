# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""The tier in a Redis server, shared by a fleet. `docs/format.md` lists its keys.

Needs the package `redis` (`pip install precast[redis]`), which is imported when the tier is first
asked. Deadlines and skipping a server that is gone are not here, see `guarded.py`.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager, suppress
from urllib.parse import unquote, urlsplit

from precast.cache.disk import BUCKET, QUARANTINE_AGE_S, TOUCH_INTERVAL_S
from precast.cache.guarded import note_progress
from precast.cache.manifest import MAX_MANIFEST_BYTES
from precast.cache.names import check_digest, check_key, is_digest, is_key
from precast.errors import ConfigError, StoreError
from precast.plugins import check_installed

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any, TypeVar

    from precast.cache.interface import Entry, LeaseInterface

    T = TypeVar("T")

#: The longest string that a server keeps is 512 MiB; a larger blob is a hash of parts.
MOST_STRING_BYTES = 256 << 20
PART_BYTES = 8 << 20

#: How much of a blob is fetched at a time. Each part that comes shows that the server lives.
READ_BYTES = 1 << 20

#: A write that stalls this long has failed; reads have a deadline of their own.
SOCKET_TIMEOUT_S = 10.0

#: What is being written as parts is forgotten after this, should the writer have been killed.
_TEMPORARY_AGE_S = 3600
_SCAN_COUNT = 1000

#: Notes when a manifest that is there was used, by the server's clock.
_NOTE_USE = """
if redis.call('exists', KEYS[2]) == 1 then
    local now = redis.call('time')
    redis.call('zadd', KEYS[1], now[1] .. '.' .. string.format('%06d', now[2]), ARGV[1])
end
"""
_CLIENT_OPTIONS = (
    *("client_name", "db", "password", "protocol", "ssl_ca_certs", "ssl_cert_reqs"),
    *("ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "username"),
)


class RedisCache:
    """Keeps manifests and blobs as strings, each written by one command.

    `redis://[user:password@]host[:port][/db]`, `rediss://…` (TLS), `unix:///path/to/socket?db=0`.
    What is found damaged is renamed and expires after 30 days. Manifests and blobs do not expire:
    give the server a `maxmemory` and an `allkeys-lru` policy, or collect it now and then.

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
        self._uses_name = f"{self._bucket}/used"
        self._touched_at_s: dict[str, float] = {}
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
            with suppress(Exception):  # The manifest is there, which is what counts.
                self._note_use(client, key)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        with self._using("delete manifest") as client:
            client.delete(self._manifest_name(key))
            client.zrem(self._uses_name, key)

    def manifest_keys(self) -> Iterator[str]:
        with self._using("list manifests") as client:
            for is_manifest, key, _ in self._scan(client):
                if is_manifest:
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
            # Not `exists`: who looks is about to publish a manifest that names the blob, and a
            # collector must not take it for an orphan meanwhile.
            return bool(client.touch(self._blob_name(digest)))

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

    def touch_manifest(self, key: str) -> None:
        check_key(key)
        now_s = time.monotonic()
        if now_s - self._touched_at_s.get(key, -TOUCH_INTERVAL_S) < TOUCH_INTERVAL_S:
            return
        self._touched_at_s[key] = now_s
        with suppress(StoreError), self._using("note a use") as client:
            self._note_use(client, key)

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        with self._using("delete blob") as client:
            client.unlink(self._blob_name(digest))

    def entries(self) -> Iterator[Entry]:
        from precast.cache.interface import Entry

        with self._using("list entries") as client:
            now_s = _time_of(client)
            for batch in _batches(self._scan(client)):
                pipeline = client.pipeline(transaction=False)
                for is_manifest, key, name in batch:
                    # None of these counts as a use.
                    pipeline.memory_usage(name)
                    pipeline.object("idletime", name)
                    pipeline.zscore(self._uses_name, key if is_manifest else "")
                answers = pipeline.execute(raise_on_error=False)
                note_progress()
                for i, (is_manifest, key, _) in enumerate(batch):
                    num_bytes, idle_s, noted_s = answers[3 * i : 3 * i + 3]
                    if isinstance(num_bytes, Exception):
                        raise num_bytes
                    if num_bytes is None:
                        continue  # It is gone.
                    # Reading resets the idle time, and whoever collects reads all manifests: so
                    # that is only for what bears no note. A server that evicts by frequency has no
                    # idle times.
                    idle_since_s = now_s - idle_s if isinstance(idle_s, int) else now_s
                    used_s = noted_s if isinstance(noted_s, float) else idle_since_s
                    yield Entry(is_manifest, key, num_bytes, used_s)

    def now_s(self) -> float:
        with self._using("ask for the time") as client:
            return _time_of(client)

    def sweep(self, grace_s: float) -> None:
        """Drop notes about manifests that are gone; all else here expires by itself."""
        with self._using("sweep") as client:
            for batch in _batches(client.zscan_iter(self._uses_name, count=_SCAN_COUNT)):
                pipeline = client.pipeline(transaction=False)
                for key, _ in batch:
                    pipeline.exists(self._manifest_name(key.decode("utf-8", "replace")))
                gone = [
                    key
                    for (key, _), is_there in zip(batch, pipeline.execute(), strict=True)
                    if not is_there
                ]
                note_progress()
                if gone:
                    client.zrem(self._uses_name, *gone)

    @property
    def leases(self) -> LeaseInterface:
        """Keys of the server that expire."""
        from precast.cache.lease import RedisLeases  # Few starts compile.

        return RedisLeases(self._using, f"{self._bucket}/lease/")

    def _note_use(self, client: Any, key: str) -> None:
        """Note that a manifest was used now, by the server's clock, if it is there."""
        client.eval(_NOTE_USE, 2, self._uses_name, self._manifest_name(key), key)

    def _scan(self, client: Any) -> Iterator[tuple[bool, str, bytes]]:
        """Iterate over manifests and blobs: which it is, key or digest, and its name."""
        seen = set()  # A scan may give a name twice.
        for is_manifest, start, end, is_name in (
            (True, f"{self._bucket}/ac/", ".json", is_key),
            (False, f"{self._bucket}/cas/sha256/", "", is_digest),
        ):
            pattern = f"{_escaped(start)}*{end}"
            for name in client.scan_iter(match=pattern, count=_SCAN_COUNT):
                note_progress()
                rest = name.decode("utf-8", "replace").removeprefix(start).removesuffix(end)
                found = rest if is_manifest else rest.partition("/")[2]
                if is_name(found) and name not in seen:
                    seen.add(name)
                    yield is_manifest, found, name

    def _manifest_name(self, key: str) -> str:
        return f"{self._bucket}/ac/{key}.json"

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
            if not data:
                # Nothing, or no such name? Asked at once, or what is written between two questions
                # would look like an empty value, which is damage.
                both = client.pipeline(transaction=True)
                both.getrange(name, first, last)
                both.exists(name)
                answer, is_there = both.execute(raise_on_error=False)
                if isinstance(answer, Exception):
                    raise answer
                data = answer
                return data if is_there else None
        except redis.ResponseError as error:
            if _is_wrong_type(error):
                raise _NotAStringError from error
            raise
        return data

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


def _time_of(client: Any) -> float:
    seconds, microseconds = client.time()
    return float(seconds + microseconds / 1e6)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    from itertools import islice

    remaining = iter(items)
    while batch := list(islice(remaining, _SCAN_COUNT)):
        yield batch


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
