from __future__ import annotations

from precast.events import CacheMiss, PieceCompiled, PieceLoaded, PieceTimed
from precast.monitoring.performance import PerformanceMonitor


def test_figures_are_kept_per_piece() -> None:
    monitor = PerformanceMonitor()
    rows = ({"sizes": {"s0": 2}, "compiled_s": 1.0, "eager_s": 2.0},)
    monitor(PieceCompiled("layer", "k", "aot_inductor", 12.0, 1000, 1))
    monitor(PieceTimed("layer", "k", rows))
    monitor(PieceLoaded("head", "k", "disk", 0.001, 3.0))
    monitor(CacheMiss("k", "new"))
    assert monitor.pieces() == {
        "layer": {
            "compile_seconds": 12.0,
            "compiler": "aot_inductor",
            "timing": [dict(rows[0])],
            "speedup": 2.0,
        },
        "head": {"load_seconds": 0.001, "tier": "disk"},
    }
