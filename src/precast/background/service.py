"""Runs compile workers: several side by side, each with a deadline, none trusted to end by itself.

The parent owns time. A worker that is late is terminated, then killed, with its whole group (g++
too); one that died is replaced and its job tried once more. Nothing of what a worker answers is
unpickled. This module neither imports torch nor knows what is compiled.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.errors import CompileCrashedError, CompileError, CompileTimeoutError
from precast.events import CompileStarted, Emit

_TERMINATE_S = 1.0  # Between asking a worker to end and making it.
_START_S = 120.0  # For a worker's imports: 9 s on a cold machine with a GPU.
_STDERR_BYTES = 4000


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
    ) -> None:
        """Start nothing yet.

        Args:
            num_workers: How many pieces are compiled side by side.
            timeout_s: For one piece, all its compilers and a retry together; waiting in the queue
                does not count.
            memory_bytes: Of one worker, and of each of its children.
            emit: Is handed `CompileStarted`, from the service's threads.
            clock: Seconds that only go forward.
            environment: Added to the workers' environment.
        """
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._emit = emit
        self._clock = clock
        self._environment = dict(environment or {})
        self._jobs: queue.SimpleQueue[tuple[CompileJob, Future[JobResult]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._waiting = 0
        self._is_closed = threading.Event()

    def prestart(self, n: int | None = None) -> None:
        """Start workers now, so that their imports run while the caller does something else."""
        with self._lock:
            wanted = min(self._num_workers if n is None else n, self._num_workers)
            while len(self._threads) < wanted:
                self._add_thread()

    def submit(self, job: CompileJob) -> Future[JobResult]:
        """Queue a job. Its future gives a `JobResult`, or raises what ended the worker.

        Raises (from the future):
            CompileTimeoutError: It was not finished after `timeout_s`.
            CompileCrashedError: Its worker died twice, whichever compiler was tried.
        """
        if self._is_closed.is_set():
            raise RuntimeError("the compile service is closed")
        future: Future[JobResult] = Future()
        with self._lock:
            self._waiting += 1
            if self._waiting > self._idle and len(self._threads) < self._num_workers:
                self._add_thread()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """End all workers at once; futures that are not done are cancelled or fail."""
        self._is_closed.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
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

    def _add_thread(self) -> None:
        # The thread lives as long as its worker: for Linux a worker's parent is a thread.
        thread = threading.Thread(target=self._serve, name="precast-compile", daemon=True)
        self._threads.append(thread)
        self._idle += 1
        thread.start()

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            worker = self._start()
            while (item := self._jobs.get()) is not None and not self._is_closed.is_set():
                job, future = item
                with self._lock:
                    self._waiting -= 1
                    self._idle -= 1
                if future.set_running_or_notify_cancel():
                    try:
                        result, worker = self._run(job, worker)
                        future.set_result(result)
                    except BaseException as error:  # noqa: BLE001 - it belongs to the future.
                        future.set_exception(error)
                with self._lock:
                    self._idle += 1
            if item is not None:
                item[1].cancel()
        finally:
            if worker is not None:
                worker.end()

    def _start(self) -> _Worker:
        return _Worker(self._environment, self._memory_bytes)

    def _run(self, job: CompileJob, worker: _Worker | None) -> tuple[JobResult, _Worker]:
        """Run one job to its end; a crash is tried once more, then with the other compilers."""
        if worker is None or not worker.is_alive:
            worker = self._start()
        worker.wait_until_ready(self._clock, self._is_closed)
        deadline = self._clock() + self._timeout_s
        left = list(job.compilers)
        failures: list[CompileFailure] = []
        num_crashes = attempt = 0
        while True:
            directory = str(Path(job.directory) / str(attempt))
            request = {
                "id": attempt,
                "piece": dict(job.piece),
                "compilers": left,
                "directory": directory,
                "verify": job.verify,
                "imports": list(job.imports),
                "is_retry": num_crashes > 0,
            }
            current = left[0] if left else "worker"
            try:
                worker.send(request)
                while True:
                    answer = worker.receive(deadline, self._clock, self._is_closed)
                    if answer is None:
                        worker.end()
                        if self._is_closed.is_set():
                            raise CompileError(job.name, current, "the compile service was closed")
                        raise CompileTimeoutError(job.name, current, self._timeout_s)
                    if answer.get("id") != attempt:
                        continue
                    if "started" in answer:
                        current = answer["started"]
                        self._emit(CompileStarted(job.name, job.key, current))
                        continue
                    failures += [CompileFailure(**failure) for failure in answer["failures"]]
                    return self._result(answer, failures, worker.pid), worker
            except (BrokenPipeError, EOFError):
                crash = worker.crash(job.name, current)
                num_crashes += 1
                if num_crashes > 1:
                    # The other compilers may do better; what crashed twice is not tried again.
                    failures.append(CompileFailure(current, crash.code, crash.summary))
                    left = left[left.index(current) + 1 :] if current in left else []
                    num_crashes = 0
                    if not left:
                        raise crash from None
                attempt += 1
                worker = self._start()
                worker.wait_until_ready(self._clock, self._is_closed)

    @staticmethod
    def _result(answer: Mapping[str, Any], failures: list[CompileFailure], pid: int) -> JobResult:
        return JobResult(
            compiler=answer.get("compiler"),
            files=answer.get("files", {}),
            details=answer.get("details", {}),
            seconds=answer.get("seconds", 0.0),
            verify=answer.get("verify"),
            failures=tuple(failures),
            worker_pid=pid,
            peak_bytes=answer.get("peak_bytes"),
        )


class _Worker:
    """One worker process and the pipes to it. Used by one thread."""

    def __init__(self, environment: Mapping[str, str], memory_bytes: int | None) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`.
        env = {
            **os.environ,
            # What this process can import, a worker can: user's operators live in their packages.
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            "PRECAST_WORKER_PARENT": str(os.getpid()),
            "PRECAST_WORKER_MEMORY": "" if memory_bytes is None else str(memory_bytes),
            "PRECAST_DISABLE": "",
            "TORCH_WARM_POOL": "0",  # Inductor's own pool of workers.
            **environment,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "precast.background.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,  # A group of its own, so that g++ can be ended with it.
        )
        self.pid = self._process.pid
        self._buffer = b""
        self._is_ready = False
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, clock: Callable[[], float], stop: threading.Event) -> None:
        """Wait for the worker's imports, outside of a piece's own time. One that dies is found out
        by the next `send` or `receive`.
        """
        if self._is_ready:
            return
        with contextlib.suppress(EOFError):
            answer = self.receive(clock() + _START_S, clock, stop)
            self._is_ready = answer is not None and "ready" in answer

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def receive(
        self, deadline: float, clock: Callable[[], float], stop: threading.Event
    ) -> dict[str, Any] | None:
        """Return the next message; None when the time is over or `stop` is set.

        Raises:
            EOFError: The worker is gone.
        """
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            left = deadline - clock()
            if left <= 0 or stop.is_set():
                return None
            if self._selector.select(min(left, 0.2)):
                chunk = self._process.stdout.read(1 << 16)
                if chunk == b"":
                    raise EOFError
                self._buffer += chunk or b""
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def crash(self, piece: str, compiler: str) -> CompileCrashedError:
        """Wait for a worker that is ending; return what it died of."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TERMINATE_S)
        code = self._process.poll()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_BYTES))
        said = self._stderr.read().decode(errors="replace")
        self.end()
        if code is not None and code < 0:
            return CompileCrashedError(piece, compiler, signal=-code, stderr=said)
        return CompileCrashedError(piece, compiler, exit_code=code, stderr=said)

    def end(self) -> None:
        """Terminate the worker's group, then kill it. Returns when it is gone."""
        for kind, patience in ((signal.SIGTERM, _TERMINATE_S), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, kind)
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
