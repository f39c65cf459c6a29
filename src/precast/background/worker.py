"""The compile worker, a process that `child.py` starts. Reads jobs, answers results.

One job a line on standard input, as JSON; answers are lines of JSON on the descriptor that was
standard output when we started. What compilers print goes to standard error.

    job:      {"id", "piece", "compilers": [name or "module:attribute"], "directory", "verify",
               "imports": [module], "passes": [[kind, text]], "dump_passes", "is_retry",
               "last_s": seconds after which the process is ended, whatever it does}
    started:  {"id", "started": compiler}                      before each compiler
    answer:   {"id", "compiler", "files", "details", "seconds", "verify", "timing", "source",
               "failures"}
    failure:  {"id", "failures": [{"compiler", "code", "message"}]}

A worker verifies what it compiled: code that crashes takes the worker down, not a server. It knows
nothing of deadlines, retries and caches; its parent does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from precast.background.limits import limit_memory
from precast.compilers.interface import CompiledPiece
from precast.errors import CompileError
from precast.graph.piece import Piece, SymbolRange
from precast.passes.chosen import receive
from precast.passes.pass_manager import PassRun, PostGradPassManager
from precast.torch_private import SizesSpecializedError

_NO_MEMORY = re.compile(r"virtual memory exhausted|out of memory|[Cc]annot allocate memory")
_LONGEST_MESSAGE = 2000


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if os.environ.get("PRECAST_WORKER_WARM", "1") == "1":
        from precast.torch_private import prepare_inductor, warm_inductor

        prepare_inductor()  # Seconds of imports, before the first job is there.
        with contextlib.suppress(Exception):  # It is only early: a compile that needs it says so.
            warm_inductor()
    memory = os.environ.get("PRECAST_WORKER_MEMORY")
    limit_memory(int(memory) if memory else None)

    def answer(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    answer({"ready": os.getpid()})
    for line in sys.stdin:
        job = json.loads(line)
        # The parent ends what is late. Should it be gone, and this process stuck in code that keeps
        # Python's lock, only the kernel does.
        signal.alarm(job["last_s"])
        answer({"id": job["id"], **run_job(job, answer)})
        signal.alarm(0)


def run_job(job: Mapping[str, Any], answer: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Try the job's compilers in turn; return the answer without its id."""
    failures = []
    try:
        for module in job.get("imports", ()):
            import_module(module)
        piece = Piece.from_json(job["piece"])
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told.
        return {"failures": [_failure("worker", error)]}
    try:
        manager = PostGradPassManager(receive(job.get("passes", ())), job.get("dump_passes"))
        passes = manager.start(piece)
    except Exception as error:  # noqa: BLE001 - a pass is somebody else's code.
        return {"failures": [{**_failure("worker", error), "code": "pass-failed"}]}
    for number, name in enumerate(job["compilers"]):
        answer({"id": job["id"], "started": name})
        directory = Path(job["directory"]) / f"{number}-{name.rpartition(':')[2]}"
        started = time.monotonic()
        try:
            directory.mkdir(parents=True)
            result = _compile(name, piece, str(directory), job, passes)
        except Exception as error:  # noqa: BLE001 - compilers fail in every way there is.
            if _has_broken_device(error):
                # Every later call of this process would fail: it ends, and the job is tried again
                # in another one, without the sizes that may have done it.
                traceback.print_exc()
                os._exit(1)
            failures.append(_failure(name, error))
            continue
        seconds = time.monotonic() - started
        return {**result, "seconds": seconds, "failures": failures}
    return {"failures": failures}


def load_compiler(name: str) -> Any:
    """Return the compiler of a name: a built-in or plugged-in one, or `module:attribute`."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        return getattr(import_module(module), attribute)()
    from precast.plugins import load_plugin

    return load_plugin("compilers", name)()


def _compile(
    name: str, piece: Piece, directory: str, job: Mapping[str, Any], passes: PassRun
) -> dict[str, Any]:
    from precast.compilers.sources import pack
    from precast.compilers.timing import time_piece

    compiler = load_compiler(name)
    if compiler.is_saveable:
        # What Inductor leaves behind is of no use to others; folders of one service share it.
        scratch = Path(job["directory"]).parent / "inductor-scratch"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
    else:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)

    def compile_piece(improved: Piece) -> tuple[CompiledPiece, Piece]:
        folder = Path(directory)
        if left := len(list(folder.iterdir())):  # A pass has failed in the compiler: once more.
            folder /= f"without-{left}"
            folder.mkdir()
        return _compile_for_most_sizes(compiler, improved, str(folder))

    compiled, improved = passes.compile(compile_piece)
    # What it must compute is what the piece said before any pass.
    piece = dataclasses.replace(piece, symbols=improved.symbols)
    details = dict(compiled.details)
    if rows := passes.reports():
        details["passes"] = rows
    verified = None
    timing: list[dict[str, Any]] = []
    if job.get("verify", True):
        run = compiler.load(details, compiled.files, improved)
        verified = _verify(piece, run, details, name, is_retry=bool(job.get("is_retry")))
        timing = time_piece(piece, run, verified["sizes"])
    else:
        unproven = details.get("unproven", {})
        _leave_out(piece, details, [(name, n) for name, sizes in unproven.items() for n in sizes])
    details.pop("unproven", None)
    source = pack(details.pop("source", {}))
    return {
        "compiler": name,
        "files": dict(compiled.files),
        "details": details,
        "verify": verified,
        "timing": timing,
        "source": source,
    }


def _compile_for_most_sizes(
    compiler: Any, piece: Piece, directory: str
) -> tuple[CompiledPiece, Piece]:
    """Compile for all sizes that a piece asks for, or for those above 1; return for which.

    Some operators cannot be lowered where a size may be 0 or 1 (a slice from the end, say).
    """
    try:
        return compiler.compile(piece, directory), piece
    except Exception as error:
        usual = _without_small_sizes(piece)
        is_no_range = isinstance(error.__cause__, SizesSpecializedError)
        is_too_large = _failure("", error)["code"] == "compile-memory"
        if usual is None or is_no_range or is_too_large or _has_broken_device(error):
            raise
        try:
            second = Path(directory) / "above-1"
            second.mkdir()
            compiled = compiler.compile(usual, str(second))
        except Exception:  # noqa: BLE001 - the first failure is the one to report.
            raise error from None
    ranges = {name: [r.low, r.high] for name, r in usual.symbols.items()}
    details = {**compiled.details, "ranges": {**ranges, **compiled.details.get("ranges", {})}}
    return CompiledPiece(compiled.files, details), usual


def _without_small_sizes(piece: Piece) -> Piece | None:
    """Return a piece that asks for no sizes 0 and 1; None where it asks for none of them."""
    symbols = {
        name: SymbolRange(low=max(r.low, 2), high=r.high)
        for name, r in piece.symbols.items()
        if r.high is None or r.high >= 2
    }
    if symbols.keys() != piece.symbols.keys() or symbols == dict(piece.symbols):
        return None
    return dataclasses.replace(piece, symbols=symbols)


def _has_broken_device(error: BaseException) -> bool:
    """Whether an error leaves the GPU unusable for this process: a device-side assertion, say."""
    return type(error).__name__ == "AcceleratorError" or "device-side assert" in str(error)


def _verify(
    piece: Piece, run: Any, details: dict[str, Any], name: str, *, is_retry: bool
) -> dict[str, Any]:
    """Compare with eager; what fails at sizes 0 or 1 only is left out of `details["ranges"]`."""
    from precast.compilers.verify import EagerRefusedError, verify_from_text
    from precast.graph.inputs import edge_sizes, reads_indices, zero_sizes

    ranges = details.setdefault("ranges", {})

    def is_inside(sizes: Mapping[str, int]) -> bool:
        return all(
            low <= sizes[symbol] and (high is None or sizes[symbol] <= high)
            for symbol, (low, high) in ranges.items()
        )

    # A CPU says that an index is out of range; a GPU ends all work of the process.
    keep_alike = is_retry or (piece.device != "cpu" and reads_indices(piece))
    rows = [sizes for sizes in edge_sizes(piece, keep_alike=keep_alike) if is_inside(sizes)]
    usual = [sizes for sizes in rows if all(size > 1 for size in sizes.values())]
    try:
        result = verify_from_text(piece, run, usual or rows, name, 1 if is_retry else 2)
    except EagerRefusedError:
        result = verify_from_text(piece, run, usual or rows, name, 1)
    small_rows = [sizes for sizes in rows if sizes not in usual and usual]
    small_rows += [sizes for sizes in zero_sizes(piece, keep_alike=keep_alike) if is_inside(sizes)]
    proven: set[tuple[str, int]] = set()
    undecided: set[tuple[str, int]] = set()
    for row in small_rows:
        small = {(symbol, size) for symbol, size in row.items() if size < 2}
        try:
            if is_retry and 0 in row.values():  # Perhaps it was this that crashed.
                raise CompileError("", name, "not tried again")
            verify_from_text(piece, run, [row], name, 1)
            proven |= small
        except EagerRefusedError:
            undecided |= small
        except Exception as error:
            if _has_broken_device(error):
                raise
            _leave_out(piece, details, small)
    _leave_out(piece, details, undecided - proven)
    return {
        "max_abs_error": result.max_abs_error,
        "max_rel_error": result.max_rel_error,
        "sizes": list(result.sizes),
    }


def _leave_out(piece: Piece, details: dict[str, Any], sizes: Iterable[tuple[str, int]]) -> None:
    """Raise the low ends of ranges above sizes that do not work."""
    for symbol, bad in sizes:
        allowed = piece.symbols[symbol]
        low, high = details.setdefault("ranges", {}).get(symbol, (allowed.low, allowed.high))
        details["ranges"][symbol] = [max(low, bad + 1), high]


def _failure(compiler: str, error: Exception) -> dict[str, Any]:
    message = (
        error.problem if isinstance(error, CompileError) else f"{type(error).__name__}: {error}"
    )
    code = error.code if isinstance(error, CompileError) else "compile-failed"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(message):
        code = "compile-memory"
    return {"compiler": compiler, "code": code, "message": _shortened(message)}


def _shortened(message: str) -> str:
    """Return a message without its middle: its beginning says what is wrong, its end where."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    end = _LONGEST_MESSAGE // 4
    return f"{message[: _LONGEST_MESSAGE - end]} [...] {message[-end:]}"
