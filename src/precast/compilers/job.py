"""One compilation as plain data: what a worker is asked, what it answers, and who may be asked.

Imports neither torch nor a compiler. `background.service` is the runner that uses processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from precast.values import Value

if TYPE_CHECKING:
    from concurrent.futures import Future


class CompileJob(Value, kw_only=True):
    """One piece to compile: `piece` as `Piece.to_json` gives it, `compilers` in order of trial.

    `directory` is made by the worker and belongs to the caller; `name` and `key` are for events.
    `is_reported` False: it only prepares a compilation, and is no event of its own.
    `passes` are messages of `precast.passes.chosen`: what runs before compiling, and
    `dump_passes` a folder for what they do.
    """

    piece: Mapping[str, Any]
    compilers: tuple[str, ...]
    directory: str
    verify: bool = True
    imports: tuple[str, ...] = ()
    passes: Sequence[Sequence[str]] = ()
    dump_passes: str | None = None
    name: str = "?"
    key: str = ""
    is_reported: bool = True


class CompileFailure(Value):
    """Why one compiler did not do it; `code` is one of `errors.REASON_CODES`."""

    compiler: str
    code: str
    message: str


class JobResult(Value, kw_only=True):
    """What came of a job. `compiler` None: all have failed, and `failures` says why.

    `verify` is None or has `max_abs_error`, `max_rel_error` and the `sizes` that were tried.
    `timing` is what `compilers.timing` measured, `source` what the compiler generated, as
    `compilers.sources` packs it.
    """

    compiler: str | None
    files: Mapping[str, str]
    details: Mapping[str, Any]
    seconds: float
    verify: Mapping[str, Any] | None
    failures: tuple[CompileFailure, ...]
    worker_pid: int
    peak_bytes: int | None = None
    timing: tuple[Mapping[str, Any], ...] = ()
    source: Mapping[str, str] | None = None


class JobRunner(Protocol):
    """Runs compile jobs, several at once, outside of the caller's thread."""

    def prestart(self, n: int | None = None) -> None:
        """Start workers now, so that their imports run while the caller does something else."""

    def submit(self, job: CompileJob) -> Future[JobResult]:
        """Queue a job. Its future gives the result, or raises a `CompileError`."""
        ...

    def close(self) -> None:
        """End all workers at once; futures that are not done are cancelled or fail."""
