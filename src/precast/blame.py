"""Which pieces of an assembly are at fault where a call in service was found to be wrong.

The call is run once more, each compiled piece beside its own text, on the numbers that the call
brings it. What a wrong piece has left in the cache goes, for every model that shares it, and its
failure is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from precast.assembly import LoadedAssembly, open_assembly
from precast.compilers.eager import eager_call
from precast.compilers.verify import EagerRefusedError, VerifyMismatchError, verify_at
from precast.errors import Reason
from precast.events import VerifyMismatched
from precast.graph.piece import Piece
from precast.runtime.slot import SlotTable

if TYPE_CHECKING:
    import types

    from precast.session import Session


def find_wrong_pieces(
    session: Session,
    loaded: LoadedAssembly,
    function: types.FunctionType,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[int, tuple[Piece, str]]:
    """Return the pieces that are wrong at a call, and how; none where nobody can say.

    Args:
        session: Of the model.
        loaded: The assembly, bound.
        function: What it serves.
        args: Of the call, as compiled code takes them.
        kwargs: Of the call.
    """
    if loaded.assembly.packs:
        return {}  # Binding it a second time would move weights, which calls read meanwhile.
    pieces = _texts_of(session, loaded)
    wrong: dict[int, tuple[Piece, str]] = {}
    table = SlotTable()
    for (number, _), run, slot in zip(
        loaded.assembly.slots, loaded.slots.callables, loaded.slots.slots, strict=True
    ):
        if number is not None and number in pieces and run is not None:
            note = partial(_note, wrong, number, pieces[number])
            table.add(_Beside(pieces[number], run, note), slot)
        else:
            table.add(run, slot)
    double = open_assembly(loaded.assembly, loaded.key, table, function, loaded.gpu)
    bound = double.bound_as(loaded, function)
    if bound is not None:
        bound.entry(*args, **kwargs)
    return wrong


def throw_out(
    session: Session, loaded: LoadedAssembly, wrong: Mapping[int, tuple[Piece, str]]
) -> list[str]:
    """Take wrong pieces out of every tier, with their code, and remember that they were wrong.

    Returns their names.
    """
    names = {number: name for number, name in reversed(loaded.assembly.slots)}
    manager = session.manager
    for number, (piece, problem) in wrong.items():
        record = loaded.assembly.pieces[number]
        reason = Reason(
            "verify-mismatch",
            f"a call in service was checked, and this piece's code is wrong: {problem}; the piece "
            "runs eager",
            "Report it, with the piece's text",
        )
        manager.failures.remember(manager.compilers.work_name(piece), reason, (reason.code,))
        manager.stored.discard(record, with_code=True)
        session.emit(VerifyMismatched(names[number], record["key"], reason))
    return [names[number] for number in wrong]


def throw_all_out(session: Session, loaded: LoadedAssembly) -> None:
    """Take all pieces of an assembly out of every tier, since any may be wrong."""
    for record in loaded.assembly.pieces:
        if record is not None:
            session.manager.stored.discard(record, with_code=False)


def _texts_of(session: Session, loaded: LoadedAssembly) -> dict[int, Piece]:
    """Return those pieces of an assembly that are compiled and whose text the cache has."""
    found: dict[int, Piece] = {}
    for number, record in enumerate(loaded.assembly.pieces):
        if record is not None and "key" in record:
            manifest = session.loader.peek(record["key"])
            if manifest is not None and "piece" in manifest:
                found[number] = Piece.from_json(manifest["piece"])
    return found


def _note(wrong: dict[int, tuple[Piece, str]], number: int, piece: Piece, problem: str) -> None:
    wrong.setdefault(number, (piece, problem))


class _Beside:
    """Runs a piece's text, and its compiled code on copies; what differs is noted."""

    def __init__(
        self,
        piece: Piece,
        run: Callable[[list[Any]], Sequence[Any]],
        note: Callable[[str], None],
    ) -> None:
        self._piece = piece
        self._run = run
        self._note = note
        self._eager = eager_call(piece)

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        inputs = list(inputs)
        try:
            verify_at(self._piece, self._run, lambda *given: self._eager(list(given)), inputs)
        except VerifyMismatchError as error:
            self._note(error.problem)
        except EagerRefusedError:
            pass
        except Exception as error:  # noqa: BLE001 - wrong code may raise anything.
            self._note(f"it raises {type(error).__name__}: {error}")
        return self._eager(inputs)  # So that the next piece is judged by right numbers.
