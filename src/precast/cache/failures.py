"""What could not be compiled, remembered for a while, so that not every start tries it again.

A remembered failure (a *negative entry*) is a manifest without files. It holds only where trying
again would fail again: for the same compiler and no more generous limits, and where it was a matter
of the machine (time, memory, a crash), on that machine until it starts anew.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from precast.cache.lease import machine_identity
from precast.cache.names import FAILURE_PREFIX
from precast.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Codes of what depends on the piece and the compiler alone; all others are the machine's matter.
SHARED_CODES = frozenset({"compile-failed", "verify-mismatch", "trace-on-start", "capture-failed"})

#: Clocks of machines may differ by that; one that is further in the future is not believed.
_CLOCK_SLACK_S = 300.0


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
