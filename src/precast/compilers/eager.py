"""No compiler: the piece's text, run as Python. What everything else falls back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from precast.compilers.interface import CompiledCallable, CompiledPiece
from precast.errors import CompileError

if TYPE_CHECKING:
    from precast.graph.piece import Piece


class EagerAdaptor:
    """Runs pieces as they are written."""

    name = "eager"
    is_saveable = True
    unpickles = False

    def identity(self) -> Mapping[str, str]:
        """Return the adaptor's version; there are no options."""
        return {"compiler": "eager", "adaptor": "1"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        """Keep the text, in the details: there are no files."""
        return CompiledPiece({}, {"piece": piece.to_json()})

    def load(
        self,
        details: Mapping[str, Any],
        files: Mapping[str, str],
        piece: Piece | None,
    ) -> CompiledCallable:
        """Return the text as a function."""
        from precast.graph.piece import Piece as PieceValue

        if piece is None and "piece" not in details:
            raise CompileError("?", self.name, "neither the piece nor its text is at hand")
        return eager_call(piece or PieceValue.from_json(details["piece"]))


def eager_call(piece: Piece) -> CompiledCallable:
    """Return a piece's own text as a callable of the boxed convention."""
    from precast.graph.read import eager_function

    function = eager_function(piece)
    return lambda inputs: function(*inputs)
