"""A compiler manager for tests, with a compiler and workers that are planted in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from precast.cache import DiskCache, open_cache
from precast.cache.trust import NO_KEYS, Trust
from precast.compilers.interface import CompiledPiece
from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.config import CompilationConfig
from precast.errors import CompileTimeoutError
from precast.events import Event
from precast.graph.piece import Piece
from precast.manager import CompilerManager
from precast.passes.chosen import choose
from unit.compilers.example_pieces import TINY


class Planted:
    """A compiler whose code multiplies by what its one file says; `fails` makes it raise."""

    name = "planted"

    def __init__(self, *, is_saveable: bool = True, fails: bool = False) -> None:
        self.is_saveable = is_saveable
        self.fails = fails
        self.num_loads = 0

    def identity(self) -> Mapping[str, str]:
        return {"compiler": "planted", "adaptor": "1"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        path = Path(directory) / "factor"
        path.write_text("3")
        return CompiledPiece({"factor": str(path)}, {})

    def load(self, details: Any, files: Mapping[str, str], piece: Piece | None) -> Any:
        if self.fails:
            raise RuntimeError("no such luck")
        self.num_loads += 1
        factor = float(Path(files["factor"]).read_text()) if files else 1.0
        return lambda inputs: [inputs[0] * factor]


class PlantedWithoutPickle(Planted):
    unpickles = False


class HereService:
    """Runs jobs at once, in this process, with one compiler."""

    def __init__(self, compiler: Planted, answer: Any = None) -> None:
        self.compiler = compiler
        self.answer = answer
        self.jobs: list[CompileJob] = []
        self.num_closed = 0

    def prestart(self, n: int | None = None) -> None:
        pass

    def submit(self, job: CompileJob) -> Future[JobResult]:
        self.jobs.append(job)
        future: Future[JobResult] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        elif self.answer is not None:
            future.set_result(self.answer)
        else:
            made = self.compiler.compile(Piece.from_json(job.piece), job.directory)
            future.set_result(
                JobResult(
                    compiler="planted",
                    files=made.files,
                    details=made.details,
                    seconds=2.0,
                    verify=None,
                    failures=(),
                    worker_pid=1,
                )
            )
        return future

    def close(self) -> None:
        self.num_closed += 1


class SlowService(HereService):
    """Takes its time, in a thread of its own, as workers do."""

    def __init__(self, compiler: Planted, answer: Any, takes_s: float) -> None:
        super().__init__(compiler, answer)
        self.takes_s = takes_s
        self.is_started = threading.Event()

    def submit(self, job: CompileJob) -> Future[JobResult]:
        self.is_started.set()
        future: Future[JobResult] = Future()

        def run() -> None:
            time.sleep(self.takes_s)
            inner = super(SlowService, self).submit(job)
            if inner.exception() is not None:
                future.set_exception(inner.exception())
            else:
                future.set_result(inner.result())

        threading.Thread(target=run).start()
        return future


class SharedCache(DiskCache):
    """A tier that others may write to."""

    is_shared = True


class Setup:
    def __init__(
        self,
        root: Path,
        compiler: Any,
        answer: Any = None,
        shared: Path | None = None,
        trust: Trust = NO_KEYS,
        passes: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        self.events: list[Event] = []
        self.now_s = 1_000_000.0
        config = CompilationConfig(compiler=compiler, **settings)
        self.service = HereService(compiler, answer)
        self.loader, storage = open_cache(
            root,
            disabled=False,
            emit=self.events.append,
            clock=time.perf_counter,
            further_tiers=[] if shared is None else [SharedCache(shared, name="shared")],
            trust=trust,
        )
        self.manager = CompilerManager(
            config,
            self.loader,
            storage,
            self.events.append,
            lambda: self.service,
            wall_clock=lambda: self.now_s,
            passes=choose(passes),
        )

    def kinds(self, *wanted: type) -> list[str]:
        return [type(event).__name__ for event in self.events if isinstance(event, wanted)]


X = [torch.ones(2, 2)]


TIMEOUT = CompileTimeoutError("tiny", "planted", 600.0)


def refusal(*codes: str) -> JobResult:
    return JobResult(
        compiler=None,
        files={},
        details={},
        seconds=0.0,
        verify=None,
        failures=tuple(CompileFailure("planted", code, "no") for code in codes),
        worker_pid=1,
    )


def try_again(root: Path, answer: Any = None, **settings: Any) -> Setup:
    """Start anew, later by `after_s`, and compile `TINY`."""
    after_s = settings.pop("after_s", 60.0)
    setup = Setup(root, Planted(), answer, **settings)
    setup.now_s += after_s
    setup.manager.compile([TINY], ["tiny"])
    return setup
