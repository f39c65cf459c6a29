"""Real scrapes over HTTP: one process, and a server of several that answer for each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import precast
from precast import events
from precast.errors import Reason
from precast.monitoring.prometheus import METRICS, PrometheusCollector

pytestmark = pytest.mark.timeout(60)

HERE = Path(__file__).parent
PATIENCE_S = 20.0


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return each sample by its name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def series(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def test_one_process_is_scraped_with_what_it_knows_then() -> None:
    metrics = precast.MetricsCollector()
    registry = prometheus_client.CollectorRegistry()
    PrometheusCollector(metrics).register(registry)
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        assert series("precast_cache_hits_total", tier="disk") not in scrape(server.server_port)
        metrics(events.CacheHit("key", "disk", 0.002, 100))
        metrics(events.FellBack("Model", "layer", Reason("compile-timeout", "m", "r")))
        found = scrape(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found[series("precast_cache_hits_total", tier="disk")] == 1
    assert found[series("precast_fallbacks_total", model="Model", code="compile-timeout")] == 1
    assert found[series("precast_cache_load_seconds_bucket", tier="disk", le="0.001")] == 0
    assert found[series("precast_cache_load_seconds_bucket", tier="disk", le="0.0025")] == 1
    assert found[series("precast_cache_load_seconds_count", tier="disk")] == 1
    assert found[series("precast_events_total", event="fallbacks")] == 1
    assert found[series("precast_process_resident_memory_bytes")] > 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[int, tuple[int, int]]]:
    """Return process and port of each worker of a real server, by its number."""
    folder = tmp_path / "multiproc"
    folder.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, str(HERE / "metrics_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        workers = {}
        for _ in range(3):
            number, pid, port = map(int, process.stdout.readline().split())
            workers[number] = pid, port
        yield workers
        assert process.stdin is not None
        process.stdin.close()


def scrape_until(port: int, name: Any, value: float) -> Any:
    """Scrape until the other workers have written what they know."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := scrape(port)).get(name) != value and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_any_worker_of_a_server_answers_for_all(server: dict[int, tuple[int, int]]) -> None:
    hits = series("precast_cache_hits_total", tier="redis")
    for _, port in server.values():
        found = scrape_until(port, hits, 6)
        assert found[hits] == 1 + 2 + 3
        assert found[series("precast_cache_load_seconds_count", tier="redis")] == 6
        assert found[series("precast_cache_network_read_bytes_total")] == 600
        # What happened before the fork is the parent's, once.
        assert found[series("precast_compiles_total", compiler="aot_inductor")] == 1
        # Beside the server's own metrics, which prometheus_client adds up.
        assert found[series("server_requests_total")] == 6
    assert found[series("precast_process_resident_memory_bytes")] > 3 * (5 << 20)
    assert found[series("precast_process_cpu_seconds_total")] > 0


def test_what_a_worker_did_outlives_it_and_what_it_held_does_not(
    server: dict[int, tuple[int, int]],
) -> None:
    hits = series("precast_cache_hits_total", tier="redis")
    held = series("precast_process_resident_memory_bytes")
    before = scrape_until(server[1][1], hits, 6)
    time.sleep(0.2)  # Until each has written what it holds.
    before = scrape(server[1][1])
    os.kill(server[3][0], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        after = scrape(server[1][1])
        if after[held] < 0.9 * before[held]:
            break
        time.sleep(0.05)
    assert after[hits] == 6
    assert after[held] < 0.9 * before[held]


def test_processes_that_were_not_forked_tell_each_other_at_their_end(tmp_path: Path) -> None:
    program = (
        "import precast; from precast import events\n"
        "from precast.monitoring.prometheus import PrometheusCollector\n"
        "metrics = precast.MetricsCollector(); PrometheusCollector(metrics)\n"
        "metrics(events.CacheHit('key', 'disk', 0.002, 100))\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    (tmp_path / "precast_v1_1_1.json").write_text("{half of a fi")
    (tmp_path / "precast_v0_2_1.json").write_text('{"precast_cache_hits": [[["disk"], 1]]}')
    registry = prometheus_client.CollectorRegistry()
    collector = PrometheusCollector(precast.MetricsCollector(), folder=tmp_path)
    collector.register(registry)
    assert registry.get_sample_value("precast_cache_hits_total", {"tier": "disk"}) == 2
    collector.close()


def test_names_and_labels_are_as_prometheus_wants_them() -> None:
    """
    Base units at the end of the name; labels of which there are few values.
    """
    for metric in METRICS:
        assert metric.name.startswith("precast_")
        assert not metric.name.endswith("_total")
        assert set(metric.labels) <= {
            *("model", "tier", "compiler", "code"),
            *("event", "kind", "start", "state", "outcome", "gpu"),
        }
        if metric.kind == "histogram":
            assert metric.name.endswith(("_seconds", "_bytes", "_ratio")), metric.name
    families = {metric.name: metric for metric in METRICS}
    assert len(families) == len(METRICS)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"precast\[prometheus\]"):
        PrometheusCollector(precast.MetricsCollector()).register()
