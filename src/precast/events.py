"""Everything that can happen, as frozen values named in the past.

Parts of Precast say what happened by handing an event to the `emit` they were given. They do not
log, count or print: `monitoring/` does, and so may any listener of the user's. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from precast.errors import Reason
from precast.values import Value

TYPE_CHECKING = False  # As in `values.py`: `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import Any


class Event(Value):
    """Base of all events."""


# --- From a model to its pieces.


class CaptureFinished(Event):
    """A model became a graph. `guards` counts the conditions under which that graph is right."""

    model: str
    seconds: float
    nodes: int
    guards: int


class CaptureFailed(Event):
    """A model, or a part of it, could not be captured and runs eager."""

    model: str
    reason: Reason


class PlanMade(Event):
    """A graph was cut into `pieces`, of which `unique_pieces` differ, by the rule `split`."""

    model: str
    pieces: int
    unique_pieces: int
    split: str


# --- Compiling one piece.


class CompileStarted(Event):
    """A compiler began with a piece that no tier had; `worker_pid` None: in this process."""

    piece: str
    key: str
    compiler: str
    worker_pid: int | None = None


class PieceCompiled(Event):
    """A compiler finished a piece; `worker_pid` is the process it ran in."""

    piece: str
    key: str
    compiler: str
    seconds: float
    artifact_bytes: int
    worker_pid: int


class PieceFailed(Event):
    """A compiler gave a piece up; another one may still be tried."""

    piece: str
    key: str
    compiler: str
    reason: Reason


class FailureRemembered(Event):
    """A piece, or a model's capture, was not tried: an earlier try failed, and its reason holds."""

    piece: str
    key: str
    reason: Reason


class PieceSplit(Event):
    """A piece that outgrew a limit of its own was compiled in `parts` smaller ones."""

    piece: str
    key: str
    parts: int
    reason: Reason


class JobFinished(Event):
    """A job of a compile worker came to its end; `code` is why, None where a compiler did it.

    `seconds` are by the clock, `cpu_seconds` those of the worker and its children; `peak_bytes` is
    the most they held together, sampled; `written_bytes` what they handed to `write` calls. None:
    not known on this machine. `attempts`: a worker that died is replaced once; `worker_pid` is the
    last one.
    """

    piece: str
    key: str
    compiler: str | None
    code: str | None
    seconds: float
    cpu_seconds: float | None
    peak_bytes: int | None
    written_bytes: int | None
    attempts: int
    worker_pid: int | None = None


class PassRan(Event):
    """A pass ran over a new piece; `matches` counts by pattern. `reason`: it was left out."""

    piece: str
    key: str
    pass_name: str
    stage: str
    matches: dict[str, int]
    seconds: float
    reason: Reason | None = None


class PassesNotSent(Event):
    """A pass cannot be given to a compile worker; the piece was compiled in this process."""

    piece: str
    reason: Reason


class PieceVerified(Event):
    """A new artifact was found to compute what the eager piece computes."""

    piece: str
    key: str
    max_abs_error: float


class PieceTimed(Event):
    """A verified piece was timed beside eager, or its stored figures were read.

    `timing` has a mapping for each set of sizes, as `compilers.timing.time_piece` returns it.
    """

    piece: str
    key: str
    timing: tuple[Any, ...]


class VerifyMismatched(Event):
    """A new artifact computes something else than the eager piece, and was thrown away."""

    piece: str
    key: str
    reason: Reason


class PieceLoaded(Event):
    """A stored artifact was loaded from `tier` instead of being compiled."""

    piece: str
    key: str
    tier: str
    seconds: float
    compile_seconds_saved: float


# --- The cache.


class CacheHit(Event):
    """A tier had the bytes under a key."""

    key: str
    tier: str
    seconds: float
    num_bytes: int


class BlobFetched(Event):
    """A tier that is shared gave the bytes of a file of an artifact, which is kept nearer then."""

    digest: str
    tier: str
    seconds: float
    num_bytes: int


class CacheMiss(Event):
    """No tier had a key; `cause` says which part of the key is new, where that is known."""

    key: str
    cause: str


class PieceMissed(Event):
    """A piece was found under none of its keys; `parts` are those of the key it will have."""

    piece: str
    key: str
    parts: Mapping[str, Any]


class AssemblyMissed(Event):
    """No stored assembly serves a call of a model; `parts` are those of the key looked under.

    `problem` says why the last one under that key does not serve, None: there was none.
    """

    model: str
    key: str
    parts: Mapping[str, Any]
    problem: str | None


class TierFailed(Event):
    """A tier could not do an operation and was skipped."""

    tier: str
    operation: str
    reason: Reason


class TierSkipped(Event):
    """A tier was not asked, because it had failed a short while before (see `TierFailed`)."""

    tier: str
    operation: str


class TierRecovered(Event):
    """A tier that had failed answers again, after `seconds` in which it was skipped."""

    tier: str
    seconds: float


class ArtifactQuarantined(Event):
    """Stored bytes that must not run were moved aside, to `path`."""

    tier: str
    path: str
    reason: Reason


class ArtifactRefused(Event):
    """A tier has something under a key that nobody trusted vouches for; it was left alone."""

    tier: str
    key: str
    reason: Reason


class ArtifactPublished(Event):
    """A verified artifact was stored in a tier for others to find."""

    key: str
    tier: str
    num_bytes: int
    seconds: float


class CacheCollected(Event):
    """What was too old or too much was removed from a tier; `num_bytes` is what that freed."""

    tier: str
    num_manifests: int
    num_blobs: int
    num_bytes: int
    seconds: float


# --- One compile for all who share a tier.


class LeaseAcquired(Event):
    """This process does the work of this name; others wait, if they see the tier."""

    name: str
    tier: str


class LeaseAwaited(Event):
    """Work of another process was waited for.

    `outcome`: `found` its result, `taken over` since it ended without one, or `gave up` waiting.
    """

    name: str
    seconds: float
    outcome: str


class LeaseLost(Event):
    """Another process took this one for dead and has its work now."""

    name: str
    tier: str


# --- Assemblies: whole models.


class AssemblyLoaded(Event):
    """A model was put together from stored artifacts, without tracing or compiling."""

    model: str
    key: str
    seconds: float
    pieces: int
    unique_pieces: int
    seconds_saved: float


class AssemblyPublished(Event):
    """What a warm start of this model needs was stored."""

    model: str
    key: str
    num_bytes: int


class AssemblyRejected(Event):
    """A stored assembly was not used."""

    model: str
    key: str
    reason: Reason


class AssemblyRevalidated(Event):
    """A loaded assembly was compared with a fresh capture; if not valid it was discarded."""

    model: str
    key: str
    is_valid: bool
    seconds: float


# --- A running model.


class CallOutsideContract(Event):
    """A call came that no assembly of the model is right for."""

    model: str
    reason: Reason


class FellBack(Event):
    """A piece, or with `piece=None` the whole model, runs eager from now on."""

    model: str
    piece: str | None
    reason: Reason


class SlotSwapped(Event):
    """A slot now runs other code: `to` is the name of a compiler, or `eager`."""

    model: str
    slot: int
    to: str


class ModelReady(Event):
    """A model can serve one more kind of call; emitted once for each compiled signature.

    `compiled + eager == pieces`; `from_cache` of the unique pieces were found in a tier. `warm`:
    nothing was traced.
    """

    model: str
    seconds: float
    pieces: int
    unique_pieces: int
    compiled: int
    eager: int
    from_cache: int
    seconds_saved: float
    warm: bool


class StartBrokenOff(Event):
    """A start was ended by Ctrl-C, or by an error of ours; the call runs eager, or it is raised."""

    model: str


class ModelReleased(Event):
    """A model is plain eager again and holds nothing of Precast."""

    model: str


Emit = Callable[[Event], None]


class Listeners:
    """Joins several listeners into one `emit`; one that fails never stops a model.

    A listener's first failure is handed to `on_failure`; later ones of the same listener are
    silent, since a broken listener fails at every event.
    """

    def __init__(
        self,
        listeners: Iterable[Emit] = (),
        on_failure: Callable[[Emit, Exception], None] | None = None,
    ) -> None:
        self._listeners = tuple(listeners)
        self._on_failure = on_failure
        self._failed: list[Emit] = []

    def __call__(self, event: Event) -> None:
        """Hand the event to each listener in turn, in the thread that emits it."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                self._note_failure(listener, error)

    def _note_failure(self, listener: Emit, error: Exception) -> None:
        if listener in self._failed:
            return
        self._failed.append(listener)
        if self._on_failure is not None:
            self._on_failure(listener, error)
