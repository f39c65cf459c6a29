"""What could not be compiled, remembered for a while, so that not every start tries it again.

A remembered failure (a *negative entry*) is a manifest without files. It holds only where trying
again would fail again: for the same compiler and no more generous limits, and where it was a matter
of the machine (time, memory, a crash), on that machine until it starts anew.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from precast.cache.names import FAILURE_PREFIX
from precast.errors import Reason
from precast.machine import machine_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from precast.cache import CacheLoader, CacheStorage
    from precast.config import CompilationConfig

#: Codes of what depends on the piece and the compiler, or the model, alone; all others are the
#: machine's matter.
SHARED_CODES = frozenset(
    {"compile-failed", "verify-mismatch", "trace-on-start", "capture-failed", "split-failed"}
)

#: Clocks of machines may differ by that; one that is further in the future is not believed.
_CLOCK_SLACK_S = 300.0


class FailureMemory:
    """The failures of earlier tries that still hold here, kept in the tiers of one model.

    A piece of work is named by its key. The records of an assembly hold failures too: they are
    judged here as well.
    """

    def __init__(
        self,
        config: CompilationConfig,
        loader: CacheLoader,
        storage: CacheStorage,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Read nothing yet.

        Args:
            config: Of the model: its limits, and for how long a failure is remembered.
            loader: Reads what is remembered.
            storage: Writes it.
            wall_clock: Seconds since the epoch.
        """
        self._config = config
        self._loader = loader
        self._storage = storage
        self._wall_clock = wall_clock

    def recall(self, work: str) -> dict[str, Any] | None:
        """Return the failure of an earlier try that still holds here, as plain data."""
        payload = self._loader.peek(failure_key(work))
        failure = None if payload is None else payload.get("failure")
        return failure if isinstance(failure, dict) and self._holds(failure) else None

    def remember(self, work: str, reason: Reason, codes: Sequence[str]) -> dict[str, Any]:
        """Keep a failure for later starts, and return it; `codes` are those of all that failed."""
        failure = make_failure(
            reason,
            codes,
            now_s=self._wall_clock(),
            max_compile_time=self._config.max_compile_time,
            max_compile_memory=self._config.max_compile_memory,
        )
        if self._config.failure_memory and not self._config.disable_compile_cache:
            self._storage.publish(
                failure_key(work),
                {"kind": "failure", "failure": failure},
                {},
                is_local=not is_shared(codes),
            )
        return failure

    def forget(self, work: str) -> None:
        """Drop what is remembered of work that could be done after all."""
        if self._loader.peek(failure_key(work)) is not None:
            self._storage.discard(failure_key(work))

    def still_stands(self, record: Mapping[str, Any]) -> bool:
        """Whether a record still says how its piece should run.

        It does not where it, or a part of it, runs eager for a failure that holds no more.
        """
        if record.get("kind") == "parts":
            return all(map(self.still_stands, record["details"]["records"]))
        return (
            "eager" not in record
            or record["reason"] is None
            or record["reason"]["code"] == "not-worth-it"
            or (isinstance(record.get("failure"), dict) and self._holds(record["failure"]))
        )

    def reason_of(self, record: Mapping[str, Any]) -> Reason | None:
        """Return why the piece of a record runs eager, or in parts; None: it does not."""
        if record.get("reason") is None:
            return None
        if "eager" not in record or record.get("failure") is None:
            return Reason(**record["reason"])
        return self.explain(record["failure"])

    def explain(self, failure: Mapping[str, Any]) -> Reason:
        """Return a failure's reason, saying when it was and until when it counts."""
        return as_remembered(failure, self._config.failure_memory)

    def _holds(self, failure: Mapping[str, Any]) -> bool:
        return still_holds(
            failure,
            now_s=self._wall_clock(),
            memory_s=self._config.failure_memory,
            max_compile_time=self._config.max_compile_time,
            max_compile_memory=self._config.max_compile_memory,
        )


def failure_key(work: str) -> str:
    """Return the key under which the failure of a piece of work is remembered."""
    return FAILURE_PREFIX + work


def make_failure(
    reason: Reason,
    codes: Iterable[str],
    *,
    now_s: float,
    max_compile_time: float,
    max_compile_memory: int | None,
) -> dict[str, Any]:
    """Return a failure as plain data.

    Args:
        reason: Why, as it was reported.
        codes: Of all compilers that were tried.
        now_s: Seconds since the epoch.
        max_compile_time: The limit that held, as `max_compile_memory`.
    """
    return {
        "reason": reason.as_dict(),
        "failed_s": now_s,
        "machine": None if is_shared(codes) else machine_identity(),
        "cxx": _find_cxx(),
        "max_compile_time": max_compile_time,
        "max_compile_memory": max_compile_memory,
    }


def is_shared(codes: Iterable[str]) -> bool:
    """Whether a failure with these codes would happen on other machines too."""
    return set(codes) <= SHARED_CODES


def still_holds(
    failure: Mapping[str, Any],
    *,
    now_s: float,
    memory_s: float,
    max_compile_time: float,
    max_compile_memory: int | None,
) -> bool:
    """Whether trying again here and now would most likely fail again, and is not due yet."""
    try:
        if not -_CLOCK_SLACK_S <= now_s - failure["failed_s"] < memory_s:
            return False
        if failure["machine"] not in (None, machine_identity()) or failure["cxx"] != _find_cxx():
            return False
        code = failure["reason"]["code"]
        if code == "compile-timeout" and max_compile_time > failure["max_compile_time"]:
            return False
        limit = failure["max_compile_memory"]
        if code == "compile-memory" and limit is not None:
            return max_compile_memory is not None and bool(max_compile_memory <= limit)
        return bool(Reason(**failure["reason"]).code == code)
    except (KeyError, TypeError, ValueError):
        return False  # Not as we write it: then it is not known that it would fail.


def as_remembered(failure: Mapping[str, Any], memory_s: float) -> Reason:
    """Return a failure's reason, saying when it was and until when it counts."""
    reason = Reason(**failure["reason"])
    failed_s = failure["failed_s"]
    return reason.replace(
        message=f"{reason.message}; remembered from {_in_words(failed_s)}, tried again after "
        f"{_in_words(failed_s + memory_s)}",
    )


def _in_words(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "a time without end"


def _find_cxx() -> str | None:
    """Return where the C++ compiler is: with one installed since, trying again is worth it."""
    import shutil

    return shutil.which(os.environ.get("CXX") or "g++")
