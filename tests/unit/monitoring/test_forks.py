"""A process that is forked while another thread is inside of a listener is not stuck there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast import events
from precast.errors import Reason
from precast.monitoring.counter import CompilationCounter
from precast.monitoring.log import LogListener
from precast.monitoring.metrics import MetricsCollector
from precast.monitoring.opentelemetry import OpenTelemetryListener
from precast.monitoring.performance import PerformanceMonitor
from precast.monitoring.progress import ProgressListener
from precast.monitoring.stats import StatsListener

STEPS = (
    events.CacheHit("k", "disk", 1.0, 100),
    events.PieceFailed("layer", "k", "eager", Reason("compile-failed", "refused", "Mend it")),
    events.ModelReady("Model", 1.5, 2, 2, 2, 0, 0, 3.0, warm=False),
)
LISTENERS: dict[str, Callable[[Path], Any]] = {
    "counter": lambda folder: CompilationCounter(),
    "log": lambda folder: LogListener(),
    "metrics": MetricsCollector,
    "opentelemetry": lambda folder: OpenTelemetryListener(),
    "performance": lambda folder: PerformanceMonitor(),
    "progress": lambda folder: ProgressListener(),
    "stats": lambda folder: StatsListener(str(folder / "stats"), lambda misses: None),
}


@pytest.mark.parametrize("name", LISTENERS)
def test_a_fork_hears_on_though_a_thread_of_its_parent_was_listening(
    name: str, tmp_path: Path
) -> None:
    listener = LISTENERS[name](tmp_path)
    holder = listener._tally if name == "stats" else listener
    with holder._lock:  # As that thread would.
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)  # What is stuck ends by this.
            for step in STEPS:
                listener(step)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
