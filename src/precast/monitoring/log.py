"""Events as lines of the standard logger `precast`, in plain speech.

INFO: one line when a model is ready. DEBUG: one a piece. WARNING: once per cause for each thing
that got worse. No handler is set up: what is shown, and where, is the program's choice.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from precast import events
from precast.errors import RecordingUnwritableError

if TYPE_CHECKING:
    from precast.errors import Reason
    from precast.events import Emit, Event

logger = logging.getLogger("precast")
logger.addHandler(logging.NullHandler())


class LogListener:
    """A listener that writes log lines; safe to use from several threads."""

    def __init__(self, to: logging.Logger = logger) -> None:
        self._logger = to
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._warned: set[tuple[str, ...]] = set()

    def __call__(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        match event:
            case events.ModelReady():
                self._logger.info("%s: %s", event.model, describe_ready(event))
            case events.CaptureFailed() | events.CallOutsideContract() | events.AssemblyRejected():
                self._warn(event.model, event.reason)
            case events.FellBack():
                part = event.model if event.piece is None else f"{event.model}, {event.piece}"
                self._warn(part, event.reason)
            case events.PassRan(reason=reason) if reason is not None:
                self._warn(f"{event.piece}, pass {event.pass_name}", reason)
            case events.PassesNotSent():
                self._warn(event.piece, event.reason)
            case (
                events.PieceFailed()
                | events.PieceSplit()
                | events.VerifyMismatched()
                | events.FailureRemembered()
            ):
                self._warn(event.piece, event.reason)
            case events.TierFailed() | events.ArtifactQuarantined() | events.ArtifactRefused():
                self._warn(f"cache tier {event.tier}", event.reason)
            case events.TierRecovered():
                self._logger.info(
                    "cache tier %s: answers again after %.0f s", event.tier, event.seconds
                )
                self._warn_again(f"cache tier {event.tier}")
            case events.AssemblyRevalidated(is_valid=False):
                self._logger.warning(
                    "%s: a stored assembly was out of date; the model runs eager and the assembly "
                    "was discarded",
                    event.model,
                )
            case events.PieceCompiled():
                self._logger.debug(
                    "%s: compiled by %s in %.1f s, %d bytes",
                    *(event.piece, event.compiler, event.seconds, event.artifact_bytes),
                )
            case events.JobFinished():
                self._logger.debug(
                    "%s: job ended with %s after %.1f s: CPU %s s, peak %s bytes, written %s bytes",
                    *(event.piece, event.code or event.compiler, event.seconds),
                    *(event.cpu_seconds, event.peak_bytes, event.written_bytes),
                )
            case events.PieceLoaded():
                self._logger.debug(
                    "%s: loaded from %s in %.1f ms, saving %.1f s",
                    *(event.piece, event.tier, event.seconds * 1e3, event.compile_seconds_saved),
                )
            case events.LeaseAwaited():
                self._logger.info(
                    "%s: waited %.1f s for another process: %s",
                    *(event.name[:12], event.seconds, event.outcome),
                )
            case events.CacheCollected():
                self._logger.debug(
                    "cache tier %s: removed %d manifests and %d blobs, %d bytes",
                    *(event.tier, event.num_manifests, event.num_blobs, event.num_bytes),
                )
            case events.CacheMiss():
                self._logger.debug("%s: not cached: %s", event.key[:12], event.cause)
            case _:
                pass  # Counters and metrics tell the rest.

    def note_failed_listener(self, listener: Emit, error: Exception) -> None:
        """Report a broken listener; to be given to `Listeners` as `on_failure`."""
        if isinstance(error, RecordingUnwritableError):  # Its words say all of it.
            self._logger.warning("%s", error)
        else:
            self._logger.warning("listener %r failed and is ignored", listener, exc_info=error)

    def _warn_again(self, what: str) -> None:
        """Forget what was warned of; the next failure is another one."""
        with self._lock:
            self._warned = {cause for cause in self._warned if cause[0] != what}

    def _warn(self, what: str, reason: Reason) -> None:
        # Figures in the message vary from call to call; the code and the place are the cause.
        cause = (what, reason.code, reason.location or "")
        if os.getpid() != self._pid:  # In a fork: a thread that is not here may hold the lock.
            self._pid = os.getpid()
            self._lock = threading.Lock()
        with self._lock:
            if cause in self._warned:
                return
            self._warned.add(cause)
        self._logger.warning("%s: %s", what, reason)


def describe_ready(event: events.ModelReady) -> str:
    """Say in one sentence how a model came to be ready.

    >>> describe_ready(ModelReady("Decoder", 41.2, 33, 3, 31, 2, 2, 80.0, warm=False))
    'compiled 31 of 33 pieces (2 stay eager), 3 different: 2 from cache, 1 new; 41.2 s'
    """
    eager = f" ({event.eager} stay eager)" if event.eager else ""
    pieces = f"{event.compiled} of {event.pieces} pieces{eager}, {event.unique_pieces} different"
    if event.warm:
        return (
            f"ready in {event.seconds * 1e3:.0f} ms from cache, {pieces}; "
            f"saved {event.seconds_saved:.1f} s"
        )
    new = event.unique_pieces - event.from_cache
    return f"compiled {pieces}: {event.from_cache} from cache, {new} new; {event.seconds:.1f} s"
