from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precast.cache.interface import CacheInterface
from precast.cache.layered import LayeredCache
from precast.cache.redis import PART_BYTES, RedisCache
from precast.cache.trust import Trust
from precast.errors import ConfigError, StoreError
from precast.events import ArtifactQuarantined, Event
from precast.testing import BLOB, DIGEST, KEY, OTHER_KEY, CacheContract, make_manifest
from servers import RedisServer, wait_until

DAY = 86400
MANIFEST = make_manifest(KEY, 1)
AC = f"v1/ac/{KEY}.json"
CAS = f"v1/cas/sha256/{DIGEST[:2]}/{DIGEST}"


@pytest.fixture
def client(redis_server: RedisServer) -> Any:
    import redis

    with redis.Redis(port=redis_server.port) as client:
        yield client


@pytest.fixture
def tier(redis_server: RedisServer, tmp_path: Path) -> RedisCache:
    return RedisCache(redis_server.url, prefix=str(tmp_path))


class TestRedis(CacheContract):
    @pytest.fixture(autouse=True)
    def use_server(self, redis_server: RedisServer) -> None:
        self.server = redis_server

    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return RedisCache(self.server.url, prefix=f"a [*] {tmp_path}")


class TestRedisInParts(CacheContract):
    """
    The contract holds where every blob is too large for a string.
    """

    @pytest.fixture(autouse=True)
    def use_server(self, redis_server: RedisServer) -> None:
        self.server = redis_server

    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return RedisCache(self.server.url, prefix=str(tmp_path), most_string_bytes=0)


def test_the_keys_are_the_documented_ones(tier: RedisCache, client: Any, tmp_path: Path) -> None:
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    found = {name.decode() for name in client.scan_iter(match=f"{tmp_path}/*")}
    assert found == {f"{tmp_path}/{AC}", f"{tmp_path}/{CAS}", f"{tmp_path}/v1/used"}
    assert [key for key, _ in client.zscan_iter(f"{tmp_path}/v1/used")] == [KEY.encode()]
    place = tier.quarantine_blob(DIGEST, "why").partition(":")[2]
    assert client.get(place) == BLOB
    assert client.get(f"{place}.reason") == b"why"
    assert client.ttl(place) > 29 * 24 * 3600


@pytest.mark.parametrize("num_bytes", [1 << 20, (1 << 20) + 1, PART_BYTES, 2 * PART_BYTES + 5])
@pytest.mark.parametrize("most_string_bytes", [256 << 20, 1 << 10])
def test_large_blobs_come_back_whole(
    redis_server: RedisServer, client: Any, tmp_path: Path, num_bytes: int, most_string_bytes: int
) -> None:
    tier = RedisCache(redis_server.url, prefix=str(tmp_path), most_string_bytes=most_string_bytes)
    blob = os.urandom(num_bytes)
    tier.write_blob(DIGEST, blob)
    assert tier.read_blob(DIGEST) == blob
    assert client.type(f"{tmp_path}/{CAS}") == (
        b"string" if most_string_bytes > num_bytes else b"hash"
    )
    assert client.ttl(f"{tmp_path}/{CAS}") == -1  # It was temporary only while it was written.
    # Whoever writes strings reads parts, and the other way round.
    assert RedisCache(redis_server.url, prefix=str(tmp_path)).read_blob(DIGEST) == blob
    client.delete(f"{tmp_path}/{CAS}")


@pytest.mark.parametrize("garbage", ["list", "hash", "stream", "text", "empty"])
def test_garbage_is_damage_that_is_set_aside_and_written_anew(
    tier: RedisCache, client: Any, tmp_path: Path, garbage: str, events: list[Event]
) -> None:
    for name in (f"{tmp_path}/{AC}", f"{tmp_path}/{CAS}"):
        match garbage:
            case "list":
                client.rpush(name, b"a", b"b")
            case "hash":
                client.hset(name, "field", b"value")
            case "stream":
                client.xadd(name, {"field": b"value"})
            case "text":
                client.set(name, b"precast-manifest 1 but not quite")
            case "empty":
                client.set(name, b"")
    layered = LayeredCache([tier], events.append, lambda: 0.0, trust=Trust(allow_unsigned=True))
    assert layered.read_manifest(KEY) is None
    assert layered.read_blob(DIGEST) is None
    assert [type(event) for event in events] == [ArtifactQuarantined] * 2
    assert not tier.has_blob(DIGEST)
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    assert layered.read_manifest(KEY) is not None
    assert layered.read_blob(DIGEST) == BLOB


def test_a_write_replaces_whatever_lies_there(
    tier: RedisCache, client: Any, tmp_path: Path
) -> None:
    client.rpush(f"{tmp_path}/{AC}", b"a")
    client.rpush(f"{tmp_path}/{CAS}", b"a")
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    assert tier.read_manifest(KEY) == MANIFEST
    assert tier.read_blob(DIGEST) == BLOB


@pytest.mark.parametrize("kind", ["manifest", "blob"])
def test_what_is_written_while_it_is_looked_for_is_no_damage(
    redis_server: RedisServer, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A reader that took it for an empty value would set it aside, and a fleet compile it again.
    """
    reader, writer = (RedisCache(redis_server.url, prefix=str(tmp_path)) for _ in range(2))
    reader.prepare()
    getrange = reader._client.getrange

    def be_overtaken(*args: Any) -> bytes:
        data: bytes = getrange(*args)
        writer.write_manifest(KEY, MANIFEST)
        writer.write_blob(DIGEST, BLOB)
        return data

    monkeypatch.setattr(reader._client, "getrange", be_overtaken)
    if kind == "manifest":
        assert reader.read_manifest(KEY) == MANIFEST
    else:
        assert reader.read_blob(DIGEST) == BLOB


def uses(tier: RedisCache) -> dict[str, float]:
    return {entry.name: entry.used_s for entry in tier.entries()}


def test_what_collects_does_not_make_everything_young(tier: RedisCache, client: Any) -> None:
    """
    It reads all manifests, and a server takes that for a use: so uses are noted apart.
    """
    tier.write_manifest(KEY, MANIFEST)
    noted_s = tier.now_s() - 10 * DAY
    client.zadd(tier._uses_name, {KEY: noted_s})
    assert tier.read_manifest(KEY) == MANIFEST
    assert uses(tier) == {KEY: pytest.approx(noted_s)}
    tier.touch_manifest(KEY)
    assert uses(tier)[KEY] > noted_s + DAY
    client.zadd(tier._uses_name, {KEY: noted_s})
    tier.touch_manifest(KEY)  # Once an hour is enough.
    assert uses(tier) == {KEY: pytest.approx(noted_s)}


def test_what_bears_no_note_goes_by_its_idle_time(tier: RedisCache, client: Any) -> None:
    tier.write_manifest(KEY, MANIFEST)
    tier.write_blob(DIGEST, BLOB)
    client.delete(tier._uses_name)
    for name in (tier._manifest_name(KEY), tier._blob_name(DIGEST)):
        client.restore(name, 0, client.dump(name), replace=True, idletime=10 * DAY)
    found = uses(tier)
    assert set(found) == {KEY, DIGEST}
    # At times the server takes it for more: it counts idle seconds in 24 bits.
    assert max(found.values()) < tier.now_s() - 10 * DAY + 60
    assert tier.has_blob(DIGEST)  # Somebody is about to name it.
    assert uses(tier)[DIGEST] > tier.now_s() - 60


def test_a_server_that_evicts_by_frequency_knows_no_idle_times(
    tier: RedisCache, client: Any
) -> None:
    """
    What bears no note is then taken for young, and stays.
    """
    tier.write_blob(DIGEST, BLOB)
    client.config_set("maxmemory-policy", "allkeys-lfu")
    try:
        assert uses(tier)[DIGEST] > tier.now_s() - 60
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_sweeping_drops_notes_of_what_is_gone(tier: RedisCache, client: Any) -> None:
    tier.write_manifest(KEY, MANIFEST)
    tier.write_manifest(OTHER_KEY, MANIFEST)
    client.delete(tier._manifest_name(KEY))  # By the server, when it is full.
    tier.touch_manifest(KEY)
    tier.sweep(3600.0)
    assert client.zrange(tier._uses_name, 0, -1) == [OTHER_KEY.encode()]
    tier.quarantine_manifest(OTHER_KEY, "why")
    tier.sweep(3600.0)
    assert not client.exists(tier._uses_name)


def test_one_who_may_only_set_and_get_can_publish(redis_server: RedisServer, client: Any) -> None:
    """
    Uses are not noted then, which stops nothing.
    """
    client.acl_setuser(
        "plain", enabled=True, nopass=True, keys=["*"], commands=["+get", "+set", "+getrange"]
    )
    try:
        tier = RedisCache(redis_server.url, prefix="plain", username="plain", password="x")
        tier.write_manifest(KEY, MANIFEST)
        tier.touch_manifest(KEY)
        assert tier.read_manifest(KEY) == MANIFEST
    finally:
        client.acl_deluser("plain")


def test_other_names_there_are_ignored(tier: RedisCache, client: Any, tmp_path: Path) -> None:
    client.set(f"{tmp_path}/v2/ac/{KEY}.json", MANIFEST)
    client.set(f"{tmp_path}/v1/ac/NO.json", MANIFEST)
    client.set(f"{tmp_path}/v1/cas/sha256/ab/{DIGEST[:-1]}", BLOB)
    tier.write_manifest(OTHER_KEY, MANIFEST)
    assert list(tier.manifest_keys()) == [OTHER_KEY]
    assert [entry.name for entry in tier.entries()] == [OTHER_KEY]
    assert tier.read_manifest(KEY) is None


def test_a_server_that_is_gone_is_a_store_error(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    tier = RedisCache(server.url)
    tier.write_manifest(KEY, MANIFEST)
    tier.knock(1.0)
    server.stop()
    for use in (
        lambda: tier.read_manifest(KEY),
        lambda: tier.write_manifest(KEY, MANIFEST),
        lambda: list(tier.manifest_keys()),
        lambda: tier.quarantine_blob(DIGEST, "why"),
    ):
        with pytest.raises(StoreError, match="'redis' failed"):
            use()
    with pytest.raises(OSError, match="refused"):
        tier.knock(1.0)
    server.start()
    try:
        assert tier.read_manifest(KEY) is None  # It answers, and has forgotten.
        server.sleep()
        with pytest.raises(TimeoutError):
            tier.knock(0.05)
    finally:
        server.stop()


def test_a_unix_socket_will_do(redis_server: RedisServer, client: Any, tmp_path: Path) -> None:
    path = Path(redis_server.folder, "redis.sock")
    server = RedisServer(tmp_path / "other")
    server.command = lambda: [  # type: ignore[method-assign]
        *RedisServer.command(server),
        *("--unixsocket", str(path)),
    ]
    server.start()  # Which is when its port answers: the socket comes a moment later.

    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return not connection.connect_ex(str(path))

    wait_until(answers)
    try:
        tier = RedisCache(f"unix://{path}", db="1")
        tier.knock(1.0)
        tier.write_manifest(KEY, MANIFEST)
        assert tier.read_manifest(KEY) == MANIFEST
    finally:
        server.stop()


def test_a_password_is_no_hindrance_to_knocking(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.command = lambda: [  # type: ignore[method-assign]
        *RedisServer.command(server),
        *("--requirepass", "secret"),
    ]
    server.start()
    try:
        tier = RedisCache(server.url)
        tier.knock(1.0)
        with pytest.raises(StoreError, match="Authentication"):
            tier.read_manifest(KEY)
        assert RedisCache(server.url, password="secret").read_manifest(KEY) is None
    finally:
        server.stop()


def test_a_fork_has_a_connection_of_its_own(tier: RedisCache) -> None:
    tier.write_manifest(KEY, MANIFEST)
    program = f"""
import os, sys
from precast.cache.redis import RedisCache
tier = RedisCache({tier._url!r}, prefix={tier._bucket.removesuffix("/v1")!r})
assert tier.read_manifest({KEY!r}) is not None
if os.fork() == 0:
    os._exit(tier.read_manifest({KEY!r}) is None)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_unknown_options_and_a_missing_package_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"prefix, client_name, db"):
        RedisCache("redis://host/0", pasword="secret")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "redis" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"pip install precast\[redis\]"):
        RedisCache("redis://host/0")
