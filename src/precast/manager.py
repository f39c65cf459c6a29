"""Find or compile pieces: look up, compile on a miss in worker processes, verify, save, load.

One manager serves one compiled model. It is the only part that knows compilers, cache and
workers at once; what to do with the pieces is the backend's business. Each step is a part of its
own, and here they are joined:

    look up        stored_pieces.py; a failure that is remembered: cache/failures.py
    on a miss      on_miss/: in_turn.py, since what several processes miss at once, one compiles
    compile        on_miss/in_workers.py, in_process.py, in_parts.py; a worker also verifies
    save, load     stored_pieces.py
    or run eager   on_miss/fallback.py

What is in `on_miss` is imported on the first miss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from precast.behind import give_way
from precast.cache.failures import FailureMemory
from precast.cache.trust import is_unsigned
from precast.compilers.chosen import ChosenCompilers
from precast.errors import Reason
from precast.passes.chosen import NO_PASSES, CannotSend, ChosenPasses
from precast.stored_pieces import StoredPieces

if TYPE_CHECKING:
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from precast.cache import CacheLoader, CacheStorage
    from precast.compilers.job import CompileJob, JobResult, JobRunner
    from precast.config import CompilationConfig
    from precast.events import Emit
    from precast.graph.piece import Piece
    from precast.on_miss.fallback import Fallback
    from precast.on_miss.in_process import InProcess
    from precast.on_miss.in_turn import Turns
    from precast.on_miss.in_workers import InWorkers
    from precast.on_miss.miss import Miss
    from precast.piece_result import PieceResult

ResultT = TypeVar("ResultT")
MadeT = TypeVar("MadeT")
#: A piece that is too large is cut in two, and each part again, up to so many.
MAX_PARTS = 8
_ONLY_FIRST_GPU = Reason(
    "compile-failed",
    "code of this compiler runs on the first visible GPU only; on others the piece runs eager",
    'Use compiler="auto", or let each process see one GPU (CUDA_VISIBLE_DEVICES)',
)


class _made_once(Generic[MadeT]):  # noqa: N801 - a decorator.
    """`functools.cached_property` without its lock.

    Before Python 3.12 all objects share that lock, and a process that forks while another thread
    holds it has it locked for ever. Here two threads may make a value twice, and one is kept.
    """

    def __init__(self, make: Callable[[Any], MadeT]) -> None:
        self._make = make

    def __get__(self, instance: Any, owner: type) -> MadeT:
        name = self._make.__name__
        made: MadeT = instance.__dict__.setdefault(name, self._make(instance))
        return made


class CompilerManager:
    """Finds or compiles pieces, by the configuration of one model.

    `compilers` are those to try, `stored` the pieces that the cache has, `failures` what could not
    be compiled before.
    """

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
        self.compilers = ChosenCompilers(config, passes)
        self.failures = FailureMemory(config, loader, storage, wall_clock)
        self.stored = StoredPieces(
            self.compilers, loader, storage, emit, clock, keep_slower=config.keep_slower
        )
        self._config = config
        self._passes = passes
        self._storage = storage
        self._emit = emit
        self._clock = clock
        self._make_service = make_service
        self._service: JobRunner | None = None

    # -- finding and compiling ---------------------------------------------------

    def compile(
        self,
        pieces: Sequence[Piece],
        names: Sequence[str],
        *,
        order: Sequence[int] | None = None,
        on_result: Callable[[int, PieceResult], None] = lambda _number, _result: None,
        max_parts: int = MAX_PARTS,
        may_wait: bool = True,
        is_wanted: Callable[[], bool] = lambda: True,
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
            is_wanted: Asked about once a second; where not, all workers are ended, as by `close`.
        """
        results: dict[int, PieceResult] = {}

        def take(number: int, result: PieceResult) -> None:
            results[number] = result
            on_result(number, result)

        numbers = order or range(len(pieces))
        for i in numbers:
            give_way()
            found = self._look_up(pieces[i], names[i])
            if found is not None:
                take(i, found)
        missing = [i for i in numbers if i not in results]
        if missing:
            from precast.on_miss.miss import Miss

            misses = [Miss(i, pieces[i], names[i], self.compilers) for i in missing]
            for miss in misses:
                give_way()
                miss.report(self._emit)
            self._answer_misses(
                misses,
                lambda miss, result: take(miss.number, result),
                max_parts,
                may_wait,
                is_wanted,
            )
        return [results[i] for i in range(len(pieces))]

    def _look_up(self, piece: Piece, name: str) -> PieceResult | None:
        names = self.compilers.names_here(piece)
        if self.compilers.are_eager or not names:
            from precast.piece_result import eager_result

            return eager_result(piece, None if names else _ONLY_FIRST_GPU)
        return self.stored.find(piece, name)

    def _answer_misses(
        self,
        misses: Sequence[Miss],
        take: Callable[[Miss, PieceResult], None],
        max_parts: int,
        may_wait: bool,
        is_wanted: Callable[[], bool],
    ) -> None:
        """Compile what the cache does not have, where the settings and the compilers allow it."""
        if self._config.mode == "cache_only":
            from precast.piece_result import eager_result

            reason = self._reason_for_no_compile()
            for miss in misses:
                take(miss, eager_result(miss.piece, reason))
            return
        in_process = self.compilers.in_process
        if in_process is not None:
            for miss in misses:
                remembered = self._fallback.recall(miss.piece, miss.name, miss.work)
                take(
                    miss,
                    self._in_process.compile(miss.piece, miss.name, in_process, miss.work)
                    if remembered is None
                    else remembered,
                )
            return
        try:
            self._passes.messages()
        except CannotSend as problem:
            for miss in misses:
                take(miss, self._in_process.compile_unsent(miss.piece, miss.name, str(problem)))
            return
        self._compile_in_workers(misses, take, max_parts, may_wait, is_wanted)

    def _reason_for_no_compile(self) -> Reason:
        return Reason(
            "cache-disabled" if self._config.disable_compile_cache else "not-recorded",
            'mode="cache_only" found no artifact; the piece runs eager',
            'Fill the cache with mode="blocking" first',
        )

    def _compile_in_workers(
        self,
        misses: Sequence[Miss],
        take: Callable[[Miss, PieceResult], None],
        max_parts: int,
        may_wait: bool,
        is_wanted: Callable[[], bool],
    ) -> None:
        """Compile what no other process compiles now, and wait for the rest."""
        from precast.cache.scratch import OwnFolder
        from precast.on_miss.in_workers import Batch

        service = self._ensure_service()

        def is_open() -> bool:
            if self._service is service and not is_wanted():
                self.close()
            return self._service is service

        with closing(OwnFolder("compile")) as folder:
            batch = Batch(
                self._in_workers,
                folder,
                take,
                is_open,
                max_parts=max_parts,
                may_wait=may_wait,
            )
            self._turns.share(misses, batch)

    def turn(
        self, work: str, is_new: Callable[[], bool], look: Callable[[], ResultT | None]
    ) -> AbstractContextManager[ResultT | None]:
        """Let one process at a time do a piece of work; give what another one made of it.

        Inside the block the work is ours to do if None was given: under its lease, unless it has
        been waited for too long or is known to leave nothing that others could use.

        Args:
            work: Names the work: a key of the cache.
            is_new: Whether there is something that was not there before; asked again and again.
            look: Looks for the result; None: it is not there.
        """
        return self._turns.take(
            work,
            has_failed=lambda: self.failures.recall(work) is not None,
            is_new=is_new,
            look=look,
            is_in_vain=lambda: self.stored.has_refused,
        )

    def save(self, key: str, payload: Mapping[str, Any]) -> None:
        """Publish what is no artifact of a piece: an assembly."""
        if any(is_unsigned(record) for record in payload["pieces"]):
            payload = {**payload, "unsigned": True}  # Nobody vouches for the whole either.
        self._storage.publish(key, payload, {})

    # -- what only a miss needs ----------------------------------------------------

    @_made_once
    def _turns(self) -> Turns:
        from precast.on_miss.in_turn import Turns

        limit_s = self._config.lease_wait
        if limit_s is None:
            limit_s = self._config.max_compile_time
        return Turns(self._storage.open_leases, limit_s, self._emit, self._clock)

    @_made_once
    def _fallback(self) -> Fallback:
        from precast.on_miss.fallback import Fallback

        raises = self._config.on_error == "raise"
        return Fallback(self.compilers, self.failures, self._emit, raises=raises)

    @_made_once
    def _in_process(self) -> InProcess:
        from precast.on_miss.in_process import InProcess

        return InProcess(
            self._config, self.compilers, self._passes, self._fallback, self._emit, self._clock
        )

    @_made_once
    def _in_workers(self) -> InWorkers:
        from precast.on_miss.in_parts import InParts
        from precast.on_miss.in_workers import InWorkers

        return InWorkers(
            self._config,
            self.compilers,
            self._passes,
            self.stored,
            self.failures,
            self._fallback,
            self._in_process,
            InParts(self.compilers, self._storage, self._emit, self._submit, self.compile),
            self._emit,
            self._submit,
        )

    # -- workers -------------------------------------------------------------------

    def prestart(self) -> None:
        """Start workers now, so that their imports run beside the capture.

        One beside a model that serves: several that import at once slow its calls down, and nobody
        waits for the rest.
        """
        compilers = self.compilers
        if not compilers.are_eager and any(
            compilers.make(name).is_saveable for name in compilers.names
        ):
            most = 1 if self._config.mode == "progressive" else 4
            self._ensure_service().prestart(min(self._config.num_compile_workers(), most))

    def close(self) -> None:
        """End the workers. From any thread: a `compile` that is under way comes to its end."""
        service, self._service = self._service, None
        if service is not None:
            service.close()

    def _submit(self, job: CompileJob) -> Future[JobResult]:
        return self._ensure_service().submit(job)

    def _ensure_service(self) -> JobRunner:
        if self._service is None:
            self._service = self._make_service()
        return self._service
