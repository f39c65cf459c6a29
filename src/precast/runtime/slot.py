"""The code that each piece runs now; the only place where running code is replaced.

The execution code calls a list, `pieces[3]([h, w])`. Replacing an entry of that list is one
atomic step in CPython: a thread inside of a call goes on with the entry that it took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from precast.events import ModelReady

PieceCallable = Callable[[list[Any]], Sequence[Any]]


class Slot:
    """What is known of one slot: its piece, what runs there, and why it is not compiled code.

    `passes` are rows of JSON data that say what each pass did. `timing` is how long compiled and
    eager code took when the piece was verified, where known.
    """

    __slots__ = ("compiler", "passes", "piece", "reason", "seconds_saved", "tier", "timing")

    def __init__(
        self,
        piece: str,
        *,
        compiler: str,
        tier: str | None = None,
        reason: Any = None,
        seconds_saved: float = 0.0,
        passes: Sequence[Any] = (),
        timing: Any = None,
    ) -> None:
        self.piece = piece
        self.compiler = compiler
        self.tier = tier
        self.reason = reason
        self.seconds_saved = seconds_saved
        self.passes = passes
        self.timing = timing


class SlotTable:
    """The slots of one assembly. `callables` is the very list that the execution code calls."""

    __slots__ = ("callables", "slots")

    def __init__(self) -> None:
        self.callables: list[PieceCallable | None] = []
        self.slots: list[Slot | None] = []

    def add(self, call: PieceCallable | None, slot: Slot | None) -> None:
        """Append a slot; None keeps the place of a sub-graph that was inlined."""
        self.callables.append(call)
        self.slots.append(slot)

    def swap(self, index: int, call: PieceCallable, slot: Slot) -> None:
        """Replace what one slot runs, from the next call on."""
        self.slots[index] = slot
        self.callables[index] = call

    def ready(
        self,
        model: str,
        seconds: float,
        *,
        unique_pieces: int,
        from_cache: int,
        seconds_saved: float,
        warm: bool,
    ) -> ModelReady:
        """Return the event that a model is served by these slots from now on."""
        slots = [slot for slot in self.slots if slot is not None]
        num_eager = sum(slot.compiler == "eager" for slot in slots)
        return ModelReady(
            model=model,
            seconds=seconds,
            pieces=len(slots),
            unique_pieces=unique_pieces,
            compiled=len(slots) - num_eager,
            eager=num_eager,
            from_cache=from_cache,
            seconds_saved=seconds_saved,
            warm=warm,
        )
