"""Inductor's own portable artifact: compiles faster than ahead of time, loads in seconds.

Loading imports Inductor, and on a CPU compiles C++ again where Inductor's cache is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precast.compilers.interface import CompiledCallable, CompiledPiece
from precast.errors import CompileError

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
        plain = {"compiler": "inductor_standalone", "adaptor": "1"}
        number = _current_gpu()
        return {**plain, "gpu": str(number)} if number else plain

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
        """Unpickle the artifact: the bytes must have been checked before.

        Raises:
            CompileError: The model is on another GPU than the first: Inductor's code names its
                device, and a worker's only one is its first.
        """
        from precast.torch_private import load_standalone

        number = _current_gpu()
        if details["device"] == "cuda" and number:
            raise CompileError("a piece", self.name, f"its code is for cuda:0, not cuda:{number}")
        return load_standalone(files[details["entry"]])


def _current_gpu() -> int:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0
