"""Inductor in this process, with Inductor's own cache: nothing of ours is kept.

For what the other compilers cannot save, and for comparing with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from precast.compilers.interface import CompiledCallable, CompiledPiece
from precast.errors import CompileError

if TYPE_CHECKING:
    from precast.graph.piece import Piece


class InductorAdaptor:
    """Compiles pieces with `compile_fx`."""

    name = "inductor"
    is_saveable = False
    unpickles = False

    def identity(self) -> Mapping[str, str]:
        """Return the adaptor's version, to be raised with every change of options."""
        return {"compiler": "inductor", "adaptor": "1"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        """Compile once, which fills Inductor's cache, and learn for which sizes it holds."""
        _, sizes = self._compile(piece)
        return CompiledPiece({}, {"device": piece.device, **sizes})

    def load(
        self,
        details: Mapping[str, Any],
        files: Mapping[str, str],
        piece: Piece | None,
    ) -> CompiledCallable:
        """Compile in this process, with what Inductor's cache has."""
        if piece is None:
            raise CompileError("?", self.name, "loading compiles anew, which needs the piece")
        return self._compile(piece)[0]

    def _compile(self, piece: Piece) -> tuple[CompiledCallable, dict[str, Any]]:
        from precast.compilers.tracing import TracedPiece
        from precast.graph.read import as_captured
        from precast.torch_private import inductor_in_process, prepare_inductor

        prepare_inductor()
        traced = TracedPiece(piece, self.name)
        with as_captured(piece):
            run = inductor_in_process(traced.graph, traced.mode, traced.inputs)
        return run, traced.sizes()
