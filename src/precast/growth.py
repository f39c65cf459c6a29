"""An assembly that serves while its pieces are compiled: they land one by one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from precast import handover
from precast.assembly import Bound, LoadedAssembly, open_assembly
from precast.background.capture import CalledOffError
from precast.behind import give_way
from precast.blueprint import slot_of, slot_table
from precast.events import SlotSwapped
from precast.piece_result import PieceResult, pending_result
from precast.runtime.collector import no_collection
from precast.tryout import run_once

if TYPE_CHECKING:
    from precast.blueprint import Blueprint
    from precast.graph.piece import Piece
    from precast.progressive import Request
    from precast.runtime.slot import SlotTable


class Growth:
    """An assembly whose pieces land one by one.

    Until the first compiled one is there, calls run as they did. From then on the model runs
    stitched, the pieces that are still missing as text. Nothing here keeps the model: a job may
    take for ever.
    """

    def __init__(
        self, request: Request, blueprint: Blueprint, is_called_off: Callable[[], bool]
    ) -> None:
        """Compile nothing yet.

        Args:
            request: Of the call that asked.
            blueprint: Of what serves such calls.
            is_called_off: Whether nobody wants it any more; asked from any thread.
        """
        self._request = request
        self._blueprint = blueprint
        self._is_called_off = is_called_off
        self._results = [self._pending(piece) for piece in self._blueprint.pieces]
        self._eager_calls = [result.call for result in self._results]
        self._installed: weakref.ref[LoadedAssembly] | None = None

    def _pending(self, piece: Piece) -> PieceResult:
        self._give_way()
        with no_collection():
            return pending_result(piece)

    def run(self) -> None:
        """Have all pieces compiled; install, swap and publish.

        Raises:
            CalledOffError: Nobody wants it any more.
        """
        request, blueprint = self._request, self._blueprint
        if self._is_called_off():
            raise CalledOffError
        results = request.session.manager.compile(
            blueprint.pieces,
            blueprint.names,
            order=blueprint.order_of_worth(),
            on_result=self._take,
            is_wanted=lambda: not self._is_called_off(),
        )
        if self._is_called_off():
            raise CalledOffError
        self._results = results
        loaded = self._install() if self._installed is None else self._loaded
        handover.complete(request, loaded, blueprint.assembly(results), results)

    @property
    def _loaded(self) -> LoadedAssembly:
        """What serves as far as it has grown.

        Raises:
            CalledOffError: It was thrown away, perhaps with the model.
        """
        loaded = None if self._installed is None else self._installed()
        if loaded is None:
            raise CalledOffError
        return loaded

    def _take(self, number: int, result: PieceResult) -> None:
        self._give_way()
        before = self._results[number]
        self._results[number] = result
        if self._installed is None:
            if result.compiler != "eager":
                self._install()
            return
        loaded = self._loaded
        self._try_out(loaded, [number])
        with no_collection():
            assembly = self._blueprint.assembly(self._results)
            if result.ranges and before.ranges != result.ranges:
                # Calls inside go on with the slots that they have: the new code may not be for
                # them.
                successor = open_assembly(
                    assembly,
                    loaded.key,
                    self._slots(),
                    self._request.function,
                    loaded.gpu,
                )
                handover.replace(self._request, loaded, successor)
                self._installed = weakref.ref(successor)
            else:
                loaded.assembly = assembly
                for index, (piece, name) in enumerate(self._blueprint.slots):
                    if piece == number:
                        loaded.slots.swap(index, result.call, slot_of(name, result))
        self._tell([number])

    def _give_way(self) -> None:
        """Let calls get their turn, and stop here where nobody wants the result any more."""
        give_way()
        if self._is_called_off():
            raise CalledOffError

    def _install(self) -> LoadedAssembly:
        request = self._request
        with no_collection():
            assembly = self._blueprint.assembly(self._results)
        self._give_way()
        loaded = handover.open_for(request, assembly, self._slots(), self._blueprint.gpu)
        everything = range(len(self._results))
        self._try_out(loaded, everything)
        handover.admit(request, loaded)
        self._installed = weakref.ref(loaded)
        self._tell(everything)
        return loaded

    def _slots(self) -> SlotTable:
        return slot_table(self._blueprint.slots, self._results)

    def _try_out(self, loaded: LoadedAssembly, numbers: Sequence[int]) -> None:
        """Run new code once, with the model's weights: what it loads late is then no call's wait.

        A GPU's kernels are opened at their first run, and a library's pages read.
        """
        if not isinstance(loaded.bound, Bound):
            return
        weights = loaded.bound.weights
        done: set[int] = set()
        for (number, _), group in zip(self._blueprint.slots, self._blueprint.groups, strict=True):
            if number is None or number not in numbers or number in done:
                continue
            done.add(number)
            piece, result = self._blueprint.pieces[number], self._results[number]
            if result.compiler == "eager" or piece.mutated:
                continue
            self._give_way()
            first = len(piece.inputs) - len(group)
            known = {first + i: weights[position] for i, position in enumerate(group)}
            with contextlib.suppress(Exception):  # A call will show what it is, if it is anything.
                run_once(piece, result.call, self._eager_calls[number], known)

    def _tell(self, numbers: Sequence[int]) -> None:
        session = self._request.session
        is_eager = [result.compiler == "eager" for result in self._results]
        for index, (piece, _) in enumerate(self._blueprint.slots):
            if piece is not None and piece in numbers and not is_eager[piece]:
                session.emit(SlotSwapped(session.name, index, self._results[piece].compiler))
