"""Precast: compile PyTorch models once, start them everywhere in milliseconds.

The public names; everything else may change. Importing this package is instant and imports
neither torch nor any part of Precast: a name is loaded when it is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # As in `values.py`: not from `typing`, which is dear to import.
if TYPE_CHECKING:
    from precast.api import compile, release, save_bundle, save_report, status, wait
    from precast.config import CompilationConfig
    from precast.errors import PrecastError
    from precast.monitoring.counter import CompilationCounter
    from precast.monitoring.metrics import MetricsCollector
    from precast.monitoring.performance import PerformanceMonitor
    from precast.passes.interface import InductorPass
    from precast.passes.patterns import pattern_pass
    from precast.split.at_layers import SplitAtLayers
    from precast.split.at_ops import SplitAtOps
    from precast.split.by_compute import SplitByCompute
    from precast.split.by_memory import SplitByMemory

__version__ = "0.1.0"

__all__ = [
    "CompilationConfig",
    "CompilationCounter",
    "InductorPass",
    "MetricsCollector",
    "PerformanceMonitor",
    "PrecastError",
    "SplitAtLayers",
    "SplitAtOps",
    "SplitByCompute",
    "SplitByMemory",
    "compile",
    "pattern_pass",
    "release",
    "save_bundle",
    "save_report",
    "status",
    "wait",
]

_HOME = {
    "CompilationConfig": "precast.config",
    "CompilationCounter": "precast.monitoring.counter",
    "InductorPass": "precast.passes.interface",
    "MetricsCollector": "precast.monitoring.metrics",
    "PerformanceMonitor": "precast.monitoring.performance",
    "PrecastError": "precast.errors",
    "SplitAtLayers": "precast.split.at_layers",
    "SplitAtOps": "precast.split.at_ops",
    "SplitByCompute": "precast.split.by_compute",
    "SplitByMemory": "precast.split.by_memory",
    "compile": "precast.api",
    "pattern_pass": "precast.passes.patterns",
    "release": "precast.api",
    "save_bundle": "precast.api",
    "save_report": "precast.api",
    "status": "precast.api",
    "wait": "precast.api",
}


def __getattr__(name: str) -> object:
    """Load a public name at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'precast' has no attribute {name!r}")
    from importlib import import_module

    # Making classes and functions sets the collector off; with torch's objects alive one full
    # collection takes longer than all of a warm start. By name: everything imports this module,
    # which may import nothing of what is below it.
    with import_module("precast.runtime.collector").no_collection():
        value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *_HOME])
