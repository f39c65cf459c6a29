"""`PerformanceMonitor`: what compiling each piece cost and gains, as a fold over events."""

from __future__ import annotations

import threading

from precast import events
from precast.events import Event

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import Any


class PerformanceMonitor:
    """A listener that keeps figures per piece; give it to `precast.compile` as one of `listeners`.

        monitor = PerformanceMonitor()
        precast.compile(model, listeners=[monitor])
        monitor.pieces()["layers.0"]["speedup"]

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: dict[str, dict[str, Any]] = {}

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case events.PieceTimed():
                best = min(event.timing, key=lambda row: row["compiled_s"] / row["eager_s"])
                self._note(
                    event.piece,
                    timing=[dict(row) for row in event.timing],
                    speedup=best["eager_s"] / best["compiled_s"],
                )
            case events.PieceCompiled():
                self._note(event.piece, compile_seconds=event.seconds, compiler=event.compiler)
            case events.PieceLoaded():
                self._note(event.piece, load_seconds=event.seconds, tier=event.tier)
            case events.PieceFailed():
                self._note(event.piece, reason=event.reason.as_dict())
            case _:
                pass

    def _note(self, piece: str, **figures: Any) -> None:
        with self._lock:
            self._pieces.setdefault(piece, {}).update(figures)

    def pieces(self) -> dict[str, dict[str, Any]]:
        """Return the figures so far, by the piece's name.

        `timing` is a list of sizes with the seconds of a compiled and of an eager call, `speedup`
        eager's over compiled code's at the sizes where that is most.
        """
        with self._lock:
            return {name: dict(figures) for name, figures in self._pieces.items()}
