"""`OpenTelemetryListener`: what took time, as spans, by the extra `opentelemetry` (its API alone).

Events are told when something has ended, with its seconds: spans are made then, with their true
times. Where they go is the program's choice, by the SDK that it sets up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from precast import __version__, events

if TYPE_CHECKING:
    from precast.events import Event

_NS = 1_000_000_000
_MOST_KEPT = 10_000  # Spans of one start.
_PUBLISH = "precast.publish"


class _Span(NamedTuple):
    """A span that is not handed over yet."""

    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    problem: str | None


class OpenTelemetryListener:
    """A listener that makes a span of each start of a model, and below it of each of its steps.

        precast.compile(model, listeners=[OpenTelemetryListener()])

    A start that a call waits for is a child of the span which is current in that call. One for
    each model: steps do not say of which model they are. Safe to use from several threads.
    """

    def __init__(
        self, tracer_provider: Any = None, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Make no span yet.

        Args:
            tracer_provider: Whose tracer makes the spans; None: the program's.
            now_ns: Nanoseconds since 1970.

        Raises:
            ImportError: `opentelemetry-api` is not installed.
        """
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise ImportError(
                "spans need the package opentelemetry-api: pip install 'precast[opentelemetry]'"
            ) from error
        self._trace: Any = trace
        self._tracer = trace.get_tracer("precast", __version__, tracer_provider)
        self._now_ns = now_ns
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._steps: list[_Span] = []  # Of a start that has not ended.

    def __call__(self, event: Event) -> None:
        """Keep the span of a step; hand over what belongs to a start that has ended."""
        if os.getpid() != self._pid:
            self._begin()  # In a fork: the steps are the parent's, and its lock may be held.
        match event:
            case events.ModelReady():
                attributes = {
                    "precast.model": event.model,
                    "precast.warm": event.warm,
                    "precast.pieces": event.pieces,
                    "precast.unique_pieces": event.unique_pieces,
                    "precast.compiled": event.compiled,
                    "precast.eager": event.eager,
                    "precast.from_cache": event.from_cache,
                    "precast.seconds_saved": event.seconds_saved,
                }
                self._hand_over(self._span("precast.start", event.seconds, attributes))
            case events.FellBack(piece=None):
                attributes = {"precast.model": event.model, "precast.code": event.reason.code}
                with self._lock:
                    is_start = bool(self._steps)
                if is_start:  # Else it is a single call that runs eager.
                    problem = event.reason.message
                    self._hand_over(self._span("precast.start", 0.0, attributes, problem))
            case events.StartBrokenOff():
                attributes = {"precast.model": event.model}
                self._hand_over(self._span("precast.start", 0.0, attributes, "broken off"))
            case events.AssemblyRevalidated():
                # Long after the start that it looks at again.
                attributes = {"precast.model": event.model, "precast.valid": event.is_valid}
                self._end(self._span("precast.revalidate", event.seconds, attributes), None)
            case events.CacheCollected():
                attributes = {"precast.tier": event.tier, "precast.bytes": event.num_bytes}
                self._end(self._span("precast.collect", event.seconds, attributes), None)
            case _:
                step = self._step(event)
                if step is not None:
                    self._keep(step)

    def _step(self, event: Event) -> _Span | None:
        """Return the span of a step of a start; None: the event is of no step that took time."""
        match event:
            case events.CaptureFinished():
                attributes = {"precast.model": event.model, "precast.nodes": event.nodes}
                return self._span("precast.capture", event.seconds, attributes)
            case events.CaptureFailed():
                attributes = {"precast.model": event.model, "precast.code": event.reason.code}
                return self._span("precast.capture", 0.0, attributes, event.reason.message)
            case events.JobFinished():
                attributes = {
                    "precast.piece": event.piece,
                    "precast.compiler": event.compiler,
                    "precast.attempts": event.attempts,
                    "precast.cpu_seconds": event.cpu_seconds,
                    "precast.peak_bytes": event.peak_bytes,
                }
                return self._span("precast.compile_job", event.seconds, attributes, event.code)
            case events.PieceLoaded():
                attributes = {"precast.piece": event.piece, "precast.key": event.key}
                return self._span("precast.load_piece", event.seconds, attributes)
            case events.CacheHit() | events.ArtifactPublished():
                is_hit = isinstance(event, events.CacheHit)
                name = "precast.cache_hit" if is_hit else _PUBLISH
                attributes = {
                    "precast.key": event.key,
                    "precast.tier": event.tier,
                    "precast.bytes": event.num_bytes,
                }
                return self._span(name, event.seconds, attributes)
            case events.BlobFetched():
                attributes = {"precast.tier": event.tier, "precast.bytes": event.num_bytes}
                return self._span("precast.fetch_blob", event.seconds, attributes)
            case events.LeaseAwaited():
                attributes = {"precast.outcome": event.outcome}
                return self._span("precast.wait", event.seconds, attributes)
            case _:
                return None

    def _span(
        self, name: str, seconds: float, attributes: dict[str, Any], problem: str | None = None
    ) -> _Span:
        end_ns = self._now_ns()
        known = {key: value for key, value in attributes.items() if value is not None}
        return _Span(name, end_ns - int(seconds * _NS), end_ns, known, problem)

    def _keep(self, step: _Span) -> None:
        with self._lock:
            # Shared tiers are written behind, also when the start has long ended.
            is_late = step.name == _PUBLISH and not self._steps
            if not is_late and len(self._steps) < _MOST_KEPT:
                self._steps.append(step)
        if is_late:
            self._end(step, None)

    def _hand_over(self, start: _Span) -> None:
        """Make the span of a start, and those of its steps below it."""
        with self._lock:
            steps, self._steps = self._steps, []
        # Of a start that came to nothing no seconds are told: it began with its first step.
        first_ns = min([start.start_ns, *(step.start_ns for step in steps)])
        span = self._open(start._replace(start_ns=first_ns), None)
        below = self._trace.set_span_in_context(span)
        for step in steps:
            self._end(step, below)
        span.end(start.end_ns)

    def _end(self, kept: _Span, below: Any) -> None:
        self._open(kept, below).end(kept.end_ns)

    def _open(self, kept: _Span, below: Any) -> Any:
        span = self._tracer.start_span(
            kept.name, context=below, start_time=kept.start_ns, attributes=kept.attributes
        )
        if kept.problem is not None:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, kept.problem))
        return span
