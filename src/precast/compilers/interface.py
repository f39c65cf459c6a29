"""What a compiler is to the rest of Precast: from a piece to files, from files to a callable.

Compilers know nothing of keys, caches or workers. Compiled code is called the boxed way: a list
of tensors in, a list or tuple of tensors out, in the order of the piece's inputs and outputs;
inputs that the piece writes into are written into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from precast.values import Value

if TYPE_CHECKING:
    import torch

    from precast.graph.piece import Piece

CompiledCallable = Callable[[list["torch.Tensor"]], Sequence["torch.Tensor"]]


class CompiledPiece(Value):
    """What a compiler made of a piece.

    `files` are paths by the names under which `load` wants to find them. `details` is JSON data
    that goes with them; three names have a meaning to others: `ranges` ({symbol: [low, high]}, high
    None for no bound) says for which sizes the code holds where that is less than the piece asks
    for, `unproven` ({symbol: [size, ...]}) names sizes within them that must be tried before
    use, or left out, and `source` ({file name: text}) is what was generated, for people: it is kept
    with the artifact, and not handed to `load`.
    """

    files: Mapping[str, str]
    details: Mapping[str, Any]


class CompilerInterface(Protocol):
    """Compiles one piece at a time. One object may be used again and again, by one thread."""

    name: str
    is_saveable: bool  # False: `load` compiles anew, in the process that runs the piece.
    # False: `load` unpickles nothing, so that `allow_unsigned` may admit what nobody signed. A
    # compiler that does not say so is taken to unpickle.
    unpickles: bool

    def identity(self) -> Mapping[str, str]:
        """Return what makes two compilers interchangeable: version and options, for the key.

        Never empty, and never a host, a path or a process id.
        """
        ...

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        """Compile a piece, into files in an existing empty directory. Takes seconds.

        Raises:
            CompileError: The piece cannot be compiled. Other exceptions are the compiler's own.
        """
        ...

    def load(
        self, details: Mapping[str, Any], files: Mapping[str, str], piece: Piece | None
    ) -> CompiledCallable:
        """Return the compiled piece as a callable. The bytes were checked by the caller.

        Args:
            details: As `compile` returned them.
            files: Where the files lie now. More than one file: together in one directory, under
                their names. A single file may have any name.
            piece: Given where it is at hand; a saveable compiler must do without.
        """
        ...
