"""What the Inductor adaptors share: a piece as graph and fake inputs, and its sizes afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from precast.errors import CompileError

if TYPE_CHECKING:
    from precast.graph.piece import Piece


class TracedPiece:
    """A piece ready for Inductor: `graph`, `mode` and `inputs`; afterwards, `sizes()`."""

    def __init__(self, piece: Piece, compiler: str) -> None:
        from precast.graph.inputs import fake_inputs
        from precast.graph.read import read_piece

        self._piece = piece
        self._compiler = compiler
        self.graph: Any = read_piece(piece)
        self.mode, self.inputs, self.symbols = fake_inputs(piece)

    def record_values(self) -> None:
        """Note each node's fake value at it, as capture does. To be called within `as_captured`."""
        from precast.torch_private import record_values

        record_values(self.graph, self.mode, self.inputs)

    def sizes(self) -> dict[str, Any]:
        """Return `ranges` and `unproven` as `CompiledPiece.details` wants them.

        Raises:
            CompileError: Compiling has specialised the code in a way that no range can say.
        """
        from precast.torch_private import SizesSpecializedError, narrowed_ranges

        asked = {name: (r.low, r.high) for name, r in self._piece.symbols.items()}
        try:
            ranges, unproven = narrowed_ranges(self.mode, self.symbols, asked)
        except SizesSpecializedError as error:
            raise CompileError(piece_name(self._piece), self._compiler, str(error)) from error
        narrowed = {n: list(bounds) for n, bounds in ranges.items() if bounds != asked[n]}
        return {"ranges": narrowed, "unproven": unproven}


def piece_name(piece: Piece) -> str:
    """Return a short name for messages: the start of the text's digest."""
    from hashlib import sha256

    return sha256(piece.text.encode()).hexdigest()[:12]
