# ruff: noqa: D102, PTH108, PTH112, PTH116, PTH118, PTH119, PTH208
# PTH: as in `disk.py`. D102: `LeaseInterface` describes the methods.
"""Who does a piece of work, agreed on by all who share a tier, so that it is done once.

A lease is a name, an owner and a time after which it counts for nothing unless it was renewed. It
saves work and promises nothing more: what is published is right whoever made it, and made twice
it is the same. So whoever cannot reach an agreement does the work itself.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from precast.cache.attempt import report_failure
from precast.cache.lock import OPEN_FOLDER, time_at, try_lock
from precast.cache.names import check_key, is_key
from precast.errors import StoreError
from precast.events import LeaseAcquired, LeaseLost
from precast.machine import machine_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Any

    from typing_extensions import Self

    from precast.cache.interface import CacheInterface, LeaseInterface
    from precast.events import Emit

#: How long a holder that says nothing is believed to be alive, and how often a live one says so.
LEASE_TTL_S = 15.0
HEARTBEAT_S = 3.0

_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
_MOST_RACES = 20


class FileLeases:
    """Leases as files of one folder, for the processes of one machine or of one file system.

    A holder keeps its file locked (`flock`), so that the lease of a killed one is free at once. On
    another machine that may not be seen, there its age by the file system's clock decides: the
    holder touches it when it renews. Where files cannot be locked at all, that alone decides, and
    two takers of an expired lease may both get it.

    Source: follows `LeaseInterface`, where the methods are described.
    """

    def __init__(self, folder: str, make_folder: Callable[[str], None], tier: str = "disk") -> None:
        """Touch nothing yet.

        Args:
            folder: Where the files lie.
            make_folder: Makes it, when it is first needed.
            tier: Named in errors.
        """
        self._folder = folder
        self._make_folder = make_folder
        self._tier = tier
        self._machine = machine_identity()
        self._held: dict[tuple[str, str], int] = {}  # Open files, whose locks last as long as they.
        self._lock = threading.Lock()

    def try_acquire(self, name: str, owner: str, ttl_s: float) -> bool:
        check_key(name)
        if self.renew(name, owner, ttl_s):
            return True
        with self._store_errors("acquire lease"):
            for _ in range(_MOST_RACES):
                answer = self._try_once(name, owner, ttl_s)
                if answer is not None:
                    return answer
        return False  # Others keep taking it from under our hands: then they have it.

    def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        check_key(name)
        with self._lock, self._store_errors("renew lease"):
            file = self._held.get((name, owner))
            if file is None:
                return False
            if not self._is_at(file, name):  # Somebody took us for dead.
                del self._held[name, owner]
                os.close(file)
                return False
            os.utime(file)
            return True

    def release(self, name: str, owner: str) -> None:
        check_key(name)
        with self._lock, self._store_errors("release lease"):
            file = self._held.pop((name, owner), None)
            if file is None:
                return
            try:
                if self._is_at(file, name):
                    os.unlink(self._path(name))
            finally:
                os.close(file)

    def sweep(self) -> None:
        """Remove what killed holders left behind."""
        with self._store_errors("sweep leases"), suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                if not is_key(name):
                    self._sweep_file(self._path(name))
                    continue
                owner = f"sweep {os.getpid()} {os.urandom(8).hex()}"
                if self.try_acquire(name, owner, LEASE_TTL_S):
                    self.release(name, owner)

    def _sweep_file(self, path: str) -> None:
        """Remove what was made to ask for the time, if its maker was killed before it could."""
        with suppress(FileNotFoundError):
            now_s = time_at(self._path(f".{os.getpid()}-{os.urandom(8).hex()}"))
            if os.path.basename(path).startswith(".") and os.stat(path).st_mtime < now_s - 3600:
                os.unlink(path)

    def _try_once(self, name: str, owner: str, ttl_s: float) -> bool | None:
        """Try to take a lease; None: the file was replaced meanwhile, so look again."""
        file, is_new = self._open(name)
        is_kept = False
        try:
            has_lock = try_lock(file)
            if not self._is_at(file, name):
                return None
            holder = _read_holder(file)
            if has_lock is None:  # Then only the one that made the file has it.
                is_free = is_new
            else:
                is_free = has_lock and (holder is None or holder["machine"] == self._machine)
            if not is_free:
                ttl_s = ttl_s if holder is None else holder["ttl_s"]
                now_s = time_at(self._path(f".{os.getpid()}-{os.urandom(8).hex()}"))
                if now_s < os.fstat(file).st_mtime + ttl_s:
                    return False
                return None if self._try_remove(file, name) else False
            content = {"machine": self._machine, "owner": owner, "ttl_s": ttl_s}
            os.lseek(file, 0, os.SEEK_SET)
            os.ftruncate(file, 0)
            os.write(file, json.dumps(content).encode())
            with self._lock:
                self._held[name, owner] = file
            is_kept = True
            return True
        finally:
            if not is_kept:
                os.close(file)

    def _try_remove(self, file: int, name: str) -> bool:
        """Remove the file of a holder that is stopped, cut off or gone; it will find out.

        One at a time, or the second would remove what the first has made in its place.
        """
        folder = os.open(self._folder, OPEN_FOLDER)
        try:
            if try_lock(folder) is False:
                return False
            if self._is_at(file, name):
                with suppress(FileNotFoundError):
                    os.unlink(self._path(name))
            return True
        finally:
            os.close(folder)

    def _open(self, name: str) -> tuple[int, bool]:
        """Open a lease's file; say whether it was made by that."""
        path, flags = self._path(name), _FLAGS | os.O_CREAT
        if not os.path.isdir(self._folder):
            self._make_folder(self._folder)
        try:
            return os.open(path, flags | os.O_EXCL, 0o600), True
        except FileExistsError:
            return os.open(path, flags, 0o600), False

    def _is_at(self, file: int, name: str) -> bool:
        """Whether an open file is still the one that stands for a lease."""
        try:
            found = os.stat(self._path(name))
        except FileNotFoundError:
            return False
        opened = os.fstat(file)
        return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    @contextmanager
    def _store_errors(self, operation: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"{error.strerror or error}: {error.filename or self._folder}"
            raise StoreError(self._tier, operation, problem) from error


class RedisLeases:
    """Leases as keys of a Redis server, which expire by themselves.

    Source: follows `LeaseInterface`; the scripts are those of redis.io/docs, "Distributed locks".
    """

    _RENEW = (
        "if redis.call('get', KEYS[1]) == ARGV[1] "
        "then return redis.call('pexpire', KEYS[1], ARGV[2]) end return 0"
    )
    _RELEASE = (
        "if redis.call('get', KEYS[1]) == ARGV[1] "
        "then return redis.call('del', KEYS[1]) end return 0"
    )

    def __init__(self, using: Callable[[str], AbstractContextManager[Any]], prefix: str) -> None:
        """Connect to nothing yet.

        Args:
            using: Gives a `redis.Redis` for the operation that is named, and raises what that one
                raises as a `StoreError`. The client's timeouts bound what a call here may cost.
            prefix: Of all keys.
        """
        self._using = using
        self._prefix = prefix

    def try_acquire(self, name: str, owner: str, ttl_s: float) -> bool:
        check_key(name)
        with self._using("acquire lease") as client:
            if client.set(self._key(name), owner, nx=True, px=_milliseconds(ttl_s)):
                return True
        return self.renew(name, owner, ttl_s)

    def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        check_key(name)
        with self._using("renew lease") as client:
            answer = client.eval(self._RENEW, 1, self._key(name), owner, _milliseconds(ttl_s))
            return bool(answer)

    def release(self, name: str, owner: str) -> None:
        check_key(name)
        with self._using("release lease") as client:
            client.eval(self._RELEASE, 1, self._key(name), owner)

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"


class Leases:
    """What one process holds while it works: acquired where most others see it, and kept alive.

    Asks the last tier that offers leases first, since that one reaches farthest. A place that fails
    is reported once and left out from then on; where none answers, everything counts as acquired.
    Use as a context manager: what is held at its end is released, and the heartbeat ends.
    """

    def __init__(
        self,
        tiers: Sequence[CacheInterface],
        emit: Emit,
        *,
        settle: Callable[[CacheInterface], bool] = lambda _: True,
        ttl_s: float = LEASE_TTL_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """Ask nothing yet.

        Args:
            tiers: Nearest first.
            emit: Is told what happens, also by the heartbeat's thread.
            settle: Waits until a tier has what was published, before a lease in it is released;
                whoever gets the lease next would not find it. False: it took too long, and is not
                waited for again.
            ttl_s: How long a lease is held without a sign of life.
            heartbeat_s: Between two signs.
        """
        self._emit = emit
        self._settle = settle
        self._is_settling = True
        self._ttl_s = ttl_s
        self._heartbeat_s = heartbeat_s
        self._owner = f"{os.getpid()}-{os.urandom(16).hex()}"
        self._places = self._find_places(tiers)
        self._held: dict[str, tuple[CacheInterface, LeaseInterface] | None] = {}
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def try_acquire(self, name: str) -> bool:
        """Return whether the work of this name is ours to do now."""
        with self._lock:
            if name in self._held:
                return True
        while self._places:
            tier, leases = place = self._places[0]
            try:
                is_ours = leases.try_acquire(name, self._owner, self._ttl_s)
            except Exception as error:  # noqa: BLE001 - tiers are plug-ins, none may stop a model
                report_failure(self._emit, tier, "acquire lease", error)
                self._places = self._places[1:]
                continue
            if is_ours:
                self._hold(name, place)
            return is_ours
        self._hold(name, None)
        return True

    def still_holds(self, name: str) -> bool:
        """Whether a lease that was acquired is still ours: another may have taken us for dead."""
        with self._lock:
            if name not in self._held:
                return False
            place = self._held[name]
        return place is None or self._renew(name, *place)

    def release(self, name: str) -> None:
        """Let others have it, once they can find what was published under it."""
        with self._lock:
            place = self._held.get(name)
        if place is not None and self._is_settling:
            self._is_settling = self._settle(place[0])
        with self._lock:
            place = self._held.pop(name, None)
        if place is not None:
            tier, leases = place
            try:
                leases.release(name, self._owner)
            except Exception as error:  # noqa: BLE001 - as above; it expires
                report_failure(self._emit, tier, "release lease", error)

    def close(self) -> None:
        """Release all and end the heartbeat."""
        for name in tuple(self._held):
            self.release(name)
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _find_places(
        self, tiers: Sequence[CacheInterface]
    ) -> list[tuple[CacheInterface, LeaseInterface]]:
        places = []
        for tier in reversed(tiers):
            try:
                leases = tier.leases if tier.is_writable else None
            except Exception as error:  # noqa: BLE001 - as above
                report_failure(self._emit, tier, "offer leases", error)
                continue
            if leases is not None:
                places.append((tier, leases))
        return places

    def _hold(self, name: str, place: tuple[CacheInterface, LeaseInterface] | None) -> None:
        with self._lock:
            self._held[name] = place
        if place is None:
            return
        self._emit(LeaseAcquired(name, place[0].name))
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._beat, name="precast-heartbeat", daemon=True
            )
            self._thread.start()

    def _beat(self) -> None:
        while not self._is_closed.wait(self._heartbeat_s):
            with self._lock:
                held = list(self._held.items())
            for name, place in held:
                if place is not None:
                    self._renew(name, *place)

    def _renew(self, name: str, tier: CacheInterface, leases: LeaseInterface) -> bool:
        try:
            is_ours = leases.renew(name, self._owner, self._ttl_s)
        except Exception as error:  # noqa: BLE001 - as above
            report_failure(self._emit, tier, "renew lease", error)
            return False  # Tried again at the next beat.
        if not is_ours:
            with self._lock:
                was_held = self._held.pop(name, None) is not None
            if was_held:
                self._emit(LeaseLost(name, tier.name))
        return is_ours


def _read_holder(file: int) -> dict[str, Any] | None:
    """Return what the holder of a lease wrote into its file; None: nothing that makes sense."""
    try:
        content = json.loads(os.read(file, 4096))
        return {"machine": str(content["machine"]), "ttl_s": float(content["ttl_s"])}
    except (ValueError, TypeError, KeyError):
        return None


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
