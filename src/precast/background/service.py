"""Runs compile workers: several side by side, each with a deadline, none trusted to end by itself.

The parent owns time and memory. A worker that is late or too large is ended, with its children
(g++ too); one that died is replaced and its job tried once more. Nothing of what a worker answers
is unpickled. This module neither imports torch nor knows what is compiled. How one worker is
started, talked to and ended is in `worker_process`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from precast.background.limits import NICE
from precast.background.usage import UsageMeter
from precast.background.worker_process import START_S, WorkerProcess
from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.errors import (
    CompileError,
    CompileMemoryError,
    CompileTimeoutError,
    CompileUnavailableError,
    PrecastError,
    in_words,
)
from precast.events import CompileStarted, Emit, JobFinished

_ORPHAN_S = 10  # Beyond a job's deadline; by then its parent has ended it, or is gone.
_LONGEST_S = 1 << 30  # What an alarm takes; 34 years are no limit either.
# At least, for a job that only prepares a compilation (it cuts a piece): a low limit is meant for
# compilers, and a busy machine may take as long to import what cuts.
_PREPARING_S = 60.0
_EXIT_S = 0.5  # For killed workers to be gone, at the interpreter's exit.


class CompileService:
    """A queue of jobs before a few workers. Use as a context manager, or call `close`."""

    def __init__(
        self,
        num_workers: int,
        timeout_s: float = 600.0,
        memory_bytes: int | None = None,
        emit: Emit = lambda _event: None,
        clock: Callable[[], float] = time.monotonic,
        environment: Mapping[str, str] | None = None,
        devices: Sequence[str] = (),
        nice: int = NICE,
    ) -> None:
        """Start nothing yet.

        Args:
            num_workers: How many pieces are compiled side by side.
            timeout_s: For one piece, all its compilers and a retry together; waiting in the queue
                does not count. A job that only prepares has at least 60 s.
            memory_bytes: Of one worker with all its children.
            emit: Is handed `CompileStarted` and `JobFinished`, from the service's threads.
            clock: Seconds that only go forward.
            environment: Added to the workers' environment.
            devices: GPUs as CUDA_VISIBLE_DEVICES names them; each worker sees one, in turn.
            nice: How much lower than ours the workers' priority is.
        """
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._emit = emit
        self._clock = clock
        self._environment = dict(environment or {})
        self._devices = tuple(devices)
        self._nice = nice
        self._is_closed = threading.Event()
        self._begin()

    def _begin(self) -> None:
        """Hold no worker: a new service, or one in a process that was forked from another."""
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[tuple[CompileJob, Future[JobResult]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: list[WorkerProcess] = []
        self._idle = 0
        self._waiting = 0

    def _begin_in_fork(self) -> None:
        # The workers are the other process's: a pipe that two read from serves neither.
        if os.getpid() != self._pid:
            self._begin()

    def prestart(self, n: int | None = None) -> None:
        """Start workers now, so that their imports run while the caller does something else."""
        self._begin_in_fork()
        with self._lock, contextlib.suppress(RuntimeError):  # Of no thread `submit` tells.
            wanted = min(self._num_workers if n is None else n, self._num_workers)
            while len(self._threads) < wanted:
                self._add_thread()

    def submit(self, job: CompileJob) -> Future[JobResult]:
        """Queue a job. Its future gives a `JobResult`, or raises what ended the worker.

        Raises (from the future):
            CompileTimeoutError: It was not finished after `timeout_s`.
            CompileMemoryError: Its worker held more than `memory_bytes`.
            CompileCrashedError: Its worker died twice, whichever compiler was tried.
            CompileUnavailableError: There is no worker to be had, or what goes with one.
        """
        self._begin_in_fork()
        if self._is_closed.is_set():
            raise RuntimeError("the compile service is closed")
        future: Future[JobResult] = Future()
        with self._lock:
            if self._waiting >= self._idle and len(self._threads) < self._num_workers:
                try:
                    self._add_thread()
                except RuntimeError as error:
                    if not self._threads:  # Nobody would ever take it.
                        future.set_exception(_unavailable(job, error))
                        return future
            self._waiting += 1
        self._jobs.put((job, future))
        # Last in, first out: workers must be gone before anybody removes the job's folder.
        atexit.unregister(self._end_at_exit)
        atexit.register(self._end_at_exit)
        return future

    def close(self) -> None:
        """End all workers at once; futures that are not done are cancelled or fail."""
        self._begin_in_fork()
        self._is_closed.set()
        atexit.unregister(self._end_at_exit)
        self._kill_workers()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # A listener may release the model.
                thread.join()
        while True:
            try:
                item = self._jobs.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item[1].cancel()

    def __enter__(self) -> CompileService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_at_exit(self) -> None:
        """Leave no process and no folder behind; the threads are beyond waiting for."""
        if os.getpid() != self._pid:
            return
        self._is_closed.set()
        for worker in self._kill_workers():
            worker.remove_folder(_EXIT_S)

    def _kill_workers(self) -> list[WorkerProcess]:
        # With the lock no thread starts another one; none does once `_is_closed` is set.
        with self._starting:
            for worker in self._workers:
                worker.kill()
            return list(self._workers)

    def _add_thread(self) -> None:
        # The thread lives as long as its worker: for Linux a worker's parent is a thread.
        thread = threading.Thread(
            target=self._serve, args=(len(self._threads),), name="precast-compile", daemon=True
        )
        thread.start()  # Raises RuntimeError where the machine has no thread left.
        self._threads.append(thread)
        self._idle += 1

    def _serve(self, number: int) -> None:
        worker: WorkerProcess | None = None
        try:
            with contextlib.suppress(Exception):  # A job tries again, and says what is wrong.
                worker = self._start(number)
            while not self._is_closed.is_set():  # By a listener perhaps, in this thread.
                item = self._jobs.get()
                if item is None:
                    break
                job, future = item
                if self._is_closed.is_set():
                    future.cancel()
                    break
                with self._lock:
                    self._waiting -= 1
                    self._idle -= 1
                if future.set_running_or_notify_cancel():
                    try:
                        if worker is None or not worker.is_alive:
                            ended, worker = worker, None
                            if ended is not None:
                                self._end(ended)
                            worker = self._start(number)
                        run = _Run(job, worker)
                        try:
                            result = self._run(run, number)
                        finally:
                            worker = run.worker
                        future.set_result(result)
                    except CompileError as error:
                        future.set_exception(error)
                    except BaseException as error:  # noqa: BLE001 - the thread lives on.
                        future.set_exception(_unavailable(job, error))
                        # It may be at this job still, and would answer the next one with it.
                        ended, worker = worker, None
                        if ended is not None:
                            with contextlib.suppress(Exception):
                                self._end(ended)
                with self._lock:
                    self._idle += 1
        finally:
            if worker is not None:
                self._end(worker)

    def _start(self, number: int) -> WorkerProcess:
        environment = self._environment
        if self._devices:
            device = self._devices[number % len(self._devices)]
            environment = {**environment, "CUDA_VISIBLE_DEVICES": device}
        with self._starting:
            if self._is_closed.is_set():
                raise CompileError("?", "worker", "the compile service was closed")
            worker = WorkerProcess(environment, self._memory_bytes, self._nice)
            self._workers.append(worker)
        return worker

    def _end(self, worker: WorkerProcess) -> None:
        worker.end()
        with self._starting:
            if worker in self._workers:
                self._workers.remove(worker)

    def _run(self, run: _Run, number: int) -> JobResult:
        """Run one job to its end, and tell of it."""
        self._wait_until_ready(run)
        started = self._clock()
        code: str | None = "compile-crashed"
        compiler = None
        try:
            result = self._try(run, number, started + self._limit_s(run.job))
            compiler = result.compiler
            code = None if compiler is not None else result.failures[-1].code
            return result
        except PrecastError as error:
            code = error.code
            raise
        finally:
            run.note()
            if run.job.is_reported:
                self._emit(
                    JobFinished(
                        run.job.name,
                        run.job.key,
                        compiler,
                        code,
                        self._clock() - started,
                        run.cpu_seconds,
                        run.peak_bytes,
                        run.written_bytes,
                        run.attempts + 1,
                        run.worker.pid,
                    )
                )

    def _wait_until_ready(self, run: _Run) -> None:
        if run.worker.wait_until_ready(self._clock, self._is_closed):
            return
        self._end(run.worker)  # It reads nothing, and what is sent fits into no pipe, perhaps.
        if self._is_closed.is_set():
            raise CompileError(run.job.name, "worker", "the compile service was closed")
        raise CompileUnavailableError(
            run.job.name, "worker", f"it was not ready after {START_S:g} s"
        )

    def _limit_s(self, job: CompileJob) -> float:
        return self._timeout_s if job.is_reported else max(self._timeout_s, _PREPARING_S)

    def _try(self, run: _Run, number: int, deadline: float) -> JobResult:
        """Run one job; a crash is tried once more, then with the other compilers."""
        job = run.job
        left = list(job.compilers)
        failures: list[CompileFailure] = []
        num_crashes = 0
        while True:
            request = {
                "id": run.attempts,
                "piece": dict(job.piece),
                "compilers": left,
                "directory": str(Path(job.directory) / str(run.attempts)),
                "verify": job.verify,
                "imports": list(job.imports),
                "passes": list(job.passes),
                "dump_passes": job.dump_passes,
                "is_retry": num_crashes > 0,
                "last_s": int(min(max(1.0, deadline - self._clock()), _LONGEST_S)) + _ORPHAN_S,
            }
            current = left[0] if left else "worker"
            worker, meter = run.worker, UsageMeter(run.worker.pid, self._memory_bytes)
            run.meters.append(meter)

            def watch(worker: WorkerProcess = worker, meter: UsageMeter = meter) -> None:
                held = meter.look()
                if self._memory_bytes is not None and (held or 0) > self._memory_bytes:
                    self._end(worker)
                    raise CompileMemoryError(
                        job.name,
                        current,  # noqa: B023 - the compiler that runs now.
                        self._memory_bytes,
                        meter.peak_bytes,
                    )

            try:
                worker.send(request)
                while True:
                    answer = worker.receive(deadline, self._clock, self._is_closed, watch)
                    if answer is None:
                        self._end(worker)
                        if self._is_closed.is_set():
                            raise CompileError(job.name, current, "the compile service was closed")
                        raise CompileTimeoutError(job.name, current, self._limit_s(job))
                    if answer.get("id") != run.attempts:
                        continue
                    if "started" in answer:
                        current = answer["started"]
                        if job.is_reported:
                            self._emit(CompileStarted(job.name, job.key, current, worker.pid))
                        continue
                    failures += [CompileFailure(**failure) for failure in answer["failures"]]
                    meter.look(is_last=True)
                    return self._result(answer, failures, worker.pid, run.peak_bytes)
            except (BrokenPipeError, EOFError):
                if self._is_closed.is_set():
                    self._end(worker)
                    raise CompileError(
                        job.name, current, "the compile service was closed"
                    ) from None
                crash = worker.crash(job.name, current)
                self._end(worker)
                num_crashes += 1
                if num_crashes > 1:
                    # The other compilers may do better; what crashed twice is not tried again.
                    failures.append(CompileFailure(current, crash.code, crash.summary))
                    left = left[left.index(current) + 1 :] if current in left else []
                    num_crashes = 0
                    if not left:
                        raise crash from None
                run.attempts += 1
                run.worker = self._start(number)
                self._wait_until_ready(run)

    @staticmethod
    def _result(
        answer: Mapping[str, Any],
        failures: list[CompileFailure],
        pid: int,
        peak_bytes: int | None,
    ) -> JobResult:
        return JobResult(
            compiler=answer.get("compiler"),
            files=answer.get("files", {}),
            details=answer.get("details", {}),
            seconds=answer.get("seconds", 0.0),
            verify=answer.get("verify"),
            failures=tuple(failures),
            worker_pid=pid,
            peak_bytes=peak_bytes,
            timing=tuple(answer.get("timing", ())),
            source=answer.get("source"),
        )


def _unavailable(job: CompileJob, error: BaseException) -> CompileUnavailableError:
    """Return what a job is told of an error that is neither its own nor its worker's."""
    return CompileUnavailableError(job.name, "worker", in_words(error))


class _Run:
    """One job on its way: the worker that has it now, and what all of them took."""

    def __init__(self, job: CompileJob, worker: WorkerProcess) -> None:
        self.job = job
        self.worker = worker
        self.attempts = 0
        self.meters: list[UsageMeter] = []
        self.cpu_seconds: float | None = None
        self.written_bytes: int | None = None

    @property
    def peak_bytes(self) -> int | None:
        return max((m.peak_bytes for m in self.meters if m.peak_bytes is not None), default=None)

    def note(self) -> None:
        """Add up what the workers of all attempts took."""
        times = [m.cpu_seconds for m in self.meters if m.cpu_seconds is not None]
        written = [m.written_bytes for m in self.meters if m.written_bytes is not None]
        self.cpu_seconds = sum(times) if times else None
        self.written_bytes = sum(written) if written else None
