"""Leases: file locks and Redis keys by one contract, and what a process holds of them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from precast.cache import DiskCache, MemoryCache
from precast.cache import lock as lock_module
from precast.cache.guarded import GuardedCache
from precast.cache.interface import CacheInterface, LeaseInterface
from precast.cache.lease import FileLeases, Leases
from precast.cache.redis import RedisCache
from precast.errors import StoreError
from precast.events import Event
from precast.testing import KEY, OTHER_KEY, LeaseContract, every_fault
from servers import RedisServer

SOURCE = Path(__file__).parents[3] / "src"


def file_leases(root: Path) -> FileLeases:
    leases = DiskCache(root).leases
    assert isinstance(leases, FileLeases)
    return leases


class TestFileLeases(LeaseContract):
    def make_leases(self, tmp_path: Path) -> LeaseInterface:
        return file_leases(tmp_path)


class TestFileLeasesWithoutLocks(LeaseContract):
    """
    A file system on which nothing can be locked: the making of the file decides, and its age.
    """

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import fcntl

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)

    def make_leases(self, tmp_path: Path) -> LeaseInterface:
        return file_leases(tmp_path)


class TestRedisLeases(LeaseContract):
    @pytest.fixture(autouse=True)
    def use_server(self, redis_server: RedisServer) -> None:
        self.server = redis_server

    def make_leases(self, tmp_path: Path) -> LeaseInterface:
        return RedisCache(self.server.url, prefix=str(tmp_path)).leases

    def test_it_is_a_key_that_expires_and_is_gone_when_released(self, tmp_path: Path) -> None:
        import redis

        leases = self.make_leases(tmp_path)
        name = f"{tmp_path}/v1/lease/{KEY}"
        with redis.Redis(port=self.server.port) as client:
            assert leases.try_acquire(KEY, "me", 60.0)
            assert 59_000 < client.pttl(name) <= 60_000
            leases.release(KEY, "me")
            assert not client.exists(name)

    def test_a_server_that_is_away_is_a_store_error(self) -> None:
        away = RedisCache("redis://127.0.0.1:1").leases
        for use in (away.try_acquire, away.renew):
            with pytest.raises(StoreError, match="redis"):
                use(KEY, "me", 1.0)
        with pytest.raises(StoreError, match="release lease"):
            away.release(KEY, "me")


class TestGuardedRedisLeases(TestRedisLeases):
    def make_leases(self, tmp_path: Path) -> LeaseInterface:
        tier = RedisCache(self.server.url, prefix=str(tmp_path))
        leases = GuardedCache(tier, lambda _: None, time.monotonic, deadline_s=20.0).leases
        assert leases is not None
        return leases


HOLDER = f"""
import os, sys, time
sys.path.insert(0, {str(SOURCE)!r})
from precast.cache import DiskCache
assert DiskCache(sys.argv[1]).leases.try_acquire(sys.argv[2], "holder", 3600.0)
if sys.argv[3] == "end" or os.fork():
    print("ready", flush=True)
time.sleep(60)
"""


def start_holder(root: Path, then: str = "end") -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-I", "-c", HOLDER, str(root), KEY, then],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    return holder


def test_the_lease_of_a_killed_holder_is_free_at_once(tmp_path: Path) -> None:
    """
    Not when it expires, in an hour: the kernel lets go of the lock.
    """
    with start_holder(tmp_path) as holder:
        leases = file_leases(tmp_path)
        assert not leases.try_acquire(KEY, "waiter", 15.0)
        os.killpg(holder.pid, 9)
        holder.wait()
        deadline = time.monotonic() + 10
        while not leases.try_acquire(KEY, "waiter", 15.0):
            assert time.monotonic() < deadline
        leases.release(KEY, "waiter")
    assert list((tmp_path / "v1" / "lease").iterdir()) == []


def test_a_fork_that_outlives_the_holder_keeps_the_lock_but_not_the_lease(tmp_path: Path) -> None:
    """
    A data loader, say. It does not renew, so the lease expires.
    """
    with start_holder(tmp_path, "keep") as holder:
        holder.kill()
        holder.wait()
        leases = file_leases(tmp_path)
        assert not leases.try_acquire(KEY, "waiter", 15.0)
        path = tmp_path / "v1" / "lease" / KEY
        os.utime(path, (0, path.stat().st_mtime - 3601))
        assert leases.try_acquire(KEY, "waiter", 15.0)
        leases.release(KEY, "waiter")
        os.killpg(holder.pid, 9)


def test_a_holder_on_another_machine_counts_until_it_expires(tmp_path: Path) -> None:
    """
    Where the lock does not reach, as on some network file systems; by the clock of the files.
    """
    mine = file_leases(tmp_path)
    assert mine.try_acquire(KEY, "me", 60.0)
    path = tmp_path / "v1" / "lease" / KEY
    content = json.loads(path.read_bytes())
    mine.release(KEY, "me")
    path.write_text(json.dumps({**content, "machine": "another"}))
    assert not mine.try_acquire(KEY, "me", 1.0)
    os.utime(path, (0, path.stat().st_mtime - 61))
    assert mine.try_acquire(KEY, "me", 1.0)
    mine.release(KEY, "me")


def test_a_machine_with_a_wrong_clock_takes_no_living_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = file_leases(tmp_path)
    assert mine.try_acquire(KEY, "me", 60.0)
    real = time.time
    for offset_s in (2 * 86400, -2 * 86400):
        monkeypatch.setattr(time, "time", lambda offset_s=offset_s: real() + offset_s)
        assert not file_leases(tmp_path).try_acquire(KEY, "you", 60.0)
    mine.release(KEY, "me")


def test_what_lies_where_a_lease_belongs_is_taken_over(tmp_path: Path) -> None:
    for content in (b"", b"garbage", b"{}", b'{"machine": 1, "ttl_s": "x"}'):
        path = tmp_path / "v1" / "lease" / KEY
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        leases = file_leases(tmp_path)
        assert leases.try_acquire(KEY, "me", 15.0)
        leases.release(KEY, "me")


def test_sweeping_removes_what_killed_holders_left_and_nothing_else(tmp_path: Path) -> None:
    living = file_leases(tmp_path)
    assert living.try_acquire(KEY, "me", 60.0)
    (tmp_path / "v1" / "lease" / OTHER_KEY).write_bytes(b"")
    DiskCache(tmp_path).sweep(0.0)
    assert [path.name for path in (tmp_path / "v1" / "lease").iterdir()] == [KEY]
    living.release(KEY, "me")


def test_any_operation_may_fail_at_any_step(tmp_path: Path) -> None:
    """
    Nothing but `StoreError` comes out, no file stays open, and the next taker gets the lease.
    """
    operations = (*_LEASE_OPERATIONS,)
    for fault in every_fault(operations=operations):
        root = tmp_path / str(fault.n)
        leases = file_leases(root)
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with fault:
            for use in (leases.try_acquire, leases.renew, leases.try_acquire):
                with suppress(StoreError):
                    use(KEY, "me", 60.0)
            for _ in range(2):
                with suppress(StoreError):
                    leases.release(KEY, "me")
            with suppress(StoreError):
                leases.sweep()
        assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
        other = file_leases(root)
        assert other.try_acquire(KEY, "you", 60.0)
        other.release(KEY, "you")


_LEASE_OPERATIONS = (
    *("close", "fstat", "ftruncate", "listdir", "lseek", "mkdir", "open", "read", "stat"),
    *("unlink", "utime", "write"),
)


def test_a_lock_that_fails_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StoreError, match="Input/output"):
        file_leases(tmp_path).try_acquire(KEY, "me", 1.0)
    assert lock_module.try_lock.__doc__


def test_of_many_who_take_over_one_gets_it(tmp_path: Path) -> None:
    """
    All see at once that the holder has expired; none removes what another has made since.
    """
    holder = file_leases(tmp_path)
    path = tmp_path / "v1" / "lease" / KEY
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            assert holder.try_acquire(KEY, "stopped", 15.0)
            os.utime(path, (0, path.stat().st_mtime - 16))
            takers = [file_leases(tmp_path) for _ in range(8)]
            got = list(pool.map(lambda taker: taker.try_acquire(KEY, "taker", 15.0), takers))
            still = [taker.renew(KEY, "taker", 15.0) for taker in takers]
            assert got == still
            assert sum(got) == 1
            takers[got.index(True)].release(KEY, "taker")
            assert not holder.renew(KEY, "stopped", 15.0)


# -- Leases: what one process holds


class Failing:
    """Leases in a place that is away."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: object) -> None:
            raise StoreError("far", name, "away")

        return fail


class Far(DiskCache):
    """A disk that stands for a server, with leases of its own."""

    def __init__(self, root: Path, leases: LeaseInterface | None) -> None:
        super().__init__(root, name="far")
        self._own = leases

    @property
    def leases(self) -> LeaseInterface | None:
        return self._own


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_the_place_that_reaches_farthest_decides(tmp_path: Path, events: list[Event]) -> None:
    near, far = DiskCache(tmp_path / "near"), DiskCache(tmp_path / "far")
    with Leases([MemoryCache(), near, far], events.append) as leases:
        assert leases.try_acquire(KEY)
        assert far.leases is not None
        assert near.leases is not None
        assert not far.leases.try_acquire(KEY, "other", 1.0)
        assert near.leases.try_acquire(KEY, "other", 1.0)
        near.leases.release(KEY, "other")
    assert far.leases.try_acquire(KEY, "other", 1.0)
    far.leases.release(KEY, "other")
    assert kinds(events) == ["LeaseAcquired"]


def test_a_place_that_fails_is_reported_once_and_the_next_one_decides(
    tmp_path: Path, events: list[Event]
) -> None:
    tiers = [DiskCache(tmp_path / "near"), Far(tmp_path / "far", Failing())]  # type: ignore[arg-type]
    with Leases(tiers, events.append) as leases, Leases(tiers, lambda _: None) as others:
        assert leases.try_acquire(KEY)
        assert leases.try_acquire(OTHER_KEY)
        assert not others.try_acquire(KEY)
    assert kinds(events) == ["TierFailed", "LeaseAcquired", "LeaseAcquired"]


def test_where_nobody_answers_everything_is_ours(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "file").write_text("no directory")
    for tiers in ([], [MemoryCache()], [DiskCache(tmp_path / "file")], [Far(tmp_path, Failing())]):
        with Leases(tiers, events.append) as leases:  # type: ignore[arg-type]
            assert leases.try_acquire(KEY)
            assert leases.still_holds(KEY)
            leases.release(KEY)
            assert not leases.still_holds(KEY)


def test_what_is_held_is_kept_alive(tmp_path: Path, events: list[Event]) -> None:
    """
    Well past the time after which it would expire.
    """
    disk = DiskCache(tmp_path)
    with (
        Leases([disk], events.append, ttl_s=0.5, heartbeat_s=0.05) as mine,
        Leases([DiskCache(tmp_path)], events.append, ttl_s=0.5, heartbeat_s=0.05) as others,
    ):
        assert mine.try_acquire(KEY)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert not others.try_acquire(KEY)
            time.sleep(0.02)
        assert mine.still_holds(KEY)
    assert kinds(events) == ["LeaseAcquired"]
    assert not any(thread.name == "precast-heartbeat" for thread in threading.enumerate())


def test_one_who_was_taken_for_dead_finds_out(tmp_path: Path, events: list[Event]) -> None:
    """
    A stopped process, say: it must not publish as if nothing had happened.
    """
    with Leases([DiskCache(tmp_path)], events.append, heartbeat_s=1000) as mine:
        assert mine.try_acquire(KEY)
        path = tmp_path / "v1" / "lease" / KEY
        os.utime(path, (0, path.stat().st_mtime - 1000))
        with Leases([DiskCache(tmp_path)], events.append) as other:
            assert other.try_acquire(KEY)
            assert not mine.still_holds(KEY)
            mine.release(KEY)
            assert other.still_holds(KEY)
    assert kinds(events) == ["LeaseAcquired", "LeaseAcquired", "LeaseLost"]


def test_a_lease_is_kept_until_others_can_find_the_result(
    tmp_path: Path, events: list[Event]
) -> None:
    """
    What takes too long is waited for once, however many leases there are.
    """
    disk = DiskCache(tmp_path)
    assert disk.leases is not None
    seen: list[bool] = []

    def settle(tier: CacheInterface) -> bool:
        assert tier is disk
        assert disk.leases is not None
        seen.append(disk.leases.try_acquire(KEY, "other", 1.0))
        return len(seen) < 2

    with Leases([disk], events.append, settle=settle) as leases:
        for name in (KEY, OTHER_KEY):
            assert leases.try_acquire(name)
        leases.release("of-nobody")
        assert seen == []
        leases.release(KEY)
        assert seen == [False], "it was free before that was over"
        for name in (KEY, "third-key"):
            assert leases.try_acquire(name)
    assert len(seen) == 2
    assert list((tmp_path / "v1" / "lease").iterdir()) == []


def test_a_dead_server_costs_a_bounded_delay_once_and_the_disk_decides(
    tmp_path: Path, events: list[Event]
) -> None:
    """
    One that takes connections and says nothing: the worst kind.
    """
    own = RedisServer(tmp_path / "redis")
    own.start()
    own.sleep()
    try:
        tier = RedisCache(own.url)
        knock = tier.knock
        waited: list[float] = []

        def count(timeout_s: float) -> None:
            waited.append(timeout_s)
            knock(timeout_s)

        far = GuardedCache(tier, events.append, time.monotonic, deadline_s=0.25, knock=count)
        near = DiskCache(tmp_path / "near")
        with Leases([near, far], events.append) as leases:
            for name in (KEY, OTHER_KEY):
                assert leases.try_acquire(name)
            assert near.leases is not None
            assert not near.leases.try_acquire(KEY, "other", 1.0)
        assert kinds(events) == ["TierFailed", "LeaseAcquired", "LeaseAcquired"]
        assert waited == [0.08]
    finally:
        own.stop()


def test_a_server_that_dies_while_a_lease_is_held_is_reported(
    tmp_path: Path, events: list[Event]
) -> None:
    """
    The holder goes on, and does not believe that it still holds it.
    """
    own = RedisServer(tmp_path / "redis")
    own.start()
    far = GuardedCache(RedisCache(own.url), events.append, time.monotonic, deadline_s=20.0)
    with Leases([far], events.append, heartbeat_s=1000) as leases:
        assert leases.try_acquire(KEY)
        own.stop()
        assert not leases.still_holds(KEY)
        assert leases.try_acquire(OTHER_KEY), "without a place for leases all is ours"
    assert kinds(events) == ["LeaseAcquired", "TierFailed", "TierSkipped", "TierSkipped"]
