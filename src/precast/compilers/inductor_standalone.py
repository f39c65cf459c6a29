"""Inductor's own portable artifact: compiles faster than ahead of time, loads in seconds.

Loading imports Inductor, and on a CPU compiles C++ again where Inductor's cache is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precast.compilers.interface import CompiledCallable, CompiledPiece

if TYPE_CHECKING:
    from precast.graph.piece import Piece

ARTIFACT = "artifact.bin"


class InductorStandaloneAdaptor:
    """Compiles pieces with `torch._inductor.standalone_compile`."""

    name = "inductor_standalone"
    is_saveable = True
    unpickles = True

    def identity(self) -> Mapping[str, str]:
        """Return the adaptor's version, to be raised with every change of options or format."""
        return {"compiler": "inductor_standalone", "adaptor": "1"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        """Compile into one file of bytes."""
        from precast.compilers.tracing import TracedPiece
        from precast.graph.read import as_captured
        from precast.torch_private import prepare_inductor, standalone_compile

        prepare_inductor()
        traced = TracedPiece(piece, self.name)
        path = str(Path(directory) / ARTIFACT)
        with as_captured(piece):
            standalone_compile(traced.graph, traced.mode, traced.inputs, path)
        details = {"device": piece.device, "entry": ARTIFACT, "num_outputs": len(piece.outputs)}
        return CompiledPiece({ARTIFACT: path}, {**details, **traced.sizes()})

    def load(
        self,
        details: Mapping[str, Any],
        files: Mapping[str, str],
        piece: Piece | None,
    ) -> CompiledCallable:
        """Unpickle the artifact: the bytes must have been checked before."""
        from precast.torch_private import load_standalone

        return load_standalone(files[details["entry"]])
