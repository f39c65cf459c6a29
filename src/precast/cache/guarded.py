# ruff: noqa: D102
# D102: `CacheInterface` describes the methods.
"""A tier that may be slow or dead, kept from costing more than a bounded delay once.

Each request has a deadline, and a tier that failed is not asked again for a while that grows from
failure to failure (a circuit breaker). Whether it answers again is found out beside the caller, so
that a dead tier costs no second delay. Wraps one tier; knows nothing of the others.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from precast.cache.names import check_digest, check_key
from precast.cache.wrapped import WrappedCache
from precast.errors import StoreError, TierSkippedError
from precast.events import TierRecovered

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, TypeVar

    from precast.cache.interface import CacheInterface, Entry, LeaseInterface
    from precast.events import Emit

    T = TypeVar("T")

#: The most that a tier which is not there at all costs, once.
CONNECT_DEADLINE_S = 0.08

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

#: Nobody lists a tier during a start, and listing an object store takes its time.
LISTING_DEADLINE_S = 60.0

#: Who asks for a lease is about to compile, and taking a slow server for a dead one would have
#: many do that.
LEASE_DEADLINE_S = 2.0

# Requests that never come back keep their threads; beyond these the tier is not asked at all.
_MOST_HANGING = 4
_NO_BLOB = "0" * 64


def note_progress() -> None:
    """Tell whoever waits for this thread that bytes have moved: the deadline begins anew.

    For tiers, while they read something large. Does nothing where no deadline runs.
    """
    request = threading.current_thread()
    if isinstance(request, _Request):
        request.moved_at_s = time.monotonic()


class GuardedCache(WrappedCache):
    """Answers within a deadline, or with a `StoreError`; skips a tier that failed.

    A request that moves no bytes for `deadline_s` is given up, though it may end by itself later;
    so a large blob may take as long as it keeps coming. The request that finds the tier failing
    raises `StoreError`; until the tier answers again all others raise `TierSkippedError` at once.

    `write_manifest` and `write_blob` run in the caller's thread and as long as the tier's client
    allows: they are for a thread that has time (`writer.py`).

    Source: follows `CacheInterface`, where the methods are described.
    """

    def __init__(
        self,
        tier: CacheInterface,
        emit: Emit,
        clock: Callable[[], float],
        *,
        deadline_s: float,
        connect_deadline_s: float = CONNECT_DEADLINE_S,
        knock: Callable[[float], None] | None = None,
        prepare: Callable[[], None] | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        """Ask nothing yet.

        Args:
            tier: What is asked.
            emit: Is told when the tier answers again.
            clock: Seconds that only go forward, for the pauses.
            deadline_s: How long a request may move nothing.
            connect_deadline_s: How long `knock` may take.
            knock: Raises unless something answers within the given seconds; imports nothing. It
                comes before the first request, so that a dead tier costs no import.
            prepare: Imports what the tier's client needs; called before the first request, and
                not counted in its deadline, which is for what the tier does.
            first_pause_s: How long a tier is skipped after a failure; doubled each time.
            longest_pause_s: Where the doubling ends.
        """
        super().__init__(tier)
        self._emit = emit
        self._clock = clock
        self._deadline_s = deadline_s
        self._connect_deadline_s = connect_deadline_s
        self._knock = knock
        self._prepare = prepare
        self._lock = threading.RLock()
        self._has_met = False
        self._is_probing = False
        self._hanging: list[_Request] = []
        self._link = _Breaker(clock, first_pause_s, longest_pause_s)
        # A tier that is full or read-only to us can still be read.
        self._writes = _Breaker(clock, first_pause_s, longest_pause_s)

    def read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        return self._ask("read manifest", self._tier.read_manifest, key)

    def write_manifest(self, key: str, data: bytes) -> None:
        check_key(key)
        self._write("write manifest", self._tier.write_manifest, key, data)

    def delete_manifest(self, key: str) -> None:
        check_key(key)
        self._ask("delete manifest", self._tier.delete_manifest, key)

    def manifest_keys(self) -> Iterator[str]:
        return iter(self._ask_at_length("list manifests", lambda: list(self._tier.manifest_keys())))

    def read_blob(self, digest: str) -> bytes | None:
        check_digest(digest)
        return self._ask("read blob", self._tier.read_blob, digest)

    def write_blob(self, digest: str, data: bytes) -> None:
        check_digest(digest)
        self._write("write blob", self._tier.write_blob, digest, data)

    def has_blob(self, digest: str) -> bool:
        check_digest(digest)
        return self._ask("look for a blob", self._tier.has_blob, digest)

    def local_blob_path(self, digest: str) -> str | None:
        check_digest(digest)
        if not self._tier.keeps_files:
            return None  # Known without asking.
        return self._ask("look for a blob", self._tier.local_blob_path, digest)

    def link_tree(self, files: Mapping[str, str]) -> str | None:
        if not self._tier.keeps_files:
            return None
        return self._ask("link tree", self._tier.link_tree, files)

    def quarantine_manifest(self, key: str, reason: str) -> str:
        check_key(key)
        return self._ask("quarantine manifest", self._tier.quarantine_manifest, key, reason)

    def quarantine_blob(self, digest: str, reason: str) -> str:
        check_digest(digest)
        return self._ask("quarantine blob", self._tier.quarantine_blob, digest, reason)

    def touch_manifest(self, key: str) -> None:
        check_key(key)
        # Not by `_ask`: a note that comes to nothing is no reason to skip a tier.
        if not self._link.is_open:
            with suppress(StoreError):
                self._within(self._deadline_s, "note a use", self._tier.touch_manifest, key)

    def delete_blob(self, digest: str) -> None:
        check_digest(digest)
        self._ask("delete blob", self._tier.delete_blob, digest)

    def entries(self) -> Iterator[Entry]:
        return iter(self._ask_at_length("list entries", lambda: list(self._tier.entries())))

    def now_s(self) -> float:
        return self._ask("ask for the time", self._tier.now_s)

    def sweep(self, grace_s: float) -> None:
        self._ask_at_length("sweep", lambda: self._tier.sweep(grace_s))

    @property
    def leases(self) -> LeaseInterface | None:
        """The tier's, each request with a deadline; a server that is gone is a `StoreError`."""
        leases = self._tier.leases  # Asks nothing.
        return None if leases is None else _GuardedLeases(leases, self._ask)

    # -- requests with a deadline ------------------------------------------------

    def _ask(
        self,
        operation: str,
        method: Callable[..., T],
        *args: Any,
        least_s: float = 0.0,
    ) -> T:
        if not self._has_met:
            self._meet(operation)
        if self._link.is_open:
            self._probe_if_due()
            raise TierSkippedError(self.name, operation)
        try:
            return self._within(max(least_s, self._deadline_s), operation, method, *args)
        except ValueError:
            raise  # The caller's mistake, not the tier's.
        except Exception as error:
            raise self._note_failure(self._link, operation, error) from error

    def _ask_at_length(self, operation: str, method: Callable[[], T]) -> T:
        return self._ask(operation, method, least_s=LISTING_DEADLINE_S)

    def _within(self, deadline_s: float, operation: str, work: Callable[..., T], *args: Any) -> T:
        """Return what some work gives, done by a thread of its own, within a deadline."""
        with self._lock:
            self._hanging = [request for request in self._hanging if request.is_alive()]
            if len(self._hanging) >= _MOST_HANGING:
                problem = f"{len(self._hanging)} earlier requests have not come back yet"
                raise StoreError(self.name, operation, problem)
        request = _Request(work, args)
        request.start()
        while not request.done.wait(request.moved_at_s + deadline_s - time.monotonic()):
            if time.monotonic() >= request.moved_at_s + deadline_s:
                with self._lock:
                    self._hanging.append(request)
                problem = f"nothing came within {deadline_s * 1e3:.0f} ms"
                raise StoreError(self.name, operation, problem)
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[no-any-return]

    def _meet(self, operation: str) -> None:
        """Find out, before the first request, whether anybody is there."""
        with self._lock:  # Another thread's first request waits for ours and learns from it.
            if self._has_met:
                return
            self._has_met = True
            try:
                self._make_contact(operation)
            except Exception as error:
                raise self._note_failure(self._link, operation, error) from error

    def _make_contact(self, operation: str) -> None:
        if self._knock is not None:
            limit_s = self._connect_deadline_s
            self._within(limit_s, operation, self._knock, limit_s)
        if self._prepare is not None:
            self._prepare()

    def _note_failure(self, breaker: _Breaker, operation: str, error: Exception) -> StoreError:
        """Skip the tier for a while; return what to raise, which is reported once an outage."""
        if not breaker.fail():
            return TierSkippedError(self.name, operation)
        if isinstance(error, StoreError):
            return error
        return StoreError(self.name, operation, f"{type(error).__name__}: {error}")

    # -- a tier that failed --------------------------------------------------------

    def _probe_if_due(self) -> None:
        """Find out beside the caller whether the tier answers again, at most once a pause."""
        with self._lock:
            if self._is_probing or not self._link.is_due:
                return
            self._is_probing = True
        try:
            threading.Thread(target=self._probe, name="precast-cache-probe", daemon=True).start()
        except RuntimeError:  # The process is about to end.
            self._is_probing = False

    def _probe(self) -> None:
        try:
            self._make_contact("look for a blob")
            self._within(self._deadline_s, "look for a blob", self._tier.has_blob, _NO_BLOB)
        except Exception:  # noqa: BLE001 - reported when it began
            self._link.fail()
        else:
            self._note_recovery(self._link)
        finally:
            self._is_probing = False

    def _note_recovery(self, breaker: _Breaker) -> None:
        seconds = breaker.close()
        if seconds is not None:
            self._emit(TierRecovered(self.name, seconds))

    # -- writes, which have time ---------------------------------------------------

    def _write(self, operation: str, method: Callable[..., None], *args: Any) -> None:
        if self._link.is_open and self._link.is_due and not self._is_probing:
            self._is_probing = True
            self._probe()
        if self._link.is_open or (self._writes.is_open and not self._writes.is_due):
            raise TierSkippedError(self.name, operation)
        try:
            method(*args)
        except ValueError:
            raise
        except Exception as error:
            raise self._note_failure(self._writes, operation, error) from error
        self._note_recovery(self._writes)


class _GuardedLeases:
    """Leases of a tier, asked by its guard."""

    def __init__(self, leases: LeaseInterface, ask: Callable[..., Any]) -> None:
        self._leases = leases
        self._ask = ask

    def try_acquire(self, name: str, owner: str, ttl_s: float) -> bool:
        acquire = self._leases.try_acquire
        return bool(
            self._ask("acquire lease", acquire, name, owner, ttl_s, least_s=LEASE_DEADLINE_S)
        )

    def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        renew = self._leases.renew
        return bool(self._ask("renew lease", renew, name, owner, ttl_s, least_s=LEASE_DEADLINE_S))

    def release(self, name: str, owner: str) -> None:
        self._ask("release lease", self._leases.release, name, owner, least_s=LEASE_DEADLINE_S)


class _Request(threading.Thread):
    """One request; a daemon, since a client that hangs must not keep the process."""

    def __init__(self, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(name="precast-cache-request", daemon=True)
        self._work = work
        self._work_args = args
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.moved_at_s = time.monotonic()

    def run(self) -> None:
        try:
            self.result = self._work(*self._work_args)
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            self.error = error
        finally:
            self.done.set()


class _Breaker:
    """Whether a tier is skipped, and until when. Safe to use from several threads."""

    def __init__(
        self, clock: Callable[[], float], first_pause_s: float, longest_pause_s: float
    ) -> None:
        self._clock = clock
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._lock = threading.Lock()
        self._opened_at_s: float | None = None
        self._due_at_s = 0.0
        self._pause_s = first_pause_s

    @property
    def is_open(self) -> bool:
        """Whether the tier is skipped."""
        return self._opened_at_s is not None

    @property
    def is_due(self) -> bool:
        """Whether the pause is over and the tier may be tried."""
        return self._clock() >= self._due_at_s

    def fail(self) -> bool:
        """Begin a pause; say whether it is the first of this outage."""
        with self._lock:
            now_s = self._clock()
            is_new = self._opened_at_s is None
            if is_new:
                self._opened_at_s = now_s
            self._due_at_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
            return is_new

    def close(self) -> float | None:
        """End the outage; return how long it was, None where there was none."""
        with self._lock:
            opened_at_s, self._opened_at_s = self._opened_at_s, None
            self._pause_s = self._first_pause_s
            return None if opened_at_s is None else self._clock() - opened_at_s
