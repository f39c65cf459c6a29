"""A piece that is too large to compile, compiled as several.

A worker cuts it (`precast.parts`); each part then is a piece like any other, and may be cut again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from precast.cache.trust import is_unsigned
from precast.errors import CompileError, Reason
from precast.events import Emit, PieceSplit
from precast.graph.piece import Piece
from precast.parts import CUTTER, join
from precast.piece_result import PieceResult

if TYPE_CHECKING:
    from concurrent.futures import Future

    from precast.cache import CacheStorage
    from precast.compilers.chosen import ChosenCompilers
    from precast.compilers.job import CompileJob, JobResult

# What took too long, or died, is cut only where it is long: else it hangs rather than works.
_LONG_STATEMENTS = 32


class CompileParts(Protocol):
    """Finds or compiles the parts of a piece, as `CompilerManager.compile` does."""

    def __call__(
        self, pieces: Sequence[Piece], names: Sequence[str], *, max_parts: int, may_wait: bool
    ) -> list[PieceResult]:
        """Return what became of each, in order."""
        ...


class InParts:
    """Compiles pieces in parts, and stores the whole as a list of them."""

    def __init__(
        self,
        compilers: ChosenCompilers,
        storage: CacheStorage,
        emit: Emit,
        submit: Callable[[CompileJob], Future[JobResult]],
        compile_parts: CompileParts,
    ) -> None:
        """Cut nothing yet.

        Args:
            compilers: Of the model.
            storage: Keeps which parts a piece has.
            emit: Is told of each piece that was split.
            submit: Has a worker cut a piece.
            compile_parts: Finds or compiles the parts.
        """
        self._compilers = compilers
        self._storage = storage
        self._emit = emit
        self._submit = submit
        self._compile_parts = compile_parts

    def compile(
        self, piece: Piece, name: str, reason: Reason, max_parts: int
    ) -> PieceResult | None:
        """Return a piece as several that are compiled each for itself; None: it does not help.

        Args:
            piece: The whole.
            name: Its name, for reports.
            reason: Why the whole could not be compiled.
            max_parts: So many at most, of parts that are not cut again.
        """
        cut = self._cut(piece, name) if max_parts > 1 else None
        if cut is None:
            return None
        slots = [number for number in cut["slots"] if number is not None]
        if len(slots) > max_parts:
            return None
        parts = [Piece.from_json(part) for part in cut.pop("pieces")]
        names = [f"{name}, part {number + 1}" for number in range(len(parts))]
        # Nobody is waited for: we hold the lease of the whole, and two that wait for parts which
        # the other one holds would wait for long.
        results = self._compile_parts(
            parts, names, max_parts=max_parts // len(slots), may_wait=False
        )
        if all(result.compiler == "eager" for result in results):
            return None
        return self._join(piece, name, reason, cut, results)

    def _cut(self, piece: Piece, name: str) -> dict[str, Any] | None:
        """Have a worker cut a piece in two; None where it cannot be."""
        from precast.cache.scratch import OwnFolder
        from precast.compilers.job import CompileJob

        try:
            with OwnFolder("cut") as folder:
                job = CompileJob(
                    piece=piece.to_json(),
                    name=name,
                    directory=str(Path(folder.path) / "cut"),
                    compilers=(CUTTER,),
                    verify=False,  # Each part is; the whole may not fit.
                    is_reported=False,
                )
                done = self._submit(job).result()
        except (CompileError, OSError):
            return None
        return None if done.compiler is None else dict(done.details)

    def _join(
        self,
        piece: Piece,
        name: str,
        reason: Reason,
        cut: Mapping[str, Any],
        results: Sequence[PieceResult],
    ) -> PieceResult:
        """Make one piece of its compiled parts, and store which they are."""
        # Equal halves are one piece, which is compiled once and called twice.
        called = [results[number] for number in cut["slots"] if number is not None]
        num_parts = sum(result.num_parts for result in called)
        num_eager = sum(result.num_eager_parts for result in called)
        message = f"compiled in {num_parts} parts" + (f", {num_eager} eager" if num_eager else "")
        reason = Reason(reason.code, f"{message}: {reason.message}", reason.remedy)
        compiler = next(result.compiler for result in results if result.compiler != "eager")
        key = self._compilers.compute_hash_keys(piece, self._compilers.make(compiler))
        seconds = sum(result.seconds for result in results)
        details = {
            "ranges": _common_ranges(cut, results),
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
            ranges=details["ranges"],
            num_parts=num_parts,
            num_eager_parts=num_eager,
            passes=passes,
        )


def most_parts(piece: Piece, reason: Reason, max_parts: int, *, is_killed: bool) -> int:
    """Return in how many parts a failed piece is compiled at most: 1 where that cannot help.

    Args:
        piece: The whole.
        reason: Why it could not be compiled.
        max_parts: The most that are allowed.
        is_killed: Its worker was killed, as the system does where memory is short.
    """
    if reason.code == "compile-timeout" or is_killed:
        # Each part may take as long again: once, and no more.
        is_long = piece.text.count("\n    v") >= _LONG_STATEMENTS
        return min(max_parts, 2) if is_long else 1
    return max_parts if reason.code == "compile-memory" else 1


def _common_ranges(
    cut: Mapping[str, Any], results: Sequence[PieceResult]
) -> dict[str, Sequence[int | None]]:
    """Return the sizes for which the whole holds: those for which each part does."""
    ranges = dict(cut.get("ranges", {}))
    for number, symbols in cut["symbols"]:
        for symbol, bounds in results[number].ranges.items():
            ranges[symbols[symbol]] = _both(ranges.get(symbols[symbol]), bounds)
    return ranges


def _both(one: Sequence[int | None] | None, other: Sequence[int | None]) -> list[int | None]:
    """Return the range that two ranges have in common; None: no bound."""
    if one is None:
        return list(other)
    highs = [high for high in (one[1], other[1]) if high is not None]
    return [max(one[0] or 0, other[0] or 0), min(highs, default=None)]
