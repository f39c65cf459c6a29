"""A piece that the cache does not have, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from precast.errors import Reason
from precast.events import Emit, PassRan, PieceMissed

if TYPE_CHECKING:
    from precast.compilers.chosen import ChosenCompilers
    from precast.graph.piece import Piece


class Miss:
    """A piece to compile: the `number` by which it was asked for, and its `name` for reports.

    `work` names the work of compiling it, for leases and remembered failures.
    """

    def __init__(self, number: int, piece: Piece, name: str, compilers: ChosenCompilers) -> None:
        self.number = number
        self.piece = piece
        self.name = name
        self.work = compilers.work_name(piece)
        self._compilers = compilers

    def report(self, emit: Emit) -> None:
        """Tell that the cache does not have it, by the key of the first compiler."""
        for compiler in map(self._compilers.make, self._compilers.names):
            if compiler.is_saveable:  # Of the others nothing is ever stored.
                key = self._compilers.compute_hash_keys(self.piece, compiler)
                emit(PieceMissed(self.name, key.digest, key.parts))
                return


def report_passes(rows: Iterable[Mapping[str, Any]], name: str, key: str, emit: Emit) -> None:
    """Tell what each pass did to a piece."""
    for row in rows:
        failure = row.get("failure")
        reason = None if failure is None else Reason(**failure)
        emit(PassRan(name, key, row["name"], row["stage"], row["matches"], row["seconds"], reason))
