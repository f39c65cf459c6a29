"""What became of a piece: compiled, found, still to be compiled, or eager with the reason why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precast.compilers.eager import eager_call
from precast.errors import Reason

if TYPE_CHECKING:
    from precast.compilers.interface import CompiledCallable
    from precast.graph.piece import Piece


class PieceResult:
    """What became of one unique piece.

    `call` runs it. `record` is what an assembly keeps to load it again, None where nothing
    can be kept (compiled in process). `reason` says why it is not compiled, where it is not, or
    why it was compiled in `num_parts`. `passes` has a row for each pass that ran on it.
    """

    __slots__ = (
        "call",
        "compiler",
        "from_cache",
        "key",
        "num_eager_parts",
        "num_parts",
        "passes",
        "ranges",
        "reason",
        "record",
        "seconds",
        "timing",
    )

    def __init__(
        self,
        *,
        call: CompiledCallable,
        key: str,
        compiler: str,
        record: dict[str, Any] | None,
        seconds: float = 0.0,
        from_cache: bool = False,
        reason: Reason | None = None,
        ranges: Mapping[str, Sequence[int | None]] | None = None,
        num_parts: int = 1,
        num_eager_parts: int = 0,
        passes: Sequence[Mapping[str, Any]] = (),
        timing: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.num_parts = num_parts
        self.num_eager_parts = num_eager_parts
        self.call = call
        self.key = key
        self.compiler = compiler
        self.record = record
        self.seconds = seconds
        self.from_cache = from_cache
        self.reason = reason
        self.ranges = ranges or {}
        self.passes = passes
        self.timing = timing


def eager_result(
    piece: Piece, reason: Reason | None, failure: Mapping[str, Any] | None = None
) -> PieceResult:
    """Return a piece that runs eager.

    Args:
        piece: The piece.
        reason: Why; None: nothing was to be compiled.
        failure: As it is remembered, where it is.
    """
    return PieceResult(
        call=eager_call(piece),
        key="",
        compiler="eager",
        record={
            "eager": piece.to_json(),
            "reason": None if reason is None else reason.as_dict(),
            "failure": failure,
        },
        reason=reason,
        num_eager_parts=1,
    )


def pending_result(piece: Piece) -> PieceResult:
    """Return what stands for a piece that is still to be compiled; it is never kept."""
    return PieceResult(
        call=eager_call(piece),
        key="",
        compiler="eager",
        record=None,
        reason=Reason(
            "compile-pending",
            "it is being compiled; it runs eager until then",
            "Nothing to do; precast.wait(model) waits for it",
        ),
    )


def unless_slower(piece: Piece, result: PieceResult) -> PieceResult:
    """Return the compiled piece, or the eager one where that was found to be faster."""
    from precast.compilers.timing import how_much_slower

    slower = how_much_slower(result.timing)
    if slower is None:
        return result
    reason = Reason(
        "not-worth-it",
        f"compiled by {result.compiler} it takes {slower}; the piece runs eager",
        "Nothing to do; keep_slower=True runs it all the same",
    )
    eager = eager_result(piece, reason)
    eager.record["timing"] = eager.timing = result.timing  # type: ignore[index]
    return eager
