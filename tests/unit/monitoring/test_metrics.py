"""What the issue of monitoring lists is all in one snapshot, and follows from events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import precast
from precast import events
from precast.errors import Reason
from precast.monitoring.metrics import MetricsCollector

REASON = Reason("compile-timeout", "too slow", "wait longer")


def job(piece: str, code: str | None, peak_bytes: int = 1) -> events.JobFinished:
    compiler = None if code else "aot_inductor"
    return events.JobFinished(piece, "", compiler, code, 9.0, 8.0, peak_bytes, 100, 1)


def compiled(piece: str, seconds: float = 9.0) -> events.PieceCompiled:
    return events.PieceCompiled(piece, "k", "aot_inductor", seconds, 5000, 1)


def failed(piece: str, code: str = "compile-timeout") -> events.PieceFailed:
    return events.PieceFailed(piece, "", "aot_inductor", Reason(code, "m", "r"))


def after(*happened: events.Event) -> dict[str, Any]:
    metrics = MetricsCollector()
    for event in happened:
        metrics(event)
    return metrics.process_snapshot()


def test_a_snapshot_is_plain_data_also_of_nothing() -> None:
    found = precast.MetricsCollector().snapshot()
    assert json.loads(json.dumps(found)) == found
    assert found["compile"]["success_rate"] is None
    assert found["cache"]["hit_rate"] is None


def test_failures_of_workers_and_of_this_process_count_once() -> None:
    """
    A worker's failure is told twice: by its job, and as the piece's.
    """
    found = after(
        *(job("a", None), compiled("a")),
        *(job("b", "compile-timeout"), failed("b")),
        failed("in process", "compile-failed"),
        compiled("in process too"),
        # One compiler gave it up, the next did it.
        *(job("c", None), failed("c", "compile-failed"), compiled("c")),
    )["compile"]
    assert (found["num_compiled"], found["num_failed"]) == (3, 2)
    assert found["failed_by_code"] == {"compile-timeout": 1, "compile-failed": 1}
    assert found["compiled_by_compiler"] == {"aot_inductor": 3}
    assert (found["success_rate"], found["failure_rate"]) == (0.6, 0.4)


def test_compile_jobs_tell_what_they_took_and_how_that_changes() -> None:
    times = [1.0, 1.0, 2.0, 2.0]
    jobs = [job(str(i), None, peak_bytes=10 * (4 - i)) for i in range(4)]
    found = after(*jobs, *(compiled(str(i), seconds) for i, seconds in enumerate(times)))["compile"]
    assert (found["peak_bytes"], found["cpu_seconds"], found["written_bytes"]) == (40, 32.0, 400)
    assert (found["seconds"]["p50"], found["seconds"]["trend"]) == (1.0, 2.0)
    assert (found["artifact_bytes"]["count"], found["artifact_bytes"]["sum"]) == (4, 20000.0)


def test_hits_and_bytes_are_told_by_tier() -> None:
    found = after(
        events.CacheHit("a", "disk", 0.001, 100),
        events.CacheHit("b", "redis", 0.01, 100),
        events.BlobFetched("d", "redis", 0.03, 5000),
        events.PieceMissed("p", "c", {}),
        events.AssemblyMissed("m", "e", {}, None),
        events.ArtifactPublished("c", "redis", 7000, 0.1),
        events.ArtifactPublished("c", "disk", 7000, 0.1),
        events.TierFailed("redis", "read blob", Reason("tier-failed", "m", "r")),
        events.TierSkipped("redis", "read blob"),
    )["cache"]
    assert (found["hits"], found["misses"], found["hit_rate"]) == (
        *(2, {"piece": 1, "assembly": 1}, 0.5),
    )
    redis = found["tiers"]["redis"]
    assert (redis["hits"], redis["hit_rate"], redis["read_bytes"]) == (1, 0.25, 5100)
    assert (redis["load_seconds"]["count"], redis["load_seconds"]["sum"]) == (2, 0.04)
    assert (redis["failures_by_code"], redis["skips"]) == ({"tier-failed": 1}, 1)
    assert (found["network_read_bytes"], found["network_written_bytes"]) == (5100, 7000)


@pytest.mark.parametrize("tier", ["disk", "disk-2", "memory", "scratch", "bundle model.bundle"])
def test_what_is_local_is_no_network(tier: str) -> None:
    assert after(events.CacheHit("a", tier, 0.001, 100))["cache"]["network_read_bytes"] == 0


def test_models_and_their_fallbacks_are_told_until_they_are_released() -> None:
    ready = events.ModelReady("m", 2.0, 5, 3, 4, 1, 2, 30.0, warm=True)
    fell_back = events.FellBack("m", "layer", REASON)
    found = after(ready, fell_back, fell_back)
    assert found["models"] == {"m": {"compiled": 4, "eager": 1}}
    assert found["fallbacks"] == [{"model": "m", "code": "compile-timeout", "count": 2}]
    assert found["starts"]["warm"]["sum"] == 2.0
    assert found["starts"]["cold"]["count"] == 0
    assert found["starts"]["seconds_saved"] == 30.0
    assert found["latest_starts"][0]["memory_after"]["resident_bytes"] > 0
    assert after(ready, events.ModelReleased("m"))["models"] == {}


def test_the_speedup_is_of_every_piece_and_size() -> None:
    rows = tuple({"sizes": {}, "compiled_s": 1.0, "eager_s": eager} for eager in (1.0, 3.0))
    found = after(events.PieceTimed("p", "k", rows))
    assert (found["speedup"]["count"], found["speedup"]["mean"]) == (2, 2.0)
    assert found["pieces"]["p"]["speedup"] == 3.0


def test_the_counter_is_joined() -> None:
    assert after(compiled("a"))["counts"]["num_compiled"] == 1


def test_the_caches_size_is_looked_up_seldom(tmp_path: Path) -> None:
    now = [0.0]
    metrics = MetricsCollector(cache_dir=tmp_path, clock=lambda: now[0])
    (tmp_path / "blob").write_bytes(b"12345")
    assert metrics.snapshot()["machine"]["stored_bytes"] == 5
    (tmp_path / "more").write_bytes(b"12345")
    now[0] = 59.0
    assert metrics.snapshot()["machine"]["stored_bytes"] == 5
    now[0] = 61.0
    assert metrics.snapshot()["machine"]["stored_bytes"] == 10


def test_without_a_folder_it_is_the_one_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blob").write_bytes(b"12345")
    monkeypatch.setenv("PRECAST_CACHE_DIR", str(tmp_path))
    assert MetricsCollector().snapshot()["machine"]["stored_bytes"] == 5


def test_a_forked_process_begins_anew() -> None:
    metrics = MetricsCollector()
    metrics(compiled("a"))
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        metrics(compiled("b"))
        found = metrics.process_snapshot()
        numbers = found["counts"]["num_compiled"], found["compile"]["num_compiled"]
        os.write(send, repr(numbers).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(receive, 100) == b"(1, 1)"
