"""`MetricsCollector`: everything that is measured, joined, as one dictionary of plain data.

Joins `CompilationCounter`, `PerformanceMonitor` and what the process and the machine take, and
adds what neither has: by tier, by compiler and by reason. `docs/metrics.md` explains each figure.
Serves no endpoint: `prometheus.py` and `opentelemetry.py` do.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from precast import events
from precast.events import Event
from precast.monitoring.counter import CompilationCounter
from precast.monitoring.distribution import (
    ARTIFACT_BYTES,
    COMPILE_S,
    LOAD_S,
    RATIO,
    START_S,
    Distribution,
)
from precast.monitoring.performance import PerformanceMonitor
from precast.monitoring.system import (
    device_bytes,
    peak_device_bytes,
    process_figures,
    stored_bytes,
)

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import Any

_STORED_FOR_S = 60.0  # So long one look at the cache's size holds.
_OUTCOMES = ("found", "taken over", "gave up")


class MetricsCollector:
    """A listener that joins all figures; give it to `precast.compile` as one of `listeners`.

        metrics = precast.MetricsCollector()
        model = precast.compile(model, listeners=[metrics])
        metrics.watch(model)  # Latency and throughput, where they are wanted.
        metrics.snapshot()["cache"]["hit_rate"]

    One for all models of a process. Safe to use from several threads. In a process that is forked
    from this one it begins anew. `counter` and `performance` are the two that it joins: do not
    give them to `precast.compile` besides.
    """

    counter: CompilationCounter

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Know nothing yet.

        Args:
            cache_dir: Whose size is measured; None: the one that settings name.
            clock: Seconds that only go forward.
        """
        self._cache_dir = cache_dir
        self._clock = clock
        self.performance = PerformanceMonitor(clock)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self.counter = CompilationCounter()
        self._tally = _Tally()
        self._stored: tuple[float, int | None] | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        self._follow_fork()
        self.counter(event)
        self.performance(event)
        with self._lock:
            self._tally.take(event)

    def _follow_fork(self) -> None:
        if os.getpid() != self._pid:
            self._begin()

    def watch(self, model: Any, every: int = 100, name: str | None = None) -> None:
        """Time one call in `every` of a model: see `PerformanceMonitor.watch`."""
        self.performance.watch(model, every, name)

    def unwatch(self, model: Any) -> None:
        """Time no more calls of a model; what was seen stays."""
        self.performance.unwatch(model)

    def snapshot(self) -> dict[str, Any]:
        """Return all figures at one moment, as plain data: `docs/metrics.md` explains each."""
        return {**self.process_snapshot(), "machine": self.machine_snapshot()}

    def process_snapshot(self) -> dict[str, Any]:
        """Return what this process did and took."""
        self._follow_fork()
        with self._lock:
            found = self._tally.snapshot()
        return {
            "counts": self.counter.snapshot(),
            **found,
            "pieces": self.performance.pieces(),
            "latest_starts": self.performance.starts(),
            "calls": self.performance.calls(),
            "process": {
                **process_figures(),
                "device_bytes": device_bytes(),
                "peak_device_bytes": peak_device_bytes(),
            },
        }

    def machine_snapshot(self) -> dict[str, Any]:
        """Return what all processes of the machine share: GPUs, and the cache on its disk."""
        self._follow_fork()
        return {"gpus": self.performance.gpus(), "stored_bytes": self._stored_bytes()}

    def _stored_bytes(self) -> int | None:
        """Return the size of the cache on this machine's disk, as it was a minute ago at most."""
        now = self._clock()
        with self._lock:
            known = self._stored
        if known is not None and now - known[0] < _STORED_FOR_S:
            return known[1]
        folder = self._cache_dir
        if folder is None:
            from precast.config import read_config

            folder = read_config().config.cache_path()
        found = stored_bytes(os.fspath(folder))
        with self._lock:
            self._stored = now, found
        return found


class _Tally:
    """What the counter and the monitor do not have: sums by tier, compiler, code and model."""

    def __init__(self) -> None:
        self._compiled: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._in_jobs: set[str] = set()  # Pieces whose job told how it ended.
        self._compile_s = Distribution(COMPILE_S)
        self._capture_s = Distribution(COMPILE_S)
        self._artifact_bytes = Distribution(ARTIFACT_BYTES)
        self._cpu_s = 0.0
        self._written_bytes = 0
        self._peak_bytes: int | None = None
        self._speedup = Distribution(RATIO)
        self._load_s = Distribution(LOAD_S)
        self._tiers: dict[str, _Tier] = {}
        self._misses = {"piece": 0, "assembly": 0}
        self._starts = {"warm": Distribution(START_S), "cold": Distribution(START_S)}
        self._saved_s = 0.0
        self._waits = dict.fromkeys(_OUTCOMES, 0)
        self._waited_s = 0.0
        self._models: dict[str, dict[str, int]] = {}
        self._fallbacks: dict[tuple[str, str], int] = {}

    def take(self, event: Event) -> None:
        match event:
            case events.CaptureFinished():
                self._capture_s.add(event.seconds)
            case events.JobFinished():
                self._take_job(event)
            case events.PieceCompiled():
                self._in_jobs.discard(event.piece)
                _add(self._compiled, event.compiler)
                self._compile_s.add(event.seconds)
                self._artifact_bytes.add(event.artifact_bytes)
            case events.PieceFailed():
                if event.piece in self._in_jobs:
                    self._in_jobs.discard(event.piece)
                else:  # It was compiled in this process.
                    _add(self._failed, event.reason.code)
            case events.PieceSplit():
                self._in_jobs.discard(event.piece)
            case events.PieceTimed():
                for row in event.timing:
                    self._speedup.add(row["eager_s"] / row["compiled_s"])
            case events.PieceLoaded():
                self._load_s.add(event.seconds)
            case events.CacheHit():
                tier = self._tier(event.tier)
                tier.hits += 1
                tier.read_bytes += event.num_bytes
                tier.load_s.add(event.seconds)
            case events.BlobFetched():
                tier = self._tier(event.tier)
                tier.read_bytes += event.num_bytes
                tier.load_s.add(event.seconds)
            case events.ArtifactPublished():
                tier = self._tier(event.tier)
                tier.published += 1
                tier.written_bytes += event.num_bytes
                tier.write_s.add(event.seconds)
            case events.TierFailed():
                _add(self._tier(event.tier).failures, event.reason.code)
            case events.TierSkipped():
                self._tier(event.tier).skips += 1
            case events.PieceMissed():
                self._misses["piece"] += 1
            case events.AssemblyMissed():
                self._misses["assembly"] += 1
            case events.LeaseAwaited():
                _add(self._waits, event.outcome)
                self._waited_s += event.seconds
            case events.ModelReady():
                self._starts["warm" if event.warm else "cold"].add(event.seconds)
                self._saved_s += event.seconds_saved
                self._models[event.model] = {"compiled": event.compiled, "eager": event.eager}
            case events.ModelReleased():
                self._models.pop(event.model, None)
            case events.FellBack():
                _add(self._fallbacks, (event.model, event.reason.code))
            case _:
                pass

    def _take_job(self, event: events.JobFinished) -> None:
        self._in_jobs.add(event.piece)
        if event.code is not None:
            _add(self._failed, event.code)
        self._cpu_s += event.cpu_seconds or 0.0
        self._written_bytes += event.written_bytes or 0
        if event.peak_bytes is not None:
            self._peak_bytes = max(event.peak_bytes, self._peak_bytes or 0)

    def _tier(self, name: str) -> _Tier:
        if name not in self._tiers:
            self._tiers[name] = _Tier()
        return self._tiers[name]

    def snapshot(self) -> dict[str, Any]:
        num_compiled, num_failed = sum(self._compiled.values()), sum(self._failed.values())
        hits = sum(tier.hits for tier in self._tiers.values())
        asked = hits + sum(self._misses.values())
        success_rate = _share(num_compiled, num_compiled + num_failed)
        remote = [tier for name, tier in self._tiers.items() if _is_remote(name)]
        return {
            "compile": {
                "num_compiled": num_compiled,
                "num_failed": num_failed,
                "success_rate": success_rate,
                "failure_rate": None if success_rate is None else 1 - success_rate,
                "compiled_by_compiler": dict(self._compiled),
                "failed_by_code": dict(self._failed),
                "seconds": self._compile_s.snapshot(),
                "capture_seconds": self._capture_s.snapshot(),
                "artifact_bytes": self._artifact_bytes.snapshot(),
                "cpu_seconds": self._cpu_s,
                "written_bytes": self._written_bytes,
                "peak_bytes": self._peak_bytes,
                "waits": dict(self._waits),
                "waited_seconds": self._waited_s,
            },
            "cache": {
                "hits": hits,
                "misses": dict(self._misses),
                "hit_rate": _share(hits, asked),
                "piece_load_seconds": self._load_s.snapshot(),
                "tiers": {name: tier.snapshot(asked) for name, tier in self._tiers.items()},
                "network_read_bytes": sum(tier.read_bytes for tier in remote),
                "network_written_bytes": sum(tier.written_bytes for tier in remote),
            },
            "starts": {
                **{kind: seconds.snapshot() for kind, seconds in self._starts.items()},
                "seconds_saved": self._saved_s,
            },
            "speedup": self._speedup.snapshot(),
            "models": {name: dict(pieces) for name, pieces in self._models.items()},
            "fallbacks": [
                {"model": model, "code": code, "count": count}
                for (model, code), count in self._fallbacks.items()
            ],
        }


class _Tier:
    """What one tier did."""

    def __init__(self) -> None:
        self.hits = 0
        self.read_bytes = 0
        self.load_s = Distribution(LOAD_S)
        self.published = 0
        self.written_bytes = 0
        self.write_s = Distribution(LOAD_S)
        self.failures: dict[str, int] = {}
        self.skips = 0

    def snapshot(self, asked: int) -> dict[str, Any]:
        return {
            "hits": self.hits,
            "hit_rate": _share(self.hits, asked),
            "read_bytes": self.read_bytes,
            "load_seconds": self.load_s.snapshot(),
            "published": self.published,
            "written_bytes": self.written_bytes,
            "write_seconds": self.write_s.snapshot(),
            "failures_by_code": dict(self.failures),
            "skips": self.skips,
        }


def _is_remote(tier: str) -> bool:
    """Whether a tier is reached over a network, by its name: that of its URL's scheme.

    A folder that was given a name (`disk:/mnt/fleet?name=fleet`) counts as one: it is most often
    on a network.
    """
    if tier.startswith("bundle "):
        return False
    return tier.partition("-")[0] not in ("memory", "disk", "scratch")


def _add(counts: dict[Any, int], name: Any) -> None:
    counts[name] = counts.get(name, 0) + 1


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
