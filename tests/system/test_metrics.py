"""All figures of a model that is really compiled, shared over a real Redis, and called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

import precast
from precast.monitoring.opentelemetry import OpenTelemetryListener
from precast.monitoring.prometheus import PrometheusCollector
from servers import RedisServer
from system.models import make_plain


class Spans:
    """Real spans of one listener."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.listener = OpenTelemetryListener(provider)

    def named(self, name: str) -> list[Any]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.mark.compile
def test_a_compiled_and_a_fetched_model_tell_everything(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    url = f"disk,{redis_server.url}/0?prefix=metrics-{tmp_path.name}"
    snapshots, spans, outputs = [], [Spans(), Spans()], []
    model = make_plain().eval()
    metrics = None
    for machine in (0, 1):
        metrics = precast.MetricsCollector(cache_dir=tmp_path / str(machine))
        precast.compile(
            model,
            cache_dir=str(tmp_path / str(machine)),
            cache_url=url,
            allow_unsigned=True,
            compiler="aot_inductor",
            compilation_level="full",
            revalidate="never",
            listeners=[metrics, spans[machine].listener],
        )
        metrics.watch(model, every=2)
        with torch.inference_mode():
            for _ in range(10):
                outputs.append(model(torch.ones(3, 16)))
        assert precast.wait(model, timeout=60)
        snapshots.append(metrics.snapshot())
        precast.release(model)
    assert torch.equal(outputs[0], outputs[-1])
    cold, warm = snapshots

    compiling = cold["compile"]
    assert (compiling["num_compiled"], compiling["success_rate"]) == (1, 1.0)
    assert compiling["seconds"]["sum"] > 0.1
    assert compiling["capture_seconds"]["count"] == 1
    assert compiling["artifact_bytes"]["sum"] > 1000
    assert compiling["peak_bytes"] > 100 << 20
    assert compiling["cpu_seconds"] > 0.1
    assert compiling["written_bytes"] > 1000
    assert cold["cache"]["hits"] == 0
    assert cold["cache"]["misses"] == {"piece": 1, "assembly": 1}
    assert cold["cache"]["tiers"]["redis"]["written_bytes"] > compiling["artifact_bytes"]["sum"]
    assert cold["cache"]["network_written_bytes"] > compiling["artifact_bytes"]["sum"]
    assert cold["starts"]["cold"]["count"] == 1
    assert cold["latest_starts"][0]["memory_before"]["resident_bytes"] > 0
    assert cold["models"] == {"Plain": {"compiled": 1, "eager": 0}}
    assert cold["machine"]["stored_bytes"] > compiling["artifact_bytes"]["sum"]
    (piece,) = cold["pieces"].values()
    assert piece["compile_seconds"] > 0
    assert piece["speedup"] > 0
    assert all(row["compiled_p90_s"] >= row["compiled_best_s"] for row in piece["timing"])
    calls = cold["calls"]["Plain"]
    assert (calls["num_calls"], calls["count"]) == (10, 5)
    assert 0 < calls["p50"] <= calls["p99"] < compiling["seconds"]["sum"]

    assert warm["starts"]["warm"]["count"] == 1
    assert warm["starts"]["seconds_saved"] > 0.1
    assert warm["cache"]["hit_rate"] == 1.0
    redis = warm["cache"]["tiers"]["redis"]
    assert redis["hits"] >= 1
    assert redis["load_seconds"]["sum"] > 0
    assert warm["cache"]["network_read_bytes"] > compiling["artifact_bytes"]["sum"]
    assert warm["compile"]["num_compiled"] == 0

    (start,) = spans[0].named("precast.start")
    (job,) = spans[0].named("precast.compile_job")
    (capture,) = spans[0].named("precast.capture")
    assert start.start_time <= capture.start_time < capture.end_time <= job.end_time
    assert job.end_time <= start.end_time
    job_s = (job.end_time - job.start_time) / 1e9
    assert job_s == pytest.approx(compiling["seconds"]["sum"], rel=0.9)
    assert {s.parent.span_id for s in (job, capture)} == {start.context.span_id}
    assert spans[1].named("precast.fetch_blob")
    assert not spans[1].named("precast.compile_job")

    registry = CollectorRegistry()
    PrometheusCollector(metrics).register(registry)
    assert registry.get_sample_value("precast_calls_total", {"model": "Plain"}) == 10
    hits = registry.get_sample_value("precast_cache_hits_total", {"tier": "redis"})
    assert hits == redis["hits"]


def test_an_error_that_is_raised_ends_the_start_for_those_who_listen(tmp_path: Path) -> None:
    def decides(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    counter, spans = precast.CompilationCounter(), Spans()
    model = precast.compile(
        decides,
        cache_dir=str(tmp_path),
        compiler="eager",
        on_error="raise",
        listeners=[counter, spans.listener],
    )
    with torch.no_grad(), pytest.raises(precast.PrecastError):
        model(torch.ones(3))
    assert (counter.num_starts_broken_off, counter.num_models_ready) == (1, 0)
    (start,) = spans.named("precast.start")
    assert start.status.description == "broken off"
