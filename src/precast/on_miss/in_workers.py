"""Compiling the pieces that miss in worker processes: submit, take the answer, save it, load it.

A worker compares what it compiled with the eager piece before it answers, so that what is saved
here is right.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING

from precast.behind import give_way
from precast.compilers.job import CompileJob, JobResult
from precast.errors import (
    CompileError,
    CompileUnavailableError,
    PrecastError,
    Reason,
    in_words,
)
from precast.events import Emit, PieceCompiled, PieceFailed, PieceVerified, VerifyMismatched
from precast.on_miss.in_parts import most_parts
from precast.on_miss.in_process import REMEDY
from precast.on_miss.miss import report_passes
from precast.piece_result import PieceResult, unless_slower

if TYPE_CHECKING:
    from precast.cache.failures import FailureMemory
    from precast.cache.scratch import OwnFolder
    from precast.compilers.chosen import ChosenCompilers
    from precast.config import CompilationConfig
    from precast.on_miss.fallback import Fallback
    from precast.on_miss.in_parts import InParts
    from precast.on_miss.in_process import InProcess
    from precast.on_miss.miss import Miss
    from precast.passes.chosen import ChosenPasses
    from precast.stored_pieces import StoredPieces

_NO_CXX = (
    "Install a C++ compiler (g++), or name one in the variable CXX; `precast doctor` tries it out"
)
_CLOSED = Reason(
    "compile-failed", "compiling was called off; the piece runs eager", "Nothing to do"
)


class InWorkers:
    """Has workers compile pieces, and makes of each answer what became of the piece."""

    def __init__(
        self,
        config: CompilationConfig,
        compilers: ChosenCompilers,
        passes: ChosenPasses,
        stored: StoredPieces,
        failures: FailureMemory,
        fallback: Fallback,
        in_process: InProcess,
        in_parts: InParts,
        emit: Emit,
        submit: Callable[[CompileJob], Future[JobResult]],
    ) -> None:
        """Start nothing yet.

        Args:
            config: Of the model.
            compilers: To try, in order.
            passes: What a worker runs on a piece first.
            stored: Where compiled pieces are saved, and loaded from.
            failures: Forgets those of pieces that could be compiled after all.
            fallback: Answers for a piece that cannot be compiled.
            in_process: Compiles what a worker could not be given.
            in_parts: Compiles what is too large.
            emit: Is told what happens.
            submit: Gives a worker a job.
        """
        self._config = config
        self._compilers = compilers
        self._passes = passes
        self._stored = stored
        self._failures = failures
        self._fallback = fallback
        self._in_process = in_process
        self._in_parts = in_parts
        self._emit = emit
        self._submit = submit

    def submit(self, miss: Miss, directory: Path) -> Future[JobResult]:
        """Have a worker compile a piece, into files of a directory."""
        return self._submit(
            CompileJob(
                piece=miss.piece.to_json(),
                name=miss.name,
                directory=str(directory),
                compilers=self._compilers.names_for_worker(miss.piece),
                verify=bool(self._config.verify),
                passes=self._passes.messages(),
                dump_passes=self._config.dump_path(),
            )
        )

    def look_again(self, miss: Miss) -> PieceResult | None:
        """Return what has become of a piece in the meantime: an artifact, or a failure."""
        found = self._stored.find_new(miss.piece, miss.name)
        if found is not None:
            return found
        return self._fallback.recall(miss.piece, miss.name, miss.work)

    def waits_in_vain(self, miss: Miss) -> bool:
        """Whether what others make of a piece was found to be of no use here."""
        return self._stored.is_refused(miss.piece)

    def call_off(self, miss: Miss) -> PieceResult:
        """Return what stands for a piece that nobody compiles any more: nothing is known of it."""
        return self._fallback.fail(miss.piece, miss.name, _CLOSED)

    def finish(
        self,
        miss: Miss,
        future: Future[JobResult],
        *,
        max_parts: int,
        is_open: Callable[[], bool],
        still_ours: Callable[[], bool],
    ) -> PieceResult:
        """Take one worker's answer: save and load what it made, or say why it made nothing.

        Args:
            miss: What it was asked for.
            future: Is done.
            max_parts: In how many parts a piece may be compiled.
            is_open: Whether the workers were not ended by ourselves.
            still_ours: Whether no other process has taken the work over.
        """
        try:
            done = future.result()
        except (CompileError, CancelledError) as error:
            if isinstance(error, CancelledError) or not is_open():
                return self.call_off(miss)  # By us: it says nothing of the piece.
            if isinstance(error, CompileUnavailableError):
                return self._fallback.fail(miss.piece, miss.name, error.reason)  # Nor does that.
            is_killed = getattr(error, "signal", None) == signal.SIGKILL
            return self._in_parts_or_eager(miss, error.reason, max_parts, is_killed=is_killed)
        give_way()
        self._report_failures(miss, done)
        if done.compiler is None:
            return self._answer_for_none(miss, done, max_parts)
        if not still_ours():
            # We were slow or cut off, and another process may have done it in our place.
            found = self._stored.find(miss.piece, miss.name)
            if found is not None:
                return found
        try:
            return self._save_and_load(miss, done)
        except (PrecastError, OSError) as error:
            # Its files are not there, or not loadable here.
            problem = CompileError(miss.name, done.compiler, f"{type(error).__name__}: {error}")
            reason = error.reason if isinstance(error, PrecastError) else problem.reason
            reason = reason.replace(message=f"{reason.message}; the piece runs eager")
            return self._fallback.fail(miss.piece, miss.name, reason, miss.work)

    def _report_failures(self, miss: Miss, done: JobResult) -> None:
        """Tell which compilers were tried in vain."""
        for failure in done.failures:
            reason = Reason(
                failure.code, f"{failure.compiler}: {failure.message}", _remedy(failure.message)
            )
            if failure.code == "verify-mismatch":
                self._emit(VerifyMismatched(miss.name, "", reason))
            elif done.compiler is not None:
                self._emit(PieceFailed(miss.name, "", failure.compiler, reason))

    def _answer_for_none(self, miss: Miss, done: JobResult, max_parts: int) -> PieceResult:
        """Return what becomes of a piece that no compiler could compile."""
        last = next(
            (failure for failure in done.failures if failure.code == "compile-memory"),
            done.failures[-1],
        )
        if last.compiler == "worker" and last.code == "pass-failed":
            return self._in_process.compile_unsent(miss.piece, miss.name, last.message)
        reason = Reason(last.code, f"{last.message}; the piece runs eager", _remedy(last.message))
        codes = [failure.code for failure in done.failures]
        return self._in_parts_or_eager(miss, reason, max_parts, codes)

    def _in_parts_or_eager(
        self,
        miss: Miss,
        reason: Reason,
        max_parts: int,
        codes: Sequence[str] = (),
        *,
        is_killed: bool = False,
    ) -> PieceResult:
        """Compile a failed piece in smaller parts, where that can help; else it stays eager."""
        max_parts = most_parts(miss.piece, reason, max_parts, is_killed=is_killed)
        result = self._in_parts.compile(miss.piece, miss.name, reason, max_parts)
        if result is None:
            return self._fallback.fail(miss.piece, miss.name, reason, miss.work, codes)
        self._failures.forget(miss.work)
        return result

    def _save_and_load(self, miss: Miss, done: JobResult) -> PieceResult:
        assert done.compiler is not None
        compiler = self._compilers.name_from_worker(done.compiler)
        named = self._compilers.compute_hash_keys(miss.piece, self._compilers.make(compiler))
        key = named.digest
        record = self._stored.save(miss.piece, compiler, named, done)
        self._failures.forget(miss.work)
        num_bytes = sum(Path(path).stat().st_size for path in done.files.values())
        self._emit(
            PieceCompiled(miss.name, key, compiler, done.seconds, num_bytes, done.worker_pid)
        )
        passes = done.details.get("passes", ())
        report_passes(passes, miss.name, key, self._emit)
        if done.verify:
            self._emit(PieceVerified(miss.name, key, done.verify.get("max_abs_error", 0.0)))
        give_way()
        call = self._stored.load(record, name=miss.name) if record is not None else None
        if call is None:
            # No tier could keep it: open it where the worker left it.
            call, record = self._stored.load_unsaved(compiler, done), None
        result = PieceResult(
            call=call,
            key=key,
            compiler=compiler,
            record=record,
            seconds=done.seconds,
            ranges=done.details.get("ranges"),
            passes=passes,
            timing=list(done.timing) if done.timing else None,
        )
        return result if self._config.keep_slower else unless_slower(miss.piece, result)


class Batch:
    """The misses of one call, for `in_turn.Turns`: who does what, and what came of it."""

    def __init__(
        self,
        workers: InWorkers,
        folder: OwnFolder,
        take: Callable[[Miss, PieceResult], None],
        is_open: Callable[[], bool],
        *,
        max_parts: int,
        may_wait: bool,
    ) -> None:
        """Start nothing yet.

        Args:
            workers: Compile.
            folder: Gets a directory for each miss; made for the first.
            take: Is given what became of each, as soon as it is known.
            is_open: Whether the workers were not ended meanwhile.
            max_parts: In how many parts a piece may be compiled.
            may_wait: Whether another process may be waited for.
        """
        self._workers = workers
        self._folder = folder
        self._take = take
        self._max_parts = max_parts
        self._may_wait = may_wait
        self.is_open = is_open

    def call_off(self, miss: Miss) -> None:
        """Let a piece run eager."""
        self._take(miss, self._workers.call_off(miss))

    def look(self, miss: Miss) -> bool:
        """Take what another process has made of a piece; return whether there was anything."""
        result = self._workers.look_again(miss)
        if result is not None:
            self._take(miss, result)
        return result is not None

    def waits_in_vain(self, miss: Miss) -> bool:
        """Whether what another process makes of a piece would be of no use."""
        return not self._may_wait or self._workers.waits_in_vain(miss)

    def start(self, miss: Miss) -> Future[JobResult]:
        """Have a worker compile a piece."""
        try:
            directory = Path(self._folder.make(), str(miss.number))
            directory.mkdir()
        except OSError as error:
            failed: Future[JobResult] = Future()
            failed.set_exception(CompileUnavailableError(miss.name, "worker", in_words(error)))
            return failed
        return self._workers.submit(miss, directory)

    def finish(self, miss: Miss, future: Future[JobResult], still_ours: Callable[[], bool]) -> None:
        """Take what a worker made of a piece."""
        result = self._workers.finish(
            miss,
            future,
            max_parts=self._max_parts,
            is_open=self.is_open,
            still_ours=still_ours,
        )
        self._take(miss, result)


def _remedy(message: str) -> str:
    """Return what to do about a compiler's failure: torch has a name for the most usual one."""
    return _NO_CXX if "InvalidCxxCompiler" in message else REMEDY
