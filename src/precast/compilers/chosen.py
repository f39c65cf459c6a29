"""Which compilers a model uses, in order: from the setting to names, objects and keys of pieces.

A name is imported when its compiler is first used: a warm start needs one, and that only to load.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from precast.errors import ConfigError
from precast.graph.key import HashComputer, Key, hasher_of
from precast.plugins import load_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from precast.compilers.interface import CompilerInterface
    from precast.config import CompilationConfig
    from precast.graph.piece import Piece
    from precast.passes.chosen import ChosenPasses

_AUTO_ORDER = ("aot_inductor", "inductor_standalone")
#: Inductor's Python code names its device, and the one GPU that a worker sees is its first.
FOR_FIRST_GPU = "inductor_standalone"


class ChosenCompilers:
    """The compilers to try for each piece of a model, each made once.

    `names` has them in order.
    """

    def __init__(self, config: CompilationConfig, passes: ChosenPasses) -> None:
        """Import nothing yet.

        Args:
            config: Of the model.
            passes: What runs on a piece before it is compiled, and so is in its key.
        """
        self._setting = config.compiler
        self._passes = passes
        self._made: dict[str, CompilerInterface] = {}
        self._hashers: dict[Any, HashComputer] = {}
        self.names: tuple[str, ...]
        if not config.use_inductor:
            self.names = ("eager",)
        elif not isinstance(self._setting, str):
            self.names = (self._setting.name,)  # type: ignore[attr-defined]
        else:
            self.names = _AUTO_ORDER if self._setting == "auto" else (self._setting,)

    def __str__(self) -> str:
        return "/".join(self.names)

    @property
    def are_eager(self) -> bool:
        """Whether nothing is compiled."""
        return self.names == ("eager",)

    @property
    def in_process(self) -> str | None:
        """The first one that compiles in the process that runs the piece; None: there is none."""
        return next((name for name in self.names if not self.make(name).is_saveable), None)

    def make(self, name: str | None = None) -> CompilerInterface:
        """Return the compiler of a name, made once; None: the first."""
        name = self.names[0] if name is None else name
        if name not in self._made:
            setting = self._setting
            is_object = not isinstance(setting, str) and setting.name == name  # type: ignore[attr-defined]
            self._made[name] = setting if is_object else load_plugin("compilers", name)()  # type: ignore[assignment]
        return self._made[name]

    def names_here(self, piece: Piece) -> tuple[str, ...]:
        """Return the compilers whose code can run a piece on the current device."""
        if piece.device != "cuda" or FOR_FIRST_GPU not in self.names:
            return self.names
        import torch

        if torch.cuda.current_device() == 0:
            return self.names
        return tuple(name for name in self.names if name != FOR_FIRST_GPU)

    def names_for_worker(self, piece: Piece) -> tuple[str, ...]:
        """Return those compilers as a worker is told of them: an object by its class."""
        if isinstance(self._setting, str):
            return self.names_here(piece)
        kind = type(self._setting)
        return (f"{kind.__module__}:{kind.__qualname__}",)

    def name_from_worker(self, name: str) -> str:
        """Return our name of the compiler that a worker names."""
        return name if isinstance(self._setting, str) else self.names[0]

    def compute_hash_keys(self, piece: Piece, compiler: CompilerInterface) -> Key:
        """Return the key of a piece compiled by a compiler on this machine."""
        computer, passes = hasher_of(piece.device, self._hashers), self._passes.piece_identities
        return computer.piece_key(piece.text, compiler.identity(), passes)

    def digests(self, piece: Piece) -> Iterator[str]:
        """Yield the keys of a piece, a digest for each compiler."""
        for compiler in map(self.make, self.names):
            yield self.compute_hash_keys(piece, compiler).digest

    def work_name(self, piece: Piece) -> str:
        """Return the name of the work of compiling a piece: for leases and remembered failures."""
        keys = list(self.digests(piece))
        return keys[0] if len(keys) == 1 else hashlib.sha256("\n".join(keys).encode()).hexdigest()


def check_compiler(setting: object) -> None:
    """Refuse a compiler that is neither a name nor a compiler.

    Raises:
        ConfigError: Says what is missing.
    """
    if isinstance(setting, str):
        return
    missing = [
        name
        for name in ("name", "is_saveable", "identity", "compile", "load")
        if not hasattr(setting, name)
    ]
    if missing:
        raise ConfigError(
            "compiler",
            setting,
            f"a compiler (it has no {', '.join(missing)})",
            "see precast.compilers.interface.CompilerInterface",
        )


def check_saveable(config: CompilationConfig) -> None:
    """Refuse a compiler that works in the serving process, where calls are to go on.

    Raises:
        ConfigError: Says which.
    """
    setting = config.compiler
    if setting == "inductor" or not getattr(setting, "is_saveable", True):
        raise ConfigError(
            "compiler",
            setting,
            'one that works outside of this process, with mode="progressive"',
            'Write compiler="auto", or mode="blocking"',
        )
