"""Find or compile pieces: look up, compile on a miss in worker processes, verify, save, load.

One manager serves one compiled model. It is the only part that knows compilers, cache and
workers at once; what to do with the pieces is the backend's business.

What several processes miss at once, one of them compiles, under a lease; the others wait for it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from precast.cache.trust import is_unsigned
from precast.errors import CompileError, ConfigError, PrecastError, Reason
from precast.events import (
    ArtifactRefused,
    CompileStarted,
    Emit,
    FailureRemembered,
    LeaseAwaited,
    PassesNotSent,
    PassRan,
    PieceCompiled,
    PieceFailed,
    PieceLoaded,
    PieceMissed,
    PieceSplit,
    PieceTimed,
    PieceVerified,
    VerifyMismatched,
)
from precast.graph.key import HashComputer, Key
from precast.passes.chosen import NO_PASSES, CannotSend, ChosenPasses
from precast.plugins import load_plugin

if TYPE_CHECKING:
    from concurrent.futures import Future

    from precast.cache import CacheLoader, CacheStorage
    from precast.cache.lease import Leases
    from precast.cache.scratch import OwnFolder
    from precast.compilers.interface import CompiledCallable, CompilerInterface
    from precast.compilers.job import JobResult, JobRunner
    from precast.config import CompilationConfig
    from precast.graph.piece import Piece

_AUTO_ORDER = ("aot_inductor", "inductor_standalone")
_SEND = "Define the pass at the top of a module that can be imported, with plain attributes"
_REMEDY = "Nothing to do for a right result; report it if you expected speed"
_NO_CXX = (
    "Install a C++ compiler (g++), or name one in the variable CXX; `precast doctor` tries it out"
)

_CLOSED = Reason(
    "compile-failed", "compiling was called off; the piece runs eager", "Nothing to do"
)

# Between two looks at what another process compiles: growing, so that few seconds are lost on
# short compiles and few requests are made for long ones.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0

ResultT = TypeVar("ResultT")
#: A piece that is too large is cut in two, and each part again, up to so many.
MAX_PARTS = 8
# What took too long, or died, is cut only where it is long: else it hangs rather than works.
_LONG_STATEMENTS = 32


class PieceResult:
    """What became of one unique piece.

    `call` runs it. `record` is what an assembly keeps to load it again, None where nothing
    can be kept (compiled in process). `reason` says why it is not compiled, where it is not, or
    why it was compiled in `num_parts`. `passes` has a row for each pass that ran on it.
    """

    __slots__ = (
        "call",
        "compiler",
        "from_cache",
        "key",
        "num_eager_parts",
        "num_parts",
        "passes",
        "ranges",
        "reason",
        "record",
        "seconds",
        "timing",
    )

    def __init__(
        self,
        *,
        call: CompiledCallable,
        key: str,
        compiler: str,
        record: dict[str, Any] | None,
        seconds: float = 0.0,
        from_cache: bool = False,
        reason: Reason | None = None,
        ranges: Mapping[str, Sequence[int | None]] | None = None,
        num_parts: int = 1,
        num_eager_parts: int = 0,
        passes: Sequence[Mapping[str, Any]] = (),
        timing: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.num_parts = num_parts
        self.num_eager_parts = num_eager_parts
        self.call = call
        self.key = key
        self.compiler = compiler
        self.record = record
        self.seconds = seconds
        self.from_cache = from_cache
        self.reason = reason
        self.ranges = ranges or {}
        self.passes = passes
        self.timing = timing


class CompilerManager:
    """Finds or compiles pieces, by the configuration of one model."""

    def __init__(
        self,
        config: CompilationConfig,
        loader: CacheLoader,
        storage: CacheStorage,
        emit: Emit,
        make_service: Callable[[], JobRunner],
        clock: Callable[[], float] = time.perf_counter,
        passes: ChosenPasses = NO_PASSES,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Start nothing yet.

        Args:
            config: Of the model.
            loader: Reads artifacts.
            storage: Writes them.
            emit: Is told what happens.
            make_service: Makes what runs compile jobs; called when there is something to compile.
            clock: Seconds that only go forward.
            passes: What runs on a piece before it is compiled.
            wall_clock: Seconds since the epoch, for what is remembered.
        """
        self.passes = passes
        self._make_service = make_service
        self._config = config
        self._loader = loader
        self._storage = storage
        self._emit = emit
        self._clock = clock
        self._wall_clock = wall_clock
        self._compilers: dict[str, CompilerInterface] = {}
        self._hashers: dict[str, HashComputer] = {}
        self._service: JobRunner | None = None
        self._kept: list[OwnFolder] = []
        self._refused: set[str] = set()

    # -- parts ----------------------------------------------------------------

    def make_compiler(self, name: str | None = None) -> CompilerInterface:
        """Return the compiler of a name, made once; None: the first that the settings name."""
        name = self.compiler_names()[0] if name is None else name
        if name not in self._compilers:
            setting = self._config.compiler
            is_object = not isinstance(setting, str) and setting.name == name  # type: ignore[attr-defined]
            self._compilers[name] = setting if is_object else load_plugin("compilers", name)()  # type: ignore[assignment]
        return self._compilers[name]

    def compiler_names(self) -> tuple[str, ...]:
        """Return the compilers to try for each piece, in order."""
        setting = self._config.compiler
        if not self._config.use_inductor:
            return ("eager",)
        if not isinstance(setting, str):
            return (setting.name,)  # type: ignore[attr-defined]
        return _AUTO_ORDER if setting == "auto" else (setting,)

    def compute_hash_keys(self, piece: Piece, compiler: CompilerInterface) -> Key:
        """Return the key of a piece compiled by a compiler on this machine."""
        computer, passes = self._hasher(piece.device), self.passes.piece_identities
        return computer.piece_key(piece.text, compiler.identity(), passes)

    def _hasher(self, device: str) -> HashComputer:
        if device not in self._hashers:
            self._hashers[device] = HashComputer(device)
        return self._hashers[device]

    def prestart(self) -> None:
        """Start workers now, so that their imports run beside the capture.

        One beside a model that serves: several that import at once slow its calls down, and nobody
        waits for the rest.
        """
        names = self.compiler_names()
        if names != ("eager",) and any(self.make_compiler(name).is_saveable for name in names):
            most = 1 if self._config.mode == "progressive" else 4
            self._ensure_service().prestart(min(self._config.num_compile_workers(), most))

    def close(self) -> None:
        """End the workers. From any thread: a `compile` that is under way comes to its end."""
        service, self._service = self._service, None
        if service is not None:
            service.close()

    def remove_kept(self) -> None:
        """Remove the files that no tier took; what was loaded from there stays loaded."""
        while self._kept:
            self._kept.pop().close()

    def _ensure_service(self) -> JobRunner:
        if self._service is None:
            self._service = self._make_service()
        return self._service

    # -- the work -------------------------------------------------------------

    def load(
        self, record: Mapping[str, Any], *, name: str = "", unsigned: bool = False
    ) -> CompiledCallable | None:
        """Return the code that a record stands for; None where its files are not sound.

        Args:
            record: Of an artifact.
            name: Of the piece, for reports.
            unsigned: Nobody trusted vouches for the record. Then nothing is unpickled,
                whatever the settings are: None for a compiler that would.

        Raises:
            PrecastError: The files are sound and yet cannot be loaded here.
        """
        if "eager" in record:
            from precast.graph.piece import Piece

            return eager_call(Piece.from_json(record["eager"]))
        if record.get("kind") == "parts":
            from precast.parts import join

            unsigned = unsigned or is_unsigned(record)
            calls = [
                self.load(part, name=name, unsigned=unsigned)
                for part in record["details"]["records"]
            ]
            return None if None in calls else join(record["details"], calls)
        started = self._clock()
        compiler = self.make_compiler(record["compiler"])
        if (unsigned or is_unsigned(record)) and getattr(compiler, "unpickles", True):
            self._emit(ArtifactRefused("cache", record["key"], _pickle_reason(compiler.name)))
            self._refused.add(record["key"])
            return None
        files = record["files"]
        paths = self._loader.files(files) if files else {}
        if paths is None:
            return None
        call = compiler.load(record["details"], paths, None)
        self._emit(
            PieceLoaded(
                name, record["key"], "cache", self._clock() - started, record.get("seconds", 0.0)
            )
        )
        if record.get("timing"):
            self._emit(PieceTimed(name, record["key"], tuple(record["timing"])))
        return call

    def find(self, piece: Piece, name: str) -> PieceResult | None:
        """Return a piece from the cache, by the first compiler that has it."""
        for compiler_name in self.compiler_names():
            compiler = self.make_compiler(compiler_name)
            if not compiler.is_saveable or compiler_name == "eager":
                continue
            key = self.compute_hash_keys(piece, compiler)
            manifest = self._loader.manifest(key.digest)
            if manifest is None:
                continue
            record = self._record(key.digest, manifest)
            try:
                call = self.load(record, name=name) if record is not None else None
            except PrecastError as error:
                # Sound bytes that do not load here are of no use to anybody: compile again.
                self._storage.quarantine(key.digest, error.reason)
                continue
            if record is not None and call is not None:
                return self._if_worth(
                    piece,
                    PieceResult(
                        call=call,
                        key=key.digest,
                        compiler=compiler_name,
                        record=record,
                        seconds=record["seconds"],
                        from_cache=True,
                        ranges=record["details"].get("ranges"),
                        num_parts=record["details"].get("num_parts", 1),
                        passes=record["details"].get("passes", ()),
                        timing=record["timing"],
                    ),
                )
        return None

    @staticmethod
    def _record(key: str, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            record = {
                "key": key,
                "compiler": manifest["compiler"],
                "details": manifest["details"],
                "files": manifest["files"],
                "seconds": manifest["seconds"],
                "timing": manifest.get("timing"),
            }
            if manifest["kind"] == "parts":
                record |= {"kind": "parts", "reason": manifest["reason"]}
            return {**record, "unsigned": True} if is_unsigned(manifest) else record
        except KeyError:
            return None  # Another format: a miss.

    def compile(
        self,
        pieces: Sequence[Piece],
        names: Sequence[str],
        *,
        order: Sequence[int] | None = None,
        on_result: Callable[[int, PieceResult], None] = lambda _number, _result: None,
        max_parts: int = MAX_PARTS,
        may_wait: bool = True,
    ) -> list[PieceResult]:
        """Return what became of every piece, in order: from the cache, compiled, or eager.

        Never raises for a piece: one that cannot be compiled stays eager, with the reason.

        Args:
            pieces: To find or to compile.
            names: Theirs.
            order: All their numbers, those first that are to be compiled first.
            on_result: Told of each piece, in this thread, as soon as it is known.
            max_parts: In how many a piece is compiled at most that outgrows its limits.
            may_wait: Unset: compile here even what another process compiles now.
        """
        results: list[PieceResult | None] = _Results(len(pieces), on_result)
        is_eager = self.compiler_names() == ("eager",)
        for i in order or range(len(pieces)):
            results[i] = (
                self._eager(pieces[i], None) if is_eager else self.find(pieces[i], names[i])
            )
        missing = [i for i in order or range(len(pieces)) if results[i] is None]
        for i in missing:
            self._report_missed(pieces[i], names[i])
        if missing and self._config.mode == "cache_only":
            reason = Reason(
                "cache-disabled" if self._config.disable_compile_cache else "not-recorded",
                'mode="cache_only" found no artifact; the piece runs eager',
                'Fill the cache with mode="blocking" first',
            )
            for i in missing:
                results[i] = self._eager(pieces[i], reason)
        elif missing:
            self._compile_missing(pieces, names, missing, results, max_parts, may_wait)
        return [result for result in results if result is not None]

    def _report_missed(self, piece: Piece, name: str) -> None:
        for compiler_name in self.compiler_names():
            compiler = self.make_compiler(compiler_name)
            if compiler.is_saveable:  # Of the others nothing is ever stored.
                key = self.compute_hash_keys(piece, compiler)
                self._emit(PieceMissed(name, key.digest, key.parts))
                return

    def _compile_missing(
        self,
        pieces: Sequence[Piece],
        names: Sequence[str],
        missing: Sequence[int],
        results: list[PieceResult | None],
        max_parts: int,
        may_wait: bool,
    ) -> None:
        in_process = [
            name for name in self.compiler_names() if not self.make_compiler(name).is_saveable
        ]
        if in_process:
            for i in missing:
                work = self._work_name(pieces[i])
                failure = self.recall(work)
                results[i] = (
                    self._compile_here(pieces[i], names[i], in_process[0], work)
                    if failure is None
                    else self._remembered(pieces[i], names[i], work, failure)
                )
            return
        try:
            self.passes.messages()
        except CannotSend as problem:
            for i in missing:
                results[i] = self._compile_unsent(pieces[i], names[i], str(problem))
            return
        from precast.cache.scratch import OwnFolder

        with OwnFolder("compile") as folder, self._storage.open_leases() as leases:
            self._compile_or_wait(
                pieces, names, missing, results, leases, folder.path, max_parts, may_wait
            )

    def _compile_or_wait(
        self,
        pieces: Sequence[Piece],
        names: Sequence[str],
        missing: Sequence[int],
        results: list[PieceResult | None],
        leases: Leases,
        folder: str,
        max_parts: int,
        may_wait: bool,
    ) -> None:
        """Compile the pieces whose leases are free, and meanwhile wait for those of others.

        Nobody keeps a lease while waiting for another one, except for what it compiles itself: so
        processes that miss the same pieces in any order do not block each other.
        """
        from concurrent.futures import FIRST_COMPLETED, wait

        service = self._ensure_service()
        waiting = {i: self._work_name(pieces[i]) for i in missing}
        running: dict[Future[JobResult], tuple[int, str]] = {}
        started = self._clock()
        pause = 0.0
        while waiting or running:
            if self._service is not service:
                for i in waiting:
                    results[i] = self._failed(pieces[i], names[i], _CLOSED)
                waiting.clear()
            for i, work in list(waiting.items()):
                is_ours = leases.try_acquire(work)
                # Another one may have published it after we looked and before the lease was ours.
                results[i] = self._look_again(pieces[i], names[i], work)
                is_in_vain = not may_wait or self._is_refused(pieces[i]) or self._is_late(started)
                if results[i] is None and not is_ours and not is_in_vain:
                    continue
                del waiting[i]
                if pause:
                    self._tell_waited(work, started, results[i] is not None, is_ours)
                if results[i] is not None:
                    leases.release(work)
                    continue
                directory = Path(folder) / str(i)
                directory.mkdir()
                running[self._submit(pieces[i], names[i], str(directory))] = i, work
            pause = min(max(_FIRST_PAUSE_S, pause * 1.5), _LONGEST_PAUSE_S)
            if running:
                limit = pause if waiting else None
                for future in wait(running, timeout=limit, return_when=FIRST_COMPLETED).done:
                    i, work = running.pop(future)
                    results[i] = self._finish(
                        pieces[i], names[i], future, service, leases, work, max_parts
                    )
                    leases.release(work)
            elif waiting:
                time.sleep(pause)

    @contextmanager
    def turn(
        self, work: str, is_new: Callable[[], bool], look: Callable[[], ResultT | None]
    ) -> Iterator[ResultT | None]:
        """Let one process at a time do a piece of work; yield what another one made of it.

        Inside the block the work is ours to do if None was yielded: under its lease, unless it has
        been waited for too long or is known to leave nothing that others could use.

        Args:
            work: Names the work: a key of the cache.
            is_new: Whether there is something that was not there before; asked again and again.
            look: Looks for the result; None: it is not there.
        """
        with self._storage.open_leases() as leases:
            started = self._clock()
            pause = 0.0
            while True:
                if self.recall(work) is not None:
                    found, is_ours = None, True  # All at once, since waiting gives nothing.
                else:
                    is_ours = leases.try_acquire(work)
                    # What was waited for may have taken the place of what was there before.
                    found = look() if is_new() or (is_ours and pause) else None
                is_in_vain = bool(self._refused) or self._is_late(started)
                if found is not None or is_ours or is_in_vain:
                    break
                pause = min(max(_FIRST_PAUSE_S, pause * 1.5), _LONGEST_PAUSE_S)
                time.sleep(pause)
            if pause:
                self._tell_waited(work, started, found is not None, is_ours)
            if found is not None:
                leases.release(work)
            yield found

    def _is_refused(self, piece: Piece) -> bool:
        """Whether what others make of a piece was found to be of no use here."""
        compilers = map(self.make_compiler, self.compiler_names())
        return bool(self._refused) and not self._refused.isdisjoint(
            self.compute_hash_keys(piece, compiler).digest for compiler in compilers
        )

    def _is_late(self, started: float) -> bool:
        limit = self._config.lease_wait
        waited = self._clock() - started
        return waited >= (self._config.max_compile_time if limit is None else limit)

    def _tell_waited(self, work: str, started: float, is_found: bool, is_ours: bool) -> None:
        outcome = "found" if is_found else "taken over" if is_ours else "gave up"
        self._emit(LeaseAwaited(work, self._clock() - started, outcome))

    def _work_name(self, piece: Piece) -> str:
        """Return the name of the work of compiling a piece by the compilers that are set."""
        compilers = map(self.make_compiler, self.compiler_names())
        keys = [self.compute_hash_keys(piece, compiler).digest for compiler in compilers]
        return keys[0] if len(keys) == 1 else hashlib.sha256("\n".join(keys).encode()).hexdigest()

    def _look_again(self, piece: Piece, name: str, work: str) -> PieceResult | None:
        """Return what has become of a piece in the meantime: an artifact, or a failure."""
        for compiler_name in self.compiler_names():
            key = self.compute_hash_keys(piece, self.make_compiler(compiler_name))
            if self._loader.peek(key.digest) is not None:
                found = self.find(piece, name)
                if found is not None:
                    return found
                break
        failure = self.recall(work)
        return None if failure is None else self._remembered(piece, name, work, failure)

    # -- failures that are remembered ------------------------------------------

    def recall(self, work: str) -> dict[str, Any] | None:
        """Return the failure of an earlier try that still holds here, as plain data."""
        from precast.cache.failures import failure_key

        payload = self._loader.peek(failure_key(work))
        failure = None if payload is None else payload.get("failure")
        return failure if isinstance(failure, dict) and self._holds(failure) else None

    def remember(self, work: str, reason: Reason, codes: Sequence[str]) -> dict[str, Any]:
        """Keep a failure for later starts, and return it; `codes` are those of all that failed."""
        from precast.cache.failures import failure_key, is_shared, make_failure

        failure = make_failure(
            reason,
            codes,
            now_s=self._wall_clock(),
            max_compile_time=self._config.max_compile_time,
            max_compile_memory=self._config.max_compile_memory,
        )
        if self._config.failure_memory and not self._config.disable_compile_cache:
            self._storage.publish(
                failure_key(work),
                {"kind": "failure", "failure": failure},
                {},
                is_local=not is_shared(codes),
            )
        return failure

    def _forget_failure(self, work: str) -> None:
        """Drop what is remembered of a piece that could be compiled after all."""
        from precast.cache.failures import failure_key

        if self._loader.peek(failure_key(work)) is not None:
            self._storage.discard(failure_key(work))

    def still_stands(self, record: Mapping[str, Any]) -> bool:
        """Whether a record still says how its piece should run.

        It does not where it, or a part of it, runs eager for a failure that holds no more.
        """
        if record.get("kind") == "parts":
            return all(map(self.still_stands, record["details"]["records"]))
        return (
            "eager" not in record
            or record["reason"] is None
            or record["reason"]["code"] == "not-worth-it"
            or (isinstance(record.get("failure"), dict) and self._holds(record["failure"]))
        )

    def reason_of(self, record: Mapping[str, Any]) -> Reason | None:
        """Return why the piece of a record runs eager, or in parts; None: it does not."""
        from precast.cache.failures import as_remembered

        if record.get("reason") is None:
            return None
        if "eager" not in record or record.get("failure") is None:
            return Reason(**record["reason"])
        return as_remembered(record["failure"], self._config.failure_memory)

    def _holds(self, failure: Mapping[str, Any]) -> bool:
        from precast.cache.failures import still_holds

        return still_holds(
            failure,
            now_s=self._wall_clock(),
            memory_s=self._config.failure_memory,
            max_compile_time=self._config.max_compile_time,
            max_compile_memory=self._config.max_compile_memory,
        )

    def _remembered(
        self, piece: Piece, name: str, work: str, failure: dict[str, Any]
    ) -> PieceResult:
        from precast.cache.failures import as_remembered

        reason = as_remembered(failure, self._config.failure_memory)
        self._emit(FailureRemembered(name, work, reason))
        if self._config.on_error == "raise":
            raise CompileError(name, "/".join(self.compiler_names()), reason.message)
        return self._eager(piece, reason, failure)

    # -- one piece ------------------------------------------------------------

    def _submit(self, piece: Piece, name: str, directory: str) -> Future[JobResult]:
        from precast.compilers.job import CompileJob

        setting = self._config.compiler
        compilers = self.compiler_names()
        if not isinstance(setting, str):
            kind = type(setting)
            compilers = (f"{kind.__module__}:{kind.__qualname__}",)
        return self._ensure_service().submit(
            CompileJob(
                piece=piece.to_json(),
                name=name,
                directory=directory,
                compilers=compilers,
                verify=bool(self._config.verify),
                passes=self.passes.messages(),
                dump_passes=self._dump_folder(),
            )
        )

    def _dump_folder(self) -> str | None:
        folder = self._config.dump_passes
        return None if folder is None else str(Path(folder).expanduser().absolute())

    def _finish(
        self,
        piece: Piece,
        name: str,
        future: Future[JobResult],
        service: JobRunner,
        leases: Leases,
        work: str,
        max_parts: int,
    ) -> PieceResult:
        """Take one worker's answer: save and load what it made, or say why it made nothing."""
        from concurrent.futures import CancelledError

        try:
            done = future.result()
        except (CompileError, CancelledError) as error:
            if self._service is not service or isinstance(error, CancelledError):
                return self._failed(piece, name, _CLOSED)  # By us: it says nothing of the piece.
            is_killed = getattr(error, "signal", None) == signal.SIGKILL
            return self._too_large(piece, name, error.reason, work, max_parts, is_killed=is_killed)
        for failure in done.failures:
            reason = Reason(
                failure.code, f"{failure.compiler}: {failure.message}", _remedy(failure.message)
            )
            if failure.code == "verify-mismatch":
                self._emit(VerifyMismatched(name, "", reason))
            elif done.compiler is not None:
                self._emit(PieceFailed(name, "", failure.compiler, reason))
        if done.compiler is None:
            last = next(
                (failure for failure in done.failures if failure.code == "compile-memory"),
                done.failures[-1],
            )
            if last.compiler == "worker" and last.code == "pass-failed":
                return self._compile_unsent(piece, name, last.message)
            reason = Reason(
                last.code, f"{last.message}; the piece runs eager", _remedy(last.message)
            )
            codes = [failure.code for failure in done.failures]
            return self._too_large(piece, name, reason, work, max_parts, codes)
        if not leases.still_holds(work):
            # We were slow or cut off, and another process may have done it in our place.
            found = self.find(piece, name)
            if found is not None:
                return found
        try:
            return self._keep_compiled(piece, name, done, work)
        except (PrecastError, OSError) as error:
            # Its files are not there, or not loadable here.
            problem = CompileError(name, done.compiler, f"{type(error).__name__}: {error}")
            reason = error.reason if isinstance(error, PrecastError) else problem.reason
            return self._failed(piece, name, reason, work)

    def _keep_compiled(self, piece: Piece, name: str, done: JobResult, work: str) -> PieceResult:
        assert done.compiler is not None
        # The worker knows a compiler that was given as an object by its class.
        setting = self._config.compiler
        compiler_name = done.compiler if isinstance(setting, str) else self.compiler_names()[0]
        compiler = self.make_compiler(compiler_name)
        key = self.compute_hash_keys(piece, compiler)
        files = {label: _PathOf(path) for label, path in done.files.items()}
        timing = list(done.timing) if done.timing else None
        payload = self._storage.publish(
            key.digest,
            {
                "kind": "piece",
                "compiler": compiler_name,
                "details": dict(done.details),
                "seconds": done.seconds,
                "parts": key.parts,
                "piece": piece.to_json(),
                "verification": done.verify,
                "timing": timing,
                **({"source": dict(done.source)} if done.source else {}),
            },
            files,
        )
        self._forget_failure(work)
        num_bytes = sum(Path(path).stat().st_size for path in done.files.values())
        self._emit(
            PieceCompiled(name, key.digest, compiler_name, done.seconds, num_bytes, done.worker_pid)
        )
        passes = done.details.get("passes", ())
        self._report_passes(name, key.digest, passes)
        if done.verify:
            self._emit(PieceVerified(name, key.digest, done.verify.get("max_abs_error", 0.0)))
        record = self._record(key.digest, payload)
        call = self.load(record, name=name) if record is not None else None
        if call is None:
            # No tier could keep it (a full disk, say): open it where the worker left it.
            call = compiler.load(done.details, self._keep(done.files), None)
            record = None
        return self._if_worth(
            piece,
            PieceResult(
                call=call,
                key=key.digest,
                compiler=compiler_name,
                record=record,
                seconds=done.seconds,
                ranges=done.details.get("ranges"),
                passes=passes,
                timing=timing,
            ),
        )

    def _if_worth(self, piece: Piece, result: PieceResult) -> PieceResult:
        """Return the compiled piece, or the eager one where that was found to be faster."""
        from precast.compilers.timing import how_much_slower

        slower = how_much_slower(result.timing)
        if slower is None or self._config.keep_slower:
            return result
        reason = Reason(
            "not-worth-it",
            f"compiled by {result.compiler} it takes {slower}; the piece runs eager",
            "Nothing to do; keep_slower=True runs it all the same",
        )
        eager = self._eager(piece, reason)
        eager.record["timing"] = eager.timing = result.timing  # type: ignore[index]
        return eager

    def _too_large(
        self,
        piece: Piece,
        name: str,
        reason: Reason,
        work: str,
        max_parts: int,
        codes: Sequence[str] = (),
        *,
        is_killed: bool = False,
    ) -> PieceResult:
        """Compile a failed piece in smaller parts, where that can help; else it stays eager."""
        if reason.code == "compile-timeout" or is_killed:
            # Each part may take as long again: once, and no more.
            is_long = piece.text.count("\n    v") >= _LONG_STATEMENTS
            max_parts = min(max_parts, 2) if is_long else 1
        elif reason.code != "compile-memory":
            max_parts = 1
        result = self._in_parts(piece, name, reason, max_parts) if max_parts > 1 else None
        if result is None:
            return self._failed(piece, name, reason, work, codes)
        self._forget_failure(work)
        return result

    def _in_parts(
        self, piece: Piece, name: str, reason: Reason, max_parts: int
    ) -> PieceResult | None:
        """Return a piece as several that are compiled each for itself; None: it does not help."""
        from precast.graph.piece import Piece as PieceValue
        from precast.parts import join

        cut = self._cut(piece, name)
        if cut is None:
            return None
        slots = [number for number in cut["slots"] if number is not None]
        if len(slots) > max_parts:
            return None
        parts = [PieceValue.from_json(part) for part in cut.pop("pieces")]
        names = [f"{name}, part {number + 1}" for number in range(len(parts))]
        # Nobody is waited for: we hold the lease of the whole, and two that wait for parts which
        # the other one holds would wait for long.
        results = self.compile(parts, names, max_parts=max_parts // len(slots), may_wait=False)
        compiled = [result for result in results if result.compiler != "eager"]
        if not compiled:
            return None
        # Equal halves are one piece, which is compiled once and called twice.
        num_parts = sum(results[number].num_parts for number in slots)
        ranges = dict(cut.get("ranges", {}))
        for number, symbols in cut["symbols"]:
            for symbol, bounds in results[number].ranges.items():
                ranges[symbols[symbol]] = _both(ranges.get(symbols[symbol]), bounds)
        num_eager = sum(results[number].num_eager_parts for number in slots)
        message = f"compiled in {num_parts} parts" + (f", {num_eager} eager" if num_eager else "")
        reason = Reason(reason.code, f"{message}: {reason.message}", reason.remedy)
        compiler = compiled[0].compiler
        key = self.compute_hash_keys(piece, self.make_compiler(compiler))
        seconds = sum(result.seconds for result in results)
        details = {
            "ranges": ranges,
            "slots": cut["slots"],
            "execution": cut["execution"],
            "num_parts": num_parts,
            "records": [result.record for result in results],
        }
        passes = [row for result in results for row in result.passes]
        if passes:
            details["passes"] = passes
        content: dict[str, Any] = {
            "kind": "parts",
            "compiler": compiler,
            "details": details,
            "seconds": seconds,
            "reason": reason.as_dict(),
        }
        record: dict[str, Any] | None = None
        if all(result.record is not None for result in results):
            if any(is_unsigned(result.record) for result in results if result.record):
                content["unsigned"] = True  # Nobody vouches for the whole either.
            record = {"key": key.digest, "files": {}, **content}
            if not num_eager:
                # Whoever has this piece next need not find out anew that it is too large.
                content |= {"parts": key.parts, "piece": piece.to_json(), "verification": None}
                self._storage.publish(key.digest, content, {})
        self._emit(PieceSplit(name, key.digest, num_parts, reason))
        return PieceResult(
            call=join(details, [result.call for result in results]),
            key=key.digest,
            compiler=compiler,
            record=record,
            seconds=seconds,
            reason=reason,
            ranges=ranges,
            num_parts=num_parts,
            num_eager_parts=num_eager,
            passes=passes,
        )

    def _cut(self, piece: Piece, name: str) -> dict[str, Any] | None:
        """Have a worker cut a piece in two; None where it cannot be."""
        from precast.cache.scratch import OwnFolder
        from precast.compilers.job import CompileJob
        from precast.parts import CUTTER

        with OwnFolder("cut") as folder:
            job = CompileJob(
                piece=piece.to_json(),
                name=name,
                directory=str(Path(folder.path) / "cut"),
                compilers=(CUTTER,),
                verify=False,  # Each part is; the whole may not fit.
                is_reported=False,
            )
            try:
                done = self._ensure_service().submit(job).result()
            except CompileError:
                return None
        return None if done.compiler is None else dict(done.details)

    def _keep(self, files: Mapping[str, str]) -> dict[str, str]:
        """Copy files that no tier took to a folder that lives as long as this process."""
        import shutil

        from precast.cache.scratch import OwnFolder

        self._kept.append(OwnFolder("kept"))
        folder = Path(self._kept[-1].make())
        return {name: shutil.copy(path, str(folder / name)) for name, path in files.items()}

    def _compile_here(
        self, piece: Piece, name: str, compiler_name: str, work: str | None
    ) -> PieceResult:
        """Compile in this process, with a compiler whose result cannot be kept.

        `work` names what a failure is remembered of; None: it is not.
        """
        compiler = self.make_compiler(compiler_name)
        key = self.compute_hash_keys(piece, compiler)
        started = self._clock()
        self._emit(CompileStarted(name, key.digest, compiler_name))
        rows: list[dict[str, Any]] = []
        try:
            call = self._load_here(compiler, piece, rows)
        except CompileError as error:
            if error.code == "verify-mismatch":
                self._emit(VerifyMismatched(name, key.digest, error.reason))
            return self._failed(piece, name, error.reason, work)
        except Exception as error:  # noqa: BLE001 - A third party's compiler raises what it likes.
            reason = Reason(
                "compile-failed",
                f"{compiler_name}: {type(error).__name__}: {error}; the piece runs eager",
                _REMEDY,
            )
            return self._failed(piece, name, reason, work)
        seconds = self._clock() - started
        self._emit(PieceCompiled(name, key.digest, compiler_name, seconds, 0, os.getpid()))
        self._report_passes(name, key.digest, rows)
        return PieceResult(
            call=call,
            key=key.digest,
            compiler=compiler_name,
            record=None,
            seconds=seconds,
            passes=rows,
        )

    def _load_here(
        self, compiler: CompilerInterface, piece: Piece, rows: list[dict[str, Any]]
    ) -> CompiledCallable:
        """Run the passes and compile, in this process; `rows` gets what the passes did.

        Raises:
            CompileError: A pass has changed what the piece computes.
        """
        if not self.passes.runs_on_pieces:
            return compiler.load({}, {}, piece)
        from precast.passes.pass_manager import PostGradPassManager

        passes = PostGradPassManager(self.passes.on_pieces(), self._dump_folder()).start(piece)
        call = passes.compile(lambda improved: compiler.load({}, {}, improved))
        rows.extend(passes.reports())
        if self._config.verify and passes.has_changed:
            _verify_here(piece, call, compiler.name)
        return call

    def _compile_unsent(self, piece: Piece, name: str, problem: str) -> PieceResult:
        """Compile in this process, since passes cannot be given to a worker.

        A failure is not remembered: that they cannot is this process's matter.
        """
        if self._config.mode != "blocking" or not isinstance(self._config.compiler, str):
            reason = Reason(
                "pass-failed",
                f"a pass cannot be sent to a compile worker ({problem}); the piece runs eager",
                _SEND,
            )
            return self._failed(piece, name, reason)
        reason = Reason(
            "pass-failed",
            f"a pass cannot be sent to a compile worker ({problem}); compiled in this process",
            _SEND,
        )
        self._emit(PassesNotSent(name, reason))
        result = self._compile_here(piece, name, "inductor", None)
        if result.reason is None:
            result.reason = reason
        return result

    def _report_passes(self, name: str, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            failure = row.get("failure")
            reason = None if failure is None else Reason(**failure)
            self._emit(
                PassRan(
                    name, key, row["name"], row["stage"], row["matches"], row["seconds"], reason
                )
            )

    def _failed(
        self,
        piece: Piece,
        name: str,
        reason: Reason,
        work: str | None = None,
        codes: Sequence[str] = (),
    ) -> PieceResult:
        """Report a failure, and have the piece run eager.

        Args:
            work: Under which it is remembered; None: the next start shall try again.
            codes: Of all that was tried, where that is more than the reason says.
        """
        failure = None if work is None else self.remember(work, reason, codes or (reason.code,))
        self._emit(PieceFailed(name, "", "/".join(self.compiler_names()), reason))
        if self._config.on_error == "raise":
            raise CompileError(name, "/".join(self.compiler_names()), reason.message)
        return self._eager(piece, reason, failure)

    def _eager(
        self, piece: Piece, reason: Reason | None, failure: Mapping[str, Any] | None = None
    ) -> PieceResult:
        return PieceResult(
            call=eager_call(piece),
            key="",
            compiler="eager",
            record={
                "eager": piece.to_json(),
                "reason": None if reason is None else reason.as_dict(),
                "failure": failure,
            },
            reason=reason,
            num_eager_parts=1,
        )

    def save(self, key: str, payload: Mapping[str, Any]) -> None:
        """Publish what is no artifact of a piece: an assembly."""
        if any(is_unsigned(record) for record in payload["pieces"]):
            payload = {**payload, "unsigned": True}  # Nobody vouches for the whole either.
        self._storage.publish(key, payload, {})


def _remedy(message: str) -> str:
    """Return what to do about a compiler's failure: torch has a name for the most usual one."""
    return _NO_CXX if "InvalidCxxCompiler" in message else _REMEDY


def _pickle_reason(compiler: str) -> Reason:
    return Reason(
        "untrusted",
        f"an artifact of {compiler} is not used: loading it unpickles, and nobody signed it",
        "Have it signed by a trusted key (`signing_key` where it is published); "
        "`allow_unsigned` does not admit it",
    )


def _both(one: Sequence[int | None] | None, other: Sequence[int | None]) -> list[int | None]:
    """Return the range that two ranges have in common; None: no bound."""
    if one is None:
        return list(other)
    highs = [high for high in (one[1], other[1]) if high is not None]
    return [max(one[0] or 0, other[0] or 0), min(highs, default=None)]


class _Results(list["PieceResult | None"]):
    """What became of each piece; tells of each as it is entered."""

    def __init__(self, length: int, on_result: Callable[[int, PieceResult], None]) -> None:
        super().__init__([None] * length)
        self._on_result = on_result

    def __setitem__(self, number: Any, result: Any) -> None:
        super().__setitem__(number, result)
        if result is not None:
            self._on_result(number, result)


class _PathOf:
    """A path as `os.PathLike`, which tells the storage a file from bytes."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return self._path


def pending_result(piece: Piece) -> PieceResult:
    """Return what stands for a piece that is still to be compiled; it is never kept."""
    return PieceResult(
        call=eager_call(piece),
        key="",
        compiler="eager",
        record=None,
        reason=Reason(
            "compile-pending",
            "it is being compiled; it runs eager until then",
            "Nothing to do; precast.wait(model) waits for it",
        ),
    )


def eager_call(piece: Piece) -> CompiledCallable:
    """Return a piece's own text as a callable of the boxed convention."""
    from precast.graph.read import eager_function

    function = eager_function(piece)
    return lambda inputs: function(*inputs)


def _verify_here(piece: Piece, call: CompiledCallable, compiler: str) -> None:
    """Compare with the eager piece in this process, whose random numbers stay what they are."""
    import torch

    from precast.compilers.verify import EagerRefusedError, verify_from_text
    from precast.graph.read import edge_sizes

    rows = edge_sizes(piece, keep_alike=True)
    usual = [sizes for sizes in rows if all(size > 1 for size in sizes.values())] or rows
    gpus = [torch.cuda.current_device()] if piece.device == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        try:
            # An index out of range would end all work of this process on a GPU; 0 is always valid.
            verify_from_text(piece, call, usual, compiler, 1 if gpus else 2)
        except EagerRefusedError:
            verify_from_text(piece, call, usual, compiler, 1)


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
