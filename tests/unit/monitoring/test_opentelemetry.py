"""Spans have the times of what happened, and hang together as it did."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from precast import events
from precast.errors import Reason
from precast.monitoring.opentelemetry import OpenTelemetryListener

S = 1_000_000_000
REASON = Reason("capture-failed", "a graph break", "rewrite it")


class Setup:
    """A listener whose clock is set by hand, and the spans that came of it."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.now_s = 0
        self.listen = OpenTelemetryListener(self.provider, lambda: self.now_s * S)

    def at(self, now_s: int, event: events.Event) -> None:
        self.now_s = now_s
        self.listen(event)

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


def ready(seconds: float, *, warm: bool = False) -> events.ModelReady:
    return events.ModelReady("Model", seconds, 5, 3, 4, 1, 2, 30.0, warm)


def test_a_cold_start_is_one_span_with_its_steps_below() -> None:
    setup = Setup()
    setup.at(104, events.CaptureFinished("Model", 3.0, 100, 10))
    setup.at(120, events.JobFinished("layer", "", "aot_inductor", None, 15.0, 14.0, 10**9, 5, 1))
    setup.at(121, events.PieceLoaded("layer", "k", "cache", 0.5, 0.0))
    setup.at(122, ready(22.0))
    spans = setup.spans()
    times = {name: (span.start_time / S, span.end_time / S) for name, span in spans.items()}
    assert times == {
        "precast.start": (100, 122),
        "precast.capture": (101, 104),
        "precast.compile_job": (105, 120),
        "precast.load_piece": (120.5, 121),
    }
    start = spans.pop("precast.start")
    assert {span.parent.span_id for span in spans.values()} == {start.context.span_id}
    assert start.parent is None
    assert start.attributes["precast.model"] == "Model"
    assert spans["precast.compile_job"].attributes["precast.peak_bytes"] == 10**9


def test_a_start_belongs_to_the_request_that_waits_for_it() -> None:
    setup = Setup()
    with setup.provider.get_tracer("server").start_as_current_span("request") as request:
        setup.at(10, events.CacheHit("k", "disk", 1.0, 100))
        setup.at(11, ready(2.0, warm=True))
    spans = setup.spans()
    assert spans["precast.start"].parent.span_id == request.get_span_context().span_id
    assert spans["precast.cache_hit"].parent.span_id == spans["precast.start"].context.span_id


def test_steps_of_one_start_are_not_the_next_ones() -> None:
    setup = Setup()
    setup.at(10, events.CacheHit("k", "disk", 1.0, 100))
    setup.at(11, ready(2.0))
    setup.exporter.clear()
    setup.at(20, ready(2.0))
    assert list(setup.spans()) == ["precast.start"]


def test_a_start_that_failed_says_why() -> None:
    setup = Setup()
    setup.at(9, events.CacheHit("k", "disk", 1.0, 100))
    setup.at(12, events.CaptureFailed("Model", REASON))
    setup.at(12, events.FellBack("Model", None, REASON))
    start = setup.spans()["precast.start"]
    assert (start.start_time / S, start.end_time / S) == (8, 12)
    assert start.status.status_code is trace.StatusCode.ERROR
    assert start.status.description == "a graph break"
    assert start.attributes["precast.code"] == "capture-failed"
    assert setup.spans()["precast.capture"].status.status_code is trace.StatusCode.ERROR


def test_a_job_that_failed_says_why() -> None:
    setup = Setup()
    setup.at(9, events.JobFinished("layer", "", None, "compile-timeout", 5.0, None, None, None, 1))
    setup.at(10, ready(9.0))
    job = setup.spans()["precast.compile_job"]
    assert (job.status.status_code, job.status.description) == (
        *(trace.StatusCode.ERROR, "compile-timeout"),
    )


def test_a_single_call_that_runs_eager_is_no_start() -> None:
    setup = Setup()
    setup.at(9, events.FellBack("Model", None, REASON))
    assert setup.spans() == {}


def test_a_second_look_stands_for_itself() -> None:
    setup = Setup()
    setup.at(5, ready(1.0, warm=True))
    setup.at(60, events.AssemblyRevalidated("Model", "k", True, 4.0))
    span = setup.spans()["precast.revalidate"]
    assert (span.start_time / S, span.end_time / S, span.parent) == (56, 60, None)


def test_what_is_published_after_a_start_is_no_part_of_the_next() -> None:
    """Shared tiers are written behind: an hour later, a start must not seem to have begun then."""
    setup = Setup()
    setup.at(10, ready(2.0))
    setup.at(12, events.ArtifactPublished("k", "redis", 100, 1.0))
    publish = setup.spans()["precast.publish"]
    assert (publish.start_time / S, publish.end_time / S, publish.parent) == (11, 12, None)
    setup.exporter.clear()
    setup.at(3600, ready(1.0, warm=True))
    assert setup.spans()["precast.start"].start_time / S == 3599


def test_a_forked_process_begins_anew() -> None:
    setup = Setup()
    setup.at(10, events.CacheHit("k", "disk", 1.0, 100))
    pid = os.fork()
    if pid == 0:
        setup.at(20, ready(2.0))
        os._exit(len(setup.spans()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    setup.at(20, ready(2.0))
    assert len(setup.spans()) == 2


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"precast\[opentelemetry\]"):
        OpenTelemetryListener()
