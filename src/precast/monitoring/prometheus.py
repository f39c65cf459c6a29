"""`PrometheusCollector`: the figures of a `MetricsCollector` for Prometheus.

Needs `prometheus_client`, by the extra `prometheus`.
Reads at each scrape what the collector knows; it counts nothing itself and serves no endpoint.

With several processes behind one endpoint (gunicorn, say) whichever is asked answers for all. As
`prometheus_client` wants it, `PROMETHEUS_MULTIPROC_DIR` then names a folder that is emptied before
the server starts; each process writes its figures there every few seconds, and at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from precast.monitoring.system import started_at

if TYPE_CHECKING:
    from precast.monitoring.metrics import MetricsCollector

#: Of the files' names. Other buckets, or another form, need another number: then nobody reads them.
_PREFIX = "precast_v1"

#: Between two writes of one process.
WRITTEN_EVERY_S = 5.0

#: A value of a counter or a gauge, or a `Distribution`'s snapshot, under the values of its labels.
Rows = Iterator[tuple[tuple[str, ...], Any]]


class Metric(NamedTuple):
    """What one family of series is.

    `merge` says what is made of the values of several processes: `sum`, `max`, or `own`, that of
    the process which is asked. Gauges of processes that are gone do not count.
    """

    name: str
    kind: str
    text: str
    rows: Callable[[Mapping[str, Any]], Rows]
    labels: tuple[str, ...] = ()
    merge: str = "sum"


def _at(*path: str) -> Callable[[Mapping[str, Any]], Rows]:
    """Return what reads one value, if it is known."""

    def rows(snapshot: Mapping[str, Any]) -> Rows:
        value: Any = snapshot
        for step in path:
            value = value[step]
        if value is not None:
            yield (), value

    return rows


def _each(*path: str) -> Callable[[Mapping[str, Any]], Rows]:
    """Return what reads a mapping; its keys are the values of the label."""

    def rows(snapshot: Mapping[str, Any]) -> Rows:
        value: Any = snapshot
        for step in path:
            value = value[step]
        for name, amount in value.items():
            yield (name,), amount

    return rows


def _tiers(figure: str) -> Callable[[Mapping[str, Any]], Rows]:
    def rows(snapshot: Mapping[str, Any]) -> Rows:
        for name, tier in snapshot["cache"]["tiers"].items():
            yield (name,), tier[figure]

    return rows


def _tier_failures(snapshot: Mapping[str, Any]) -> Rows:
    for name, tier in snapshot["cache"]["tiers"].items():
        for code, count in tier["failures_by_code"].items():
            yield (name, code), count


def _starts(snapshot: Mapping[str, Any]) -> Rows:
    for kind in ("warm", "cold"):
        yield (kind,), snapshot["starts"][kind]


def _models(snapshot: Mapping[str, Any]) -> Rows:
    for model, pieces in snapshot["models"].items():
        for state, count in pieces.items():
            yield (model, state), count


def _fallbacks(snapshot: Mapping[str, Any]) -> Rows:
    for row in snapshot["fallbacks"]:
        yield (row["model"], row["code"]), row["count"]


def _calls(snapshot: Mapping[str, Any]) -> Rows:
    for model, calls in snapshot["calls"].items():
        yield (model,), calls["num_calls"]


def _call_seconds(snapshot: Mapping[str, Any]) -> Rows:
    for model, calls in snapshot["calls"].items():
        yield (model,), calls


def _events(snapshot: Mapping[str, Any]) -> Rows:
    for name, count in snapshot["counts"].items():
        yield (name.removeprefix("num_"),), count


def _gpus(figure: str) -> Callable[[Mapping[str, Any]], Rows]:
    def rows(snapshot: Mapping[str, Any]) -> Rows:
        for gpu in snapshot["machine"]["gpus"]:
            if gpu[figure] is not None:
                yield (str(gpu["index"]),), gpu[figure]

    return rows


#: All that is exported. `docs/metrics.md` lists it, `docs/grafana/precast.json` shows it.
METRICS = (
    Metric("precast_events", "counter", "Events, by the counts of CompilationCounter.", _events,
           ("event",)),
    Metric("precast_compiles", "counter", "Pieces compiled.",
           _each("compile", "compiled_by_compiler"), ("compiler",)),
    Metric("precast_compile_failures", "counter", "Compile jobs that failed, by reason.",
           _each("compile", "failed_by_code"), ("code",)),
    Metric("precast_compile_seconds", "histogram", "Time to compile a piece.",
           _at("compile", "seconds")),
    Metric("precast_capture_seconds", "histogram", "Time to capture a model.",
           _at("compile", "capture_seconds")),
    Metric("precast_artifact_size_bytes", "histogram", "Size of a compiled piece.",
           _at("compile", "artifact_bytes")),
    Metric("precast_compile_cpu_seconds", "counter", "Processor time of compile jobs.",
           _at("compile", "cpu_seconds")),
    Metric("precast_compile_written_bytes", "counter", "Bytes that compile jobs wrote.",
           _at("compile", "written_bytes")),
    Metric("precast_compile_peak_memory_bytes", "gauge", "Most memory that a compile job held.",
           _at("compile", "peak_bytes"), merge="max"),
    Metric("precast_compile_waits", "counter", "Waits for another process that compiles the same.",
           _each("compile", "waits"), ("outcome",)),
    Metric("precast_compile_wait_seconds", "counter", "Time of these waits.",
           _at("compile", "waited_seconds")),
    Metric("precast_start_seconds", "histogram", "Time until a model was ready.", _starts,
           ("start",)),
    Metric("precast_saved_seconds", "counter", "Compile time that the cache saved.",
           _at("starts", "seconds_saved")),
    Metric("precast_model_pieces", "gauge", "Pieces of a model, by how they run.", _models,
           ("model", "state"), "max"),
    Metric("precast_fallbacks", "counter", "What runs eager from then on, by reason.", _fallbacks,
           ("model", "code")),
    Metric("precast_piece_speedup_ratio", "histogram", "Eager time over compiled time of a piece.",
           _at("speedup")),
    Metric("precast_cache_hits", "counter", "Lookups that a tier answered.", _tiers("hits"),
           ("tier",)),
    Metric("precast_cache_misses", "counter", "Lookups that no tier answered.",
           _each("cache", "misses"), ("kind",)),
    Metric("precast_cache_load_seconds", "histogram", "Time of one read from a tier.",
           _tiers("load_seconds"), ("tier",)),
    Metric("precast_cache_read_bytes", "counter", "Bytes read from a tier.", _tiers("read_bytes"),
           ("tier",)),
    Metric("precast_cache_write_seconds", "histogram", "Time to publish to a tier.",
           _tiers("write_seconds"), ("tier",)),
    Metric("precast_cache_written_bytes", "counter", "Bytes written to a tier.",
           _tiers("written_bytes"), ("tier",)),
    Metric("precast_cache_tier_failures", "counter", "Operations that a tier failed at.",
           _tier_failures, ("tier", "code")),
    Metric("precast_cache_tier_skips", "counter", "Operations for which a tier was not asked.",
           _tiers("skips"), ("tier",)),
    Metric("precast_cache_network_read_bytes", "counter", "Bytes read from tiers over a network.",
           _at("cache", "network_read_bytes")),
    Metric("precast_cache_network_written_bytes", "counter",
           "Bytes written to tiers over a network.", _at("cache", "network_written_bytes")),
    Metric("precast_cache_stored_bytes", "gauge", "Size of the cache on this machine's disk.",
           _at("machine", "stored_bytes"), merge="own"),
    Metric("precast_piece_load_seconds", "histogram", "Time to open the code of a piece.",
           _at("cache", "piece_load_seconds")),
    Metric("precast_calls", "counter", "Calls of watched models.", _calls, ("model",)),
    Metric("precast_call_seconds", "histogram", "Latency of calls, one in so many timed.",
           _call_seconds, ("model",)),
    Metric("precast_process_cpu_seconds", "counter", "Processor time.",
           _at("process", "cpu_seconds")),
    Metric("precast_process_children_cpu_seconds", "counter", "Processor time of ended children.",
           _at("process", "children_cpu_seconds")),
    Metric("precast_process_resident_memory_bytes", "gauge", "Memory held.",
           _at("process", "resident_bytes")),
    Metric("precast_process_peak_resident_memory_bytes", "gauge", "Most memory one process held.",
           _at("process", "peak_resident_bytes"), merge="max"),
    Metric("precast_process_disk_read_bytes", "counter", "Bytes read from disks.",
           _at("process", "disk_read_bytes")),
    Metric("precast_process_disk_written_bytes", "counter", "Bytes written to disks.",
           _at("process", "disk_written_bytes")),
    Metric("precast_machine_network_received_bytes", "counter",
           "Bytes that the machine or container received.",
           _at("process", "network_received_bytes"), merge="own"),
    Metric("precast_machine_network_sent_bytes", "counter",
           "Bytes that the machine or container sent.",
           _at("process", "network_sent_bytes"), merge="own"),
    Metric("precast_device_memory_bytes", "gauge", "Memory that torch allocated on GPUs.",
           _at("process", "device_bytes")),
    Metric("precast_device_peak_memory_bytes", "gauge", "Most that a process allocated on a GPU.",
           _at("process", "peak_device_bytes"), merge="max"),
    Metric("precast_gpu_utilization_ratio", "gauge", "Share of time in which a GPU was busy.",
           _gpus("utilization"), ("gpu",), "own"),
    Metric("precast_gpu_memory_used_bytes", "gauge", "Memory of a GPU in use, by anybody.",
           _gpus("memory_used_bytes"), ("gpu",), "own"),
    Metric("precast_gpu_memory_total_bytes", "gauge", "Memory of a GPU.",
           _gpus("memory_total_bytes"), ("gpu",), "own"),
)  # fmt: skip


class PrometheusCollector:
    """What `prometheus_client` asks at each scrape.

        metrics = precast.MetricsCollector()
        model = precast.compile(model, listeners=[metrics])
        PrometheusCollector(metrics).register()      # In the default registry, or in another.
        prometheus_client.start_http_server(9464)

    With `PROMETHEUS_MULTIPROC_DIR` set, make one in each process, or in one that forks the others;
    what answers scrapes has one registered beside `prometheus_client`'s `MultiProcessCollector`.
    """

    def __init__(
        self,
        metrics: MetricsCollector,
        folder: str | os.PathLike[str] | None = None,
        written_every_s: float = WRITTEN_EVERY_S,
    ) -> None:
        """Answer for a collector.

        Args:
            metrics: Whose figures they are.
            folder: Through which processes tell each other; None: `PROMETHEUS_MULTIPROC_DIR`,
                and without that this process speaks for itself alone.
            written_every_s: Between two writes there.
        """
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR") if folder is None else folder
        self._metrics = metrics
        self._folder = _Folder(Path(folder)) if folder else None
        self._written_every_s = written_every_s
        self._ended: threading.Event | None = None
        if self._folder is not None:
            self._write_on()
            atexit.register(self.close)
            # A worker of a server that loads first and forks then has no thread of its parent's.
            known = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _begin_in_fork(known()))

    def register(self, registry: Any = None) -> None:
        """Register it; in `prometheus_client.REGISTRY` if no other is given.

        Raises:
            ImportError: `prometheus_client` is not installed.
        """
        if registry is None:
            registry = _core().REGISTRY
        registry.register(self)

    def describe(self) -> Iterator[Any]:
        """Name what `collect` gives, so that registering it looks nothing up."""
        return _families({})

    def collect(self) -> Iterator[Any]:
        """Return all families of this process, or of all that share the folder."""
        series = _series(self._metrics.snapshot())
        if self._folder is not None:
            for found, is_alive in self._folder.others():
                _merge(series, found, is_alive)
        return _families(series)

    def close(self) -> None:
        """Write a last time. What was written stays: it has happened."""
        atexit.unregister(self.close)
        if self._ended is not None:
            self._ended.set()
            self._ended = None
            self.write()

    def _write_on(self) -> None:
        """Write now and then from a thread, until `close`."""
        ended = self._ended = threading.Event()

        def run() -> None:
            while not ended.wait(self._written_every_s):
                self.write()

        threading.Thread(target=run, name="precast-metrics", daemon=True).start()

    def write(self) -> None:
        """Tell the other processes what this one knows."""
        if self._folder is not None:
            series = _series(self._metrics.process_snapshot() | {"machine": _UNKNOWN_MACHINE})
            self._folder.write(series)


def _begin_in_fork(collector: PrometheusCollector | None) -> None:
    if collector is not None and collector._ended is not None:
        collector._write_on()


_UNKNOWN_MACHINE: dict[str, Any] = {"gpus": [], "stored_bytes": None}

#: By metric the values by their labels.
Series = dict[str, dict[tuple[str, ...], Any]]


def _series(snapshot: Mapping[str, Any]) -> Series:
    return {
        metric.name: {
            labels: _plain(value) if metric.kind == "histogram" else value
            for labels, value in metric.rows(snapshot)
        }
        for metric in METRICS
    }


def _plain(distribution: Mapping[str, Any]) -> dict[str, Any]:
    return {"buckets": distribution["buckets"], "sum": distribution["sum"]}


def _merge(series: Series, other: Series, is_alive: bool) -> None:
    for metric in METRICS:
        if metric.merge == "own" or (metric.kind == "gauge" and not is_alive):
            continue
        ours = series[metric.name]
        for labels, value in other.get(metric.name, {}).items():
            if labels not in ours:
                ours[labels] = value
            elif metric.kind == "histogram":
                ours[labels] = _added(ours[labels], value)
            else:
                ours[labels] = (
                    max(ours[labels], value) if metric.merge == "max" else ours[labels] + value
                )


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(one["buckets"], other["buckets"], strict=True)
    return {
        "buckets": [[bound, count + more] for (bound, count), (_, more) in pairs],
        "sum": one["sum"] + other["sum"],
    }


def _families(series: Series) -> Iterator[Any]:
    core = _core()
    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    for metric in METRICS:
        family = kinds[metric.kind](metric.name, metric.text, labels=metric.labels)
        for labels, value in series.get(metric.name, {}).items():
            if metric.kind == "histogram":
                buckets = [
                    ("+Inf" if bound is None else repr(float(bound)), count)
                    for bound, count in value["buckets"]
                ]
                family.add_metric(labels, buckets, value["sum"])
            else:
                family.add_metric(labels, value)
        yield family


def _core() -> Any:
    try:
        from prometheus_client import core
    except ImportError as error:
        raise ImportError(
            "Prometheus needs the package prometheus-client: pip install 'precast[prometheus]'"
        ) from error
    return core


class _Folder:
    """The files through which processes of one server tell each other their figures.

    One for each process: `precast_v1_<pid>_<start of the process>.json`, replaced as a whole. That
    of a process which is gone stays, since its counts have happened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, series: Series) -> None:
        plain = {
            name: [[list(labels), value] for labels, value in rows.items()]
            for name, rows in series.items()
        }
        place = self._path / self._own_name()
        # Named by thread too: the end of a program may meet its writer.
        beside = place.with_suffix(f".{threading.get_ident()}.tmp")
        with contextlib.suppress(OSError):  # Metrics stop nobody; the next write may succeed.
            self._path.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(plain))
            beside.replace(place)

    def others(self) -> Iterator[tuple[Series, bool]]:
        """Iterate over what other processes wrote, and whether they are still there."""
        own = self._own_name()
        for place in sorted(self._path.glob(f"{_PREFIX}_*_*.json")):
            if place.name == own:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):
                plain = json.loads(place.read_text())
                series = {
                    name: {tuple(labels): value for labels, value in rows}
                    for name, rows in plain.items()
                }
                pid, started = place.stem.split("_")[-2:]
                yield series, str(started_at(int(pid))) == started

    @staticmethod
    def _own_name() -> str:
        return f"{_PREFIX}_{os.getpid()}_{started_at(os.getpid())}.json"
