"""Machines that share tiers, and what happens when real servers stop, forget, lie or are slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from precast.cache import open_cache
from precast.cache.collect import prune
from precast.cache.trust import Trust, generate_key
from precast.events import (
    ArtifactPublished,
    ArtifactQuarantined,
    ArtifactRefused,
    CacheHit,
    Event,
    TierFailed,
    TierRecovered,
    TierSkipped,
)
from servers import Proxy, RedisServer, S3Server, Server, wait_until

KEYS = [sha256(bytes([i])).hexdigest() for i in range(4)]
BLOB = bytes(range(256)) * 4096  # 1 MiB
DIGEST = sha256(BLOB).hexdigest()

# A busy machine must not make a tier fail that a test needs.
PATIENT = "connect_ms=20000&deadline_ms=20000"


class Machine:
    """A process of its own disk, as far as the cache can tell."""

    def __init__(self, folder: Path, chain: str) -> None:
        self.events: list[Event] = []
        self.loader, self.storage = open_cache(
            folder,
            disabled=False,
            emit=self.events.append,
            clock=time.monotonic,
            cache_url=chain,
            trust=Trust(allow_unsigned=True),  # Signatures have tests of their own.
        )

    def publish(self, key: str = KEYS[0], blob: bytes = BLOB) -> None:
        self.storage.publish(key, {"note": 1}, {"piece.so": blob})

    def load(self, key: str = KEYS[0], blob: bytes = BLOB) -> bool:
        """Whether an artifact is found; if it is, it is the right one."""
        manifest = self.loader.manifest(key)
        if manifest is None:
            return False
        paths = self.loader.files(manifest["files"])
        if paths is None:
            return False
        assert manifest["note"] == 1
        assert Path(paths["piece.so"]).read_bytes() == blob
        return True

    def seen(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]


MakeMachine = Callable[[str], Machine]


@pytest.fixture
def make_machine(tmp_path: Path) -> Iterator[MakeMachine]:
    """Return what makes a machine with an empty disk."""
    machines: list[Machine] = []

    def make(chain: str) -> Machine:
        machines.append(Machine(tmp_path / f"disk-{len(machines)}", chain))
        return machines[-1]

    yield make
    for machine in machines:
        machine.storage.close()
        machine.loader.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Return a Redis that the test may stop."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    server = S3Server(tmp_path / "s3")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxied(own_redis: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(own_redis.port)
    yield proxy
    proxy.close()


@pytest.fixture(params=["redis", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Server, str]:
    """Return a server and the entry of a chain that leads to a place of this test's own."""
    if request.param == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        return redis, f"{redis.url}?prefix={tmp_path.name}&{PATIENT}"
    s3: S3Server = request.getfixturevalue("s3_server")
    return s3, f"{s3.url(tmp_path.name)}&{PATIENT}"


def raw_client(server: RedisServer) -> Any:
    import redis

    return redis.Redis(port=server.port)


def test_what_one_machine_publishes_all_others_load(
    shared: tuple[Server, str], make_machine: MakeMachine
) -> None:
    _, url = shared
    first = make_machine(f"disk,{url}")
    first.publish()
    assert first.storage.flush(60)
    assert len(first.seen(ArtifactPublished)) == 2
    second = make_machine(f"disk,{url}")
    assert second.load()
    assert [event.tier for event in second.seen(CacheHit)] == [url.partition(":")[0]]
    diskless = make_machine(url)
    assert diskless.load()
    assert not second.seen(TierFailed) + diskless.seen(TierFailed)


def test_redis_in_front_of_s3_is_filled_by_the_first_reader(
    redis_server: RedisServer, s3_server: S3Server, make_machine: MakeMachine, tmp_path: Path
) -> None:
    s3 = f"{s3_server.url(tmp_path.name)}&{PATIENT}"
    redis = f"{redis_server.url}?prefix={tmp_path.name}&{PATIENT}"
    make_machine(s3).publish()
    reader = make_machine(f"disk,{redis},{s3}")
    wait_until(reader.load, 60)
    assert reader.storage.flush(60)
    assert make_machine(redis).load()


@pytest.mark.parametrize("what", ["manifest", "blob"])
@pytest.mark.parametrize("how", ["wrong type", "cut", "flipped", "empty"])
def test_garbage_is_set_aside_and_published_anew(
    own_redis: RedisServer, make_machine: MakeMachine, what: str, how: str
) -> None:
    chain = f"disk,{own_redis.url}?{PATIENT}"
    first = make_machine(chain)
    first.publish()
    assert first.storage.flush(60)
    name = f"precast/v1/ac/{KEYS[0]}.json"
    if what == "blob":
        name = f"precast/v1/cas/sha256/{DIGEST[:2]}/{DIGEST}"
    with raw_client(own_redis) as client:
        sound = client.get(name)
        client.delete(name)
        match how:
            case "wrong type":
                client.rpush(name, "garbage")
            case "cut":
                client.set(name, sound[: len(sound) // 2])
            case "flipped":
                client.set(name, sound[:-9] + b"~" + sound[-8:])
            case "empty":
                client.set(name, b"")
    second = make_machine(chain)
    assert not second.load()
    [quarantined] = second.seen(ArtifactQuarantined)
    assert quarantined.reason.code == "artifact-corrupt"
    second.publish()  # After compiling it again.
    assert second.storage.flush(60)
    assert make_machine(chain).load()
    assert not second.seen(TierFailed)


def test_a_flushed_redis_is_filled_again(own_redis: RedisServer, make_machine: MakeMachine) -> None:
    chain = f"disk,{own_redis.url}?{PATIENT}"
    machine = make_machine(chain)
    machine.publish()
    assert machine.storage.flush(60)
    with raw_client(own_redis) as client:
        client.flushall()
    assert machine.load()  # From its disk.
    other = make_machine(chain)
    assert not other.load()
    other.publish()
    assert other.storage.flush(60)
    assert make_machine(chain).load()
    assert not machine.seen(TierFailed) + other.seen(TierFailed)


def test_a_tier_that_is_dead_at_the_start_is_reported_once_and_tried_again(
    own_redis: RedisServer, make_machine: MakeMachine
) -> None:
    own_redis.stop()
    machine = make_machine(f"disk,{own_redis.url}")
    for key in KEYS:
        assert not machine.load(key)
    assert [type(e) for e in machine.seen(TierFailed, TierSkipped)] == [TierFailed] + [
        TierSkipped
    ] * 3
    machine.publish(KEYS[0])
    assert machine.storage.flush(60)
    assert machine.load(KEYS[0])
    assert len(machine.seen(TierFailed)) == 1
    own_redis.start()
    other = make_machine(f"{own_redis.url}?{PATIENT}")
    other.publish(KEYS[1])
    assert other.storage.flush(60)
    wait_until(lambda: machine.load(KEYS[1]), 60)
    assert machine.seen(TierRecovered)


@pytest.mark.parametrize("scheme", ["redis", "s3"])
def test_a_server_that_hangs_is_left_alone_until_it_wakes(
    scheme: str, request: pytest.FixtureRequest, make_machine: MakeMachine
) -> None:
    server: Any = request.getfixturevalue(f"own_{scheme}")
    url = server.url("place") + "&" if scheme == "s3" else server.url + "?"
    other = make_machine(f"{url}{PATIENT}")
    other.publish(KEYS[1])
    assert other.storage.flush(60)
    server.sleep()
    machine = make_machine(f"disk,{url}deadline_ms=20000")
    for key in KEYS:
        assert not machine.load(key)
    [failure] = machine.seen(TierFailed)
    assert "80 ms" in failure.reason.message or "timed out" in failure.reason.message
    machine.publish(KEYS[2])
    server.wake()
    wait_until(lambda: machine.load(KEYS[1]), 60)
    assert len(machine.seen(TierFailed)) == 1


def test_a_tier_that_stops_between_two_requests_is_skipped(
    own_redis: RedisServer, make_machine: MakeMachine
) -> None:
    """
    Restarting at once goes unnoticed; staying away costs the write and no more.
    """
    machine = make_machine(f"disk,{own_redis.url}?{PATIENT}")
    machine.publish(KEYS[0])
    assert machine.storage.flush(60)
    own_redis.stop()
    own_redis.start()
    machine.publish(KEYS[1])
    assert machine.storage.flush(60)
    assert not machine.seen(TierFailed)
    own_redis.stop()
    machine.publish(KEYS[2])
    assert machine.storage.flush(60)
    assert len(machine.seen(TierFailed)) == 1
    assert machine.load(KEYS[2])


def test_a_slow_tier_costs_its_deadline_once(proxied: Proxy, make_machine: MakeMachine) -> None:
    machine = make_machine(
        f"disk,redis://127.0.0.1:{proxied.port}/0?connect_ms=20000&deadline_ms=50"
    )
    other = make_machine(f"redis://127.0.0.1:{proxied.port}/0?{PATIENT}")
    other.publish(KEYS[1])
    assert other.storage.flush(60)
    proxied.delay_s = 1.0
    num_connections = proxied.num_connections
    for key in KEYS:
        assert not machine.load(key)
    assert len(machine.seen(TierFailed)) == 1
    assert "50 ms" in machine.seen(TierFailed)[0].reason.message
    assert proxied.num_connections <= num_connections + 2  # To knock, and to ask.
    proxied.delay_s = 0.0
    wait_until(lambda: machine.load(KEYS[1]), 60)


def test_an_endpoint_gone_while_uploading_leaves_no_part(
    own_s3: S3Server, make_machine: MakeMachine
) -> None:
    """
    Nobody reads a part of the blob, nor a manifest without it; uploading it again mends all.
    """
    proxy = Proxy(own_s3.port)
    proxy.most_upload_bytes = 300_000
    try:
        uploader = make_machine(
            f"disk,{own_s3.url('place', f'http://127.0.0.1:{proxy.port}')}&{PATIENT}"
        )
        uploader.publish()
        assert uploader.storage.flush(120)
        [failure] = uploader.seen(TierFailed)
        assert (failure.tier, failure.operation) == ("s3", "write blob")
        assert uploader.load()
        own_s3.stop()
        own_s3.start()
        reader = make_machine(f"disk,{own_s3.url('place')}&{PATIENT}")
        assert not reader.load()
        assert reader.loader.blob(DIGEST) is None
        proxy.most_upload_bytes = None
        mender = make_machine(
            f"disk,{own_s3.url('place', f'http://127.0.0.1:{proxy.port}')}&{PATIENT}"
        )
        mender.publish()
        assert mender.storage.flush(120)
        assert make_machine(f"{own_s3.url('place')}&{PATIENT}").load()
    finally:
        proxy.close()


def test_a_read_only_tier_is_read_and_never_written(
    own_redis: RedisServer, make_machine: MakeMachine
) -> None:
    """
    Not even damage is moved there; it is passed over.
    """
    publisher = make_machine(f"{own_redis.url}?{PATIENT}")
    publisher.publish(KEYS[0])
    publisher.publish(KEYS[1], b"other")
    assert publisher.storage.flush(60)
    with raw_client(own_redis) as client:
        client.set(f"precast/v1/ac/{KEYS[1]}.json", b"garbage")
        before = {name: client.dump(name) for name in client.scan_iter()}
        reader = make_machine(f"disk,{own_redis.url}?readonly=1&{PATIENT}")
        assert reader.load(KEYS[0])
        assert not reader.load(KEYS[1])
        reader.publish(KEYS[1])
        reader.publish(KEYS[2])
        reader.storage.discard(KEYS[0])
        assert reader.storage.flush(60)
        assert reader.load(KEYS[1])
        assert not reader.load(KEYS[0])
        assert {name: client.dump(name) for name in client.scan_iter()} == before
        assert int(client.info("commandstats")["cmdstat_set"]["calls"]) == 5
    assert not reader.seen(TierFailed)


@pytest.mark.parametrize(
    "ending", ["pass", "sys.exit(0)", "threading.Thread(target=print).start()"]
)
def test_what_waits_is_written_when_the_process_ends(
    shared: tuple[Server, str],
    make_machine: MakeMachine,
    run_python: Any,
    tmp_path: Path,
    ending: str,
) -> None:
    """
    The client is not even imported when the main thread is done.
    """
    _, url = shared
    program = f"""
import sys, threading, time
from precast.cache import open_cache
_, storage = open_cache(sys.argv[1], disabled=False, emit=print, clock=time.monotonic,
                        cache_url="disk,{url}")
storage.publish({KEYS[0]!r}, {{"note": 1}}, {{"piece.so": bytes(range(256)) * 4096}})
{ending}
"""
    output = run_python(program, tmp_path / "cache")
    assert output.count("ArtifactPublished") == 2, output
    assert make_machine(f"disk,{url}").load()


def test_a_shared_tier_is_collected_when_it_is_told_to(
    shared: tuple[Server, str], make_machine: MakeMachine
) -> None:
    """
    By itself only the disk is. The least recently used goes first, with its blobs.
    """
    _, url = shared
    machine = make_machine(f"disk,{url}")
    for key, blob in zip(KEYS, (b"a" * 1000, b"b" * 1000, b"b" * 1000, BLOB), strict=True):
        machine.publish(key, blob)
    assert machine.storage.flush(60)
    tiers = [tier for tier in machine.storage._layered.tiers if tier.is_shared]
    arguments: dict[str, Any] = {"emit": machine.events.append, "max_bytes": None, "grace_s": -60.0}
    [untouched] = prune(tiers, max_age_s=3600.0, **arguments)
    assert untouched.keys == ()
    assert untouched.num_blobs == 0
    tiers[0].delete_manifest(KEYS[0])
    [swept] = prune(tiers, max_age_s=3600.0, **arguments)
    assert (swept.num_manifests, swept.num_blobs) == (0, 1)
    arguments["max_bytes"] = 10_000
    [trial] = prune(tiers, max_age_s=None, is_trial=True, **arguments)
    [done] = prune(tiers, max_age_s=None, **arguments)
    assert trial == done
    assert set(done.keys) == set(KEYS[1:])  # Together they need more, down to the last written.
    assert make_machine(url).load(KEYS[3]) is False
    assert machine.load(KEYS[3])  # Its disk was not asked to shrink.
    assert not machine.seen(TierFailed)


def test_signed_models_are_shared_and_others_refused(
    shared: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    From the settings to the model's output: one publishes with a key, another one trusts it, a
    third trusts somebody else and finds nothing.
    """
    import torch

    import precast
    from system.models import Filed, compiled, make_net, names

    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")
    mine, other = (generate_key(tmp_path / name) for name in ("mine.pem", "other.pem"))
    x = torch.linspace(-2, 2, 24).reshape(3, 8)

    def start(name: str, **settings: Any) -> tuple[Any, list[Event], torch.Tensor]:
        url = f"disk,{shared[1]}"
        model, events = compiled(
            make_net(), tmp_path / name, compiler=Filed(), cache_url=url, **settings
        )
        with torch.inference_mode():
            result = model(x)
        assert precast.wait(model, timeout=60)
        return model, events, result

    publisher, _, expected = start("publisher", signing_key=tmp_path / "mine.pem")
    friend, events, result = start("friend", trusted_keys=[mine])
    assert torch.equal(result, expected)
    assert precast.status(friend)["is_warm"]
    assert precast.status(friend)["settings"]["cache_url"]["value"].startswith("disk,")
    assert "CaptureFinished" not in names(events)
    stranger, events, result = start("stranger", trusted_keys=[other], mode="cache_only")
    assert torch.equal(result, expected)
    refused = [event for event in events if isinstance(event, ArtifactRefused)]
    assert refused
    assert all("not a trusted one" in event.reason.message for event in refused)
    assert "AssemblyLoaded" not in names(events)
    for model in (publisher, friend, stranger):
        precast.release(model)
