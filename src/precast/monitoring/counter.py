"""`CompilationCounter`: how often each thing happened, as a fold over events."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from precast import events
from precast.events import Event


def _one(event: Any) -> int:
    return 1


#: Each count: the event it folds over, and how much one such event adds.
_COUNTS: dict[str, tuple[type[Event], Callable[[Any], int]]] = {
    "num_captures": (events.CaptureFinished, _one),
    "num_capture_failures": (events.CaptureFailed, _one),
    "num_pieces": (events.PlanMade, lambda event: event.pieces),
    "num_unique_pieces": (events.PlanMade, lambda event: event.unique_pieces),
    "num_started": (events.CompileStarted, _one),
    "num_compiled": (events.PieceCompiled, _one),
    "num_failed": (events.PieceFailed, _one),
    "num_failures_remembered": (events.FailureRemembered, _one),
    "num_split": (events.PieceSplit, _one),
    "num_jobs": (events.JobFinished, _one),
    "num_passes_run": (events.PassRan, _one),
    "num_passes_failed": (events.PassRan, lambda event: event.reason is not None),
    "num_passes_not_sent": (events.PassesNotSent, _one),
    "num_verified": (events.PieceVerified, _one),
    "num_timed": (events.PieceTimed, _one),
    "num_mismatched": (events.VerifyMismatched, _one),
    "num_loaded": (events.PieceLoaded, _one),
    "num_cache_hits": (events.CacheHit, _one),
    "num_cache_misses": (events.CacheMiss, _one),
    "num_blobs_fetched": (events.BlobFetched, _one),
    "num_pieces_missed": (events.PieceMissed, _one),
    "num_assemblies_missed": (events.AssemblyMissed, _one),
    "num_tier_failures": (events.TierFailed, _one),
    "num_tier_skips": (events.TierSkipped, _one),
    "num_tier_recoveries": (events.TierRecovered, _one),
    "num_quarantined": (events.ArtifactQuarantined, _one),
    "num_refused": (events.ArtifactRefused, _one),
    "num_published": (events.ArtifactPublished, _one),
    "num_collected": (events.CacheCollected, lambda event: event.num_manifests),
    "num_leases_acquired": (events.LeaseAcquired, _one),
    "num_leases_awaited": (events.LeaseAwaited, _one),
    "num_leases_lost": (events.LeaseLost, _one),
    "num_assemblies_loaded": (events.AssemblyLoaded, _one),
    "num_assemblies_published": (events.AssemblyPublished, _one),
    "num_assemblies_rejected": (events.AssemblyRejected, _one),
    "num_revalidated": (events.AssemblyRevalidated, _one),
    "num_outside_contract": (events.CallOutsideContract, _one),
    "num_fallbacks": (events.FellBack, _one),
    "num_swaps": (events.SlotSwapped, _one),
    "num_models_ready": (events.ModelReady, _one),
    "num_starts_broken_off": (events.StartBrokenOff, _one),
    "num_models_released": (events.ModelReleased, _one),
}


class CompilationCounter:
    """A listener that counts; give it to `precast.compile` as one of `listeners`.

        counter = CompilationCounter()
        with counter.expect(num_compiled=3, num_loaded=0):
            model(inputs)

    Each count is an attribute. Safe to use from several threads; a forked process counts on.
    """

    num_captures: int
    num_capture_failures: int
    num_pieces: int
    num_unique_pieces: int
    num_started: int
    num_compiled: int
    num_failed: int
    num_failures_remembered: int
    num_split: int
    num_jobs: int
    num_passes_run: int
    num_passes_failed: int
    num_passes_not_sent: int
    num_verified: int
    num_timed: int
    num_mismatched: int
    num_loaded: int
    num_cache_hits: int
    num_cache_misses: int
    num_blobs_fetched: int
    num_pieces_missed: int
    num_assemblies_missed: int
    num_tier_failures: int
    num_tier_skips: int
    num_tier_recoveries: int
    num_quarantined: int
    num_refused: int
    num_published: int
    num_collected: int
    num_leases_acquired: int
    num_leases_awaited: int
    num_leases_lost: int
    num_assemblies_loaded: int
    num_assemblies_published: int
    num_assemblies_rejected: int
    num_revalidated: int
    num_outside_contract: int
    num_fallbacks: int
    num_swaps: int
    num_models_ready: int
    num_starts_broken_off: int
    num_models_released: int

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        for name in _COUNTS:
            setattr(self, name, 0)

    def __call__(self, event: Event) -> None:
        """Count one event."""
        self._follow_fork()
        with self._lock:
            for name, (kind, amount) in _COUNTS.items():
                if isinstance(event, kind):
                    setattr(self, name, getattr(self, name) + amount(event))

    def snapshot(self) -> dict[str, int]:
        """Return all counts at one moment, by name."""
        self._follow_fork()
        with self._lock:
            return {name: getattr(self, name) for name in _COUNTS}

    def _follow_fork(self) -> None:
        if os.getpid() != self._pid:  # A thread that is not here may hold the lock.
            self._pid = os.getpid()
            self._lock = threading.Lock()

    @contextmanager
    def expect(self, **expected: int) -> Iterator[None]:
        """Assert by how much counts change inside the block; names every one that differs.

        An error that the block raises itself is left as it is.
        """
        if unknown := expected.keys() - _COUNTS.keys():
            raise TypeError(f"no count {min(unknown)!r}; counts are {', '.join(_COUNTS)}")
        before = self.snapshot()
        yield
        after = self.snapshot()
        differing = [
            f"{name}: expected {number:+d}, got {after[name] - before[name]:+d}"
            for name, number in expected.items()
            if after[name] - before[name] != number
        ]
        assert not differing, "; ".join(differing)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={n}" for name, n in self.snapshot().items() if n)
        return f"CompilationCounter({counts})"
