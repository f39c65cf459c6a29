"""One operation of one tier, tried: a failure becomes an event and never an exception."""

from __future__ import annotations

from precast.errors import Reason, StoreError, TierSkippedError
from precast.events import ArtifactQuarantined, TierFailed, TierSkipped

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ParamSpec, TypeVar

    from precast.cache.interface import CacheInterface
    from precast.events import Emit

    P = ParamSpec("P")
    T = TypeVar("T")


def try_read(
    emit: Emit,
    tier: CacheInterface,
    method: Callable[P, T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T | None:
    """Return what a method of a tier returns, or None where it fails."""
    try:
        return method(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - tiers are plug-ins, and none may stop a model
        report_failure(emit, tier, _name_of(method), error)
        return None


def try_write(
    emit: Emit,
    tier: CacheInterface,
    method: Callable[P, None],
    *args: P.args,
    **kwargs: P.kwargs,
) -> bool:
    """Return whether a method of a tier that returns nothing did its work."""
    try:
        method(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - as above
        report_failure(emit, tier, _name_of(method), error)
        return False
    return True


def try_quarantine(
    emit: Emit,
    tier: CacheInterface,
    method: Callable[[str, str], str],
    name: str,
    reason: Reason,
) -> None:
    """Have a tier set damage aside; report it, whether that worked or not.

    Args:
        method: `quarantine_manifest` or `quarantine_blob` of the tier.
        name: The key or digest.
        reason: Why its bytes must not run.
    """
    try:
        path = method(name, str(reason))
    except Exception as error:  # noqa: BLE001 - as above
        failure = _as_store_error(tier, _name_of(method), error)
        message = f"{reason.message}; it could not be moved aside either: {failure.problem}"
        emit(TierFailed(tier.name, failure.operation, reason.replace(message=message)))
    else:
        emit(ArtifactQuarantined(tier.name, path, reason))


def report_failure(emit: Emit, tier: CacheInterface, operation: str, error: Exception) -> None:
    """Report that a tier could not do something; a `StoreError` knows better what that was."""
    failure = _as_store_error(tier, operation, error)
    if isinstance(failure, TierSkippedError):
        emit(TierSkipped(failure.tier, failure.operation))
    else:
        emit(TierFailed(failure.tier, failure.operation, failure.reason))


def _as_store_error(tier: CacheInterface, operation: str, error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    return StoreError(tier.name, operation, f"{type(error).__name__}: {error}")


def _name_of(method: object) -> str:
    return getattr(method, "__name__", "use").strip("_").replace("_", " ")
