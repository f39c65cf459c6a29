"""Compiling a piece in this process: for what cannot be kept, or cannot be given to a worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from precast.errors import CompileError, Reason
from precast.events import CompileStarted, Emit, PassesNotSent, PieceCompiled, VerifyMismatched
from precast.on_miss.miss import report_passes
from precast.piece_result import PieceResult

if TYPE_CHECKING:
    from precast.compilers.chosen import ChosenCompilers
    from precast.compilers.interface import CompiledCallable, CompilerInterface
    from precast.config import CompilationConfig
    from precast.graph.piece import Piece
    from precast.on_miss.fallback import Fallback
    from precast.passes.chosen import ChosenPasses

#: What to do about a compiler that failed.
REMEDY = "Nothing to do for a right result; report it if you expected speed"
_SEND = "Define the pass at the top of a module that can be imported, with plain attributes"


class InProcess:
    """Compiles pieces in the thread that asks for them."""

    def __init__(
        self,
        config: CompilationConfig,
        compilers: ChosenCompilers,
        passes: ChosenPasses,
        fallback: Fallback,
        emit: Emit,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._compilers = compilers
        self._passes = passes
        self._fallback = fallback
        self._emit = emit
        self._clock = clock

    def compile(
        self, piece: Piece, name: str, compiler_name: str, work: str | None = None
    ) -> PieceResult:
        """Compile with a compiler whose result cannot be kept.

        `work` names what a failure is remembered of; None: it is not.
        """
        compiler = self._compilers.make(compiler_name)
        key = self._compilers.compute_hash_keys(piece, compiler)
        started = self._clock()
        self._emit(CompileStarted(name, key.digest, compiler_name))
        rows: list[dict[str, Any]] = []
        try:
            call = self._load(compiler, piece, rows)
        except CompileError as error:
            if error.code == "verify-mismatch":
                self._emit(VerifyMismatched(name, key.digest, error.reason))
            return self._fallback.fail(piece, name, error.reason, work)
        except Exception as error:  # noqa: BLE001 - A third party's compiler raises what it likes.
            reason = Reason(
                "compile-failed",
                f"{compiler_name}: {type(error).__name__}: {error}; the piece runs eager",
                REMEDY,
            )
            return self._fallback.fail(piece, name, reason, work)
        seconds = self._clock() - started
        self._emit(PieceCompiled(name, key.digest, compiler_name, seconds, 0, os.getpid()))
        report_passes(rows, name, key.digest, self._emit)
        return PieceResult(
            call=call,
            key=key.digest,
            compiler=compiler_name,
            record=None,
            seconds=seconds,
            passes=rows,
        )

    def compile_unsent(self, piece: Piece, name: str, problem: str) -> PieceResult:
        """Compile here since passes cannot be given to a worker, where calls may wait for it.

        A failure is not remembered: that they cannot is this process's matter.
        """
        if self._config.mode != "blocking" or not isinstance(self._config.compiler, str):
            reason = Reason(
                "pass-failed",
                f"a pass cannot be sent to a compile worker ({problem}); the piece runs eager",
                _SEND,
            )
            return self._fallback.fail(piece, name, reason)
        reason = Reason(
            "pass-failed",
            f"a pass cannot be sent to a compile worker ({problem}); compiled in this process",
            _SEND,
        )
        self._emit(PassesNotSent(name, reason))
        result = self.compile(piece, name, "inductor")
        if result.reason is None:
            result.reason = reason
        return result

    def _load(
        self, compiler: CompilerInterface, piece: Piece, rows: list[dict[str, Any]]
    ) -> CompiledCallable:
        """Run the passes and compile; `rows` gets what the passes did.

        Raises:
            CompileError: A pass has changed what the piece computes.
        """
        if not self._passes.runs_on_pieces:
            return compiler.load({}, {}, piece)
        from precast.passes.pass_manager import PostGradPassManager

        passes = PostGradPassManager(self._passes.on_pieces(), self._config.dump_path())
        run = passes.start(piece)
        call = run.compile(lambda improved: compiler.load({}, {}, improved))
        rows.extend(run.reports())
        if self._config.verify and run.has_changed:
            _verify(piece, call, compiler.name)
        return call


def _verify(piece: Piece, call: CompiledCallable, compiler: str) -> None:
    """Compare with the eager piece in this process, whose random numbers stay what they are."""
    import torch

    from precast.compilers.verify import EagerRefusedError, verify_from_text
    from precast.graph.inputs import edge_sizes

    rows = edge_sizes(piece, keep_alike=True)
    usual = [sizes for sizes in rows if all(size > 1 for size in sizes.values())] or rows
    gpus = [torch.cuda.current_device()] if piece.device == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        try:
            # An index out of range would end all work of this process on a GPU; 0 is always valid.
            verify_from_text(piece, call, usual, compiler, 1 if gpus else 2)
        except EagerRefusedError:
            verify_from_text(piece, call, usual, compiler, 1)
