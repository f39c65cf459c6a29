"""Inductor ahead of time: a library for each piece, opened by torch's C++ runner in a millisecond.

Weights are ordinary inputs, so that equal layers share one library. Loading imports no compiler.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precast.compilers.interface import CompiledCallable, CompiledPiece

if TYPE_CHECKING:
    from precast.graph.piece import Piece

#: The library's name among the files; operators without a C shim are listed in `model.json`.
LIBRARY = "model.so"


class AOTInductorAdaptor:
    """Compiles pieces with AOTInductor."""

    name = "aot_inductor"
    is_saveable = True
    unpickles = False

    def identity(self) -> Mapping[str, str]:
        """Return the adaptor's version, to be raised with every change of options or format."""
        return {"compiler": "aot_inductor", "adaptor": "1", "wrapper": "O1", "entry": "unlocked, 3"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        """Compile into `directory`: 4 to 6 s on a CPU, mostly g++."""
        import torch

        from precast.compilers.sources import aoti_sources
        from precast.compilers.tracing import TracedPiece
        from precast.compilers.wrapper_build import WrapperBuild
        from precast.graph.read import as_captured
        from precast.torch_private import (
            aoti_compile,
            aoti_interface,
            compile_commands_through,
            prefer_single_threaded_entry,
            prepare_inductor,
        )

        prepare_inductor()
        traced = TracedPiece(piece, self.name)
        build = Path(directory) / "build"
        build.mkdir()
        interface, folder = aoti_interface()
        wrappers = WrapperBuild(interface, folder / "precast-wrapper", torch.__version__)
        with as_captured(piece), compile_commands_through(wrappers.run):
            built = aoti_compile(traced.graph, traced.mode, traced.inputs, str(build))
        files: dict[str, str] = {}
        for path in map(Path, built):
            # The runner looks for the list of operators beside the library, under its name.
            name = {".so": LIBRARY, ".json": "model.json"}.get(path.suffix, path.name)
            files[name] = str(path.replace(Path(directory) / name))
        source = aoti_sources(build)
        shutil.rmtree(build)
        prefer_single_threaded_entry(files[LIBRARY])
        _forget_path(Path(files[LIBRARY]), str(build))
        details = {
            "device": piece.device,
            "entry": LIBRARY,
            "num_outputs": len(piece.outputs),
            "source": source,
            **traced.sizes(),
        }
        return CompiledPiece(files, details)

    def load(
        self,
        details: Mapping[str, Any],
        files: Mapping[str, str],
        piece: Piece | None,
    ) -> CompiledCallable:
        """Open the library. One millisecond; the bytes must have been checked before."""
        from precast.torch_private import aoti_runner

        library = files[details["entry"]]
        return aoti_runner(library, details["device"], str(Path(library).parent))


def _forget_path(library: Path, directory: str) -> None:
    """Overwrite, in the texts of error messages, where the library was compiled."""
    path = directory.encode()
    neutral = b"/precast".ljust(len(path), b"/")[: len(path)]
    library.write_bytes(library.read_bytes().replace(path, neutral))
