"""One compile worker as its parent sees it: a process, the pipes to it, its folder and its end.

The program that runs in it is `worker`; which jobs it gets, and for how long, says `service`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from precast.background.child import start_child
from precast.background.limits import end_process
from precast.background.usage import processes_of
from precast.cache.scratch import OwnFolder
from precast.errors import CompileCrashedError

_TERMINATE_S = 1.0  # Between asking a worker to end and making it.
START_S = 120.0  # For a worker's imports: 9 s on a cold machine with a GPU.
_STDERR_BYTES = 4000
_SAMPLE_S = 0.2


class WorkerProcess:
    """One worker process and the pipes to it. Used by one thread."""

    def __init__(self, environment: Mapping[str, str], memory_bytes: int | None, nice: int) -> None:
        """Start the process.

        Raises:
            OSError: The system gives no process, file or folder.
        """
        with contextlib.ExitStack() as undo:
            self._stderr: IO[bytes] = undo.enter_context(tempfile.TemporaryFile())
            # Should both be killed, the next collection of a cache removes it.
            self._own_folder = OwnFolder("worker")
            undo.callback(self._own_folder.close)
            self._folder = self._own_folder.make()
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._process = self._begin(environment, memory_bytes, nice)
            undo.pop_all()  # `end` closes them.
        self.pid = self._process.pid
        self._known: set[int] = set()
        self._buffer = b""
        self._is_ready = False
        self._is_ended = False
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def _begin(
        self, environment: Mapping[str, str], memory_bytes: int | None, nice: int
    ) -> subprocess.Popen[bytes]:
        env = {
            **{name: value for name, value in os.environ.items() if name != "TMPDIR"},
            # A killed g++ leaves its files behind: it asks TMPDIR, then TMP for a place. Python
            # asks TEMP before TMP, and what Inductor shares between processes lies there.
            "TMP": self._folder,
            "TEMP": tempfile.gettempdir(),
            # A second line behind the watch, for what grows faster than it looks. Twice as much:
            # it counts what a process has reserved, used or not.
            "PRECAST_WORKER_MEMORY": "" if memory_bytes is None else str(2 * memory_bytes),
            "PRECAST_DISABLE": "",
            "TORCH_WARM_POOL": "0",  # Inductor's own pool of workers.
            **environment,
        }
        return start_child("precast.background.worker", nice, env, self._stderr, self._folder)

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def wait_until_ready(self, clock: Callable[[], float], stop: threading.Event) -> bool:
        """Wait for the worker's imports, outside of a piece's own time; return whether they ended.

        False: `stop` is set, or they take too long. One that dies is found out by the next `send`
        or `receive`.
        """
        if self._is_ready:
            return True
        try:
            answer = self.receive(clock() + START_S, clock, stop)
        except EOFError:
            return True
        self._is_ready = answer is not None
        return self._is_ready

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message.

        Raises:
            BrokenPipeError: The worker is gone.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def receive(
        self,
        deadline: float,
        clock: Callable[[], float],
        stop: threading.Event,
        watch: Callable[[], None] = lambda: None,
    ) -> dict[str, Any] | None:
        """Return the next message; None when the time is over or `stop` is set.

        `watch` is called several times a second; what it raises ends the waiting.

        Raises:
            EOFError: The worker is gone.
        """
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            left = deadline - clock()
            if left <= 0 or stop.is_set():
                return None
            watch()
            if self._selector.select(min(left, _SAMPLE_S)):
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
        if code is not None and code < 0:
            return CompileCrashedError(piece, compiler, signal=-code, stderr=said)
        return CompileCrashedError(piece, compiler, exit_code=code, stderr=said)

    def kill(self) -> None:
        """Kill the worker and all that it started; returns at once. From any thread."""
        self._signal(signal.SIGKILL)

    def end(self) -> None:
        """Terminate the worker and what it started, then kill it. Returns when it is gone."""
        if self._is_ended:  # Its number may be another process's by now.
            return
        self._is_ended = True
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERMINATE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.remove_folder(0.0)

    def remove_folder(self, patience_s: float) -> None:
        """Remove the worker's temporary files, once it is gone or patience is at its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._own_folder.close()

    def _signal(self, kind: signal.Signals) -> None:
        # The tree as well as the group: a child may have made a group of its own.
        self._known |= processes_of(self.pid, self._known)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, kind)
        if kind == signal.SIGKILL:
            for pid in self._known - {self.pid}:
                end_process(pid)
