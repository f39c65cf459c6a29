"""Runs passes over one piece, in order: checked, timed, dumped, and undone where they fail.

A list of passes is one value: running, hashing and dumping are loops over it. It serves both
stages: the piece's own graph before compiling, and Inductor's graph after its own passes, where
Inductor calls it. Used in a compile worker, and in a process that compiles for itself.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from precast.errors import PassError
from precast.passes.chosen import matches_as_dict
from precast.passes.interface import InductorPass
from precast.passes.piece_graph import BrokenGraphError, PieceGraph, copy_graph, lines_of

if TYPE_CHECKING:
    import torch

    from precast.graph.piece import Piece

MadeT = TypeVar("MadeT")


class PostGradPassManager:
    """An ordered list of passes."""

    def __init__(self, passes: Iterable[InductorPass], dump_folder: str | None = None) -> None:
        """Start nothing yet.

        Args:
            passes: In the order in which they run.
            dump_folder: Where graphs before and after each pass that changes one are written.
        """
        self.passes = tuple(passes)
        self._dump_folder = dump_folder

    def identity(self) -> str:
        """Return what stands for the whole list."""
        parts = [f"{p.name} {p.identity()}" for p in self.passes]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def start(self, piece: Piece) -> PassRun:
        """Run the passes on a piece's own graph; what comes back takes it through the compiler."""
        return PassRun(self, piece, self._dump_folder)


class PassRun:
    """One piece's way through the passes. `piece` is what is to be compiled."""

    def __init__(self, manager: PostGradPassManager, piece: Piece, dump_folder: str | None) -> None:
        self._identity = manager.identity() if manager.passes else ""
        self._rows: dict[int, dict[str, Any]] = {}
        self._dump = _Dump(dump_folder, piece.text)
        ranges = {name: (r.low, r.high) for name, r in piece.symbols.items()}
        self._on_piece: list[tuple[int, InductorPass]] = []
        self._post_grad: list[tuple[int, InductorPass]] = []
        for number, one in enumerate(manager.passes):
            self._rows[number] = {"name": one.name, "stage": one.stage, "matches": {}, "seconds": 0}
            try:
                applies = one.applies_to(ranges)
            except Exception as error:  # noqa: BLE001 - a pass is somebody else's code.
                self._note_failure(number, one, error)
                continue
            if applies:
                kind = self._on_piece if one.stage == "piece" else self._post_grad
                kind.append((number, one))
        self.piece = self._run_on_piece(piece) if self._on_piece else piece

    def reports(self) -> list[dict[str, Any]]:
        """Return a row for each pass, as JSON data: name, stage, matches, seconds, failure."""
        return [self._rows[number] for number in sorted(self._rows)]

    @property
    def has_changed(self) -> bool:
        """Whether any pass changed anything."""
        return any(row.get("changed") for row in self._rows.values())

    # -- the piece's own graph ---------------------------------------------------

    def _run_on_piece(self, piece: Piece) -> Piece:
        try:
            graph = PieceGraph(piece)
        except Exception as error:  # noqa: BLE001 - torch's fake tensors fail in many ways.
            for number, one in self._on_piece:
                self._note_failure(number, one, error)
            return piece
        current = piece
        for number, one in self._on_piece:
            started = time.perf_counter()
            before, lines = graph.snapshot(), graph.lines()
            try:
                matches = matches_as_dict(one(graph.module.graph))
                if graph.lines() != lines:
                    made = graph.settle()
                    self._dump.write(number, one.name, current.text, made.text)
                    current = made
                    self._rows[number]["changed"] = True
                self._rows[number]["matches"] = matches
            except Exception as error:  # noqa: BLE001 - a pass is somebody else's code.
                graph.restore(before)
                self._note_failure(number, one, error)
            self._rows[number]["seconds"] = time.perf_counter() - started
        return current

    def _note_failure(self, number: int, one: InductorPass, error: Exception) -> None:
        node = error.node if isinstance(error, BrokenGraphError) else ""
        problem = (
            error.problem
            if isinstance(error, BrokenGraphError)
            else f"{type(error).__name__}: {error}"
        )
        reason = PassError(one.name, node, problem).reason
        self._rows[number].update(matches={}, changed=False, failure=reason.as_dict())

    # -- Inductor's graph --------------------------------------------------------

    def compile(self, compile_piece: Callable[[Piece], MadeT]) -> MadeT:
        """Compile the piece, with the passes that Inductor is to call.

        A pass that fails there leaves a graph that nobody can trust: it is left out, and the piece
        compiled again.

        Args:
            compile_piece: Compiles what it is given; called again where a pass had to be left out.
        """
        failed: set[int] = set()
        while True:
            before = len(failed)
            try:
                with self._inductor_calls(failed):
                    return compile_piece(self.piece)
            except Exception:
                if len(failed) == before:
                    raise
                self._post_grad = [(n, p) for n, p in self._post_grad if n not in failed]

    def _inductor_calls(self, failed: set[int]) -> AbstractContextManager[None]:
        if not self._post_grad:
            return nullcontext()
        from precast.torch_private import calling_after_grad_passes

        left_in = ",".join(str(number) for number, _ in self._post_grad)
        run = partial(self._run_post_grad, failed)
        return calling_after_grad_passes(run, f"{self._identity} {left_in}")

    def _run_post_grad(self, failed: set[int], graph: torch.fx.Graph) -> None:
        for number, one in self._post_grad:
            started = time.perf_counter()
            try:
                self._run_one(graph, number, one)
            except Exception as error:
                failed.add(number)
                self._note_failure(number, one, error)
                raise
            finally:
                self._rows[number]["seconds"] = time.perf_counter() - started

    def _run_one(self, graph: torch.fx.Graph, number: int, one: InductorPass) -> None:
        from precast.passes.aten_graph import AtenGraph

        lines = lines_of(graph)
        checked = AtenGraph(graph)
        matches = matches_as_dict(one(graph))
        if (after := lines_of(graph)) != lines:
            checked.settle()
            self._dump.write(number, one.name, lines, after)
            self._rows[number]["changed"] = True
        self._rows[number]["matches"] = matches


class _Dump:
    """Writes a graph before and after a pass, where somebody asked for it."""

    def __init__(self, folder: str | None, text: str) -> None:
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._folder = None if folder is None else Path(folder) / digest

    def write(self, number: int, name: str, before: str, after: str) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        for when, text in (("before", before), ("after", after)):
            (self._folder / f"{number:02}-{safe}.{when}.txt").write_text(text)


def failures_of(reports: Iterable[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return name and reason of each pass that was left out."""
    return [(row["name"], row["failure"]) for row in reports if row.get("failure")]


__all__ = ["PassRun", "PostGradPassManager", "copy_graph", "failures_of"]
