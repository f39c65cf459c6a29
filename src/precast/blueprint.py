"""A captured and cut model as plain data: everything but its compiled pieces.

One process may draw it and another compile the pieces: it is JSON, and reading it needs neither
Dynamo nor a graph. `Blueprint.assembly` joins it with what became of the pieces, all of them or the
few that are there so far.
"""

from __future__ import annotations

import base64
import marshal
from collections.abc import Mapping, Sequence
from typing import Any

from precast.assembly import Assembly
from precast.compilers.chosen import FOR_FIRST_GPU
from precast.graph.piece import Piece, SymbolRange
from precast.piece_result import PieceResult
from precast.runtime.slot import Slot, SlotTable

_FIELDS = (
    "check",
    "contract",
    "entry",
    "example",
    "execution",
    "gpu",
    "groups",
    "is_for_any_gpu",
    "mutates",
    "names",
    "num_guards",
    "num_nodes",
    "packs",
    "passes",
    "pieces",
    "rest",
    "slots",
    "split",
    "symbols",
    "texts",
)


class Blueprint:
    """What an assembly has, as `assembly.Assembly` says, and the pieces that it needs.

    `pieces` are the unique pieces and `names` theirs. `slots` says of each slot which piece it
    runs (None: inlined) and what it is called, `symbols` which captured size each of the piece's
    symbols is there. `gpu` is the number of the one that it was captured on. `check` is the call
    check, still open for the sizes that compiled code takes.
    """

    __slots__ = _FIELDS

    check: Mapping[str, Any]
    contract: Mapping[str, Any]
    entry: Mapping[str, Any]
    example: Sequence[Sequence[int]]
    execution: Mapping[str, Any]
    gpu: int | None
    groups: Sequence[Sequence[int]]
    is_for_any_gpu: bool
    mutates: bool
    names: Sequence[str]
    num_guards: int
    num_nodes: int
    packs: Sequence[Sequence[int]]
    passes: Sequence[Mapping[str, Any]]
    pieces: Sequence[Piece]
    rest: Sequence[int]
    slots: Sequence[tuple[int | None, str]]
    split: str
    symbols: Sequence[Mapping[str, str]]
    texts: Sequence[str]

    def __init__(self, **fields: Any) -> None:
        for name in _FIELDS:
            setattr(self, name, fields[name])

    def to_json(self) -> dict[str, Any]:
        """Return the blueprint as JSON data."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return {**fields, "pieces": [piece.to_json() for piece in self.pieces]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Blueprint:
        """Read what `to_json` wrote. It holds code: the caller knows where it is from."""
        return Blueprint(**{**data, "pieces": list(map(Piece.from_json, data["pieces"]))})

    def order_of_worth(self) -> list[int]:
        """Return the numbers of the pieces, those first whose compilation speeds up most calls."""
        count = [0] * len(self.pieces)
        for number, _ in self.slots:
            if number is not None:
                count[number] += 1
        sizes = [len(piece.text) for piece in self.pieces]
        return sorted(range(len(count)), key=lambda i: (-count[i], -sizes[i]))

    def assembly(self, results: Sequence[PieceResult]) -> Assembly:
        """Return the assembly for what became of the pieces."""
        narrowed = narrowed_ranges(self.slots, self.symbols, results)
        return Assembly(
            call_check=_closed(self.check, narrowed),
            contract=self.contract,
            entry=self.entry,
            example=self.example,
            execution=self.execution,
            gpu="any" if self.is_for_any_gpu and not any(map(_names_gpu, results)) else self.gpu,
            groups=self.groups,
            mutates=self.mutates,
            packs=self.packs,
            passes=self.passes,
            pieces=[result.record for result in results],
            rest=self.rest,
            seconds=sum(result.seconds for result in results),
            slots=[list(slot) for slot in self.slots],
            texts=self.texts,
        )


def slot_table(
    slots: Sequence[tuple[int | None, str]], results: Sequence[PieceResult]
) -> SlotTable:
    """Return the slots of an assembly, filled."""
    table = SlotTable()
    for number, name in slots:
        if number is None:
            table.add(None, None)
        else:
            table.add(results[number].call, slot_of(name, results[number]))
    return table


def slot_of(name: str, result: PieceResult) -> Slot:
    """Describe what a slot runs."""
    return Slot(
        name,
        compiler=result.compiler,
        tier="cache" if result.from_cache else None,
        reason=result.reason,
        seconds_saved=result.seconds if result.from_cache else 0.0,
        passes=result.passes,
        timing=result.timing,
    )


def _names_gpu(result: PieceResult) -> bool:
    """Whether a piece's code, or that of a part of it, is for the GPU that it was compiled for."""
    records = [result.record]
    while records:
        record = records.pop() or {}
        if record.get("compiler") == FOR_FIRST_GPU:
            return True
        records.extend(record.get("details", {}).get("records", ()))
    return False


def narrowed_ranges(
    slots: Sequence[tuple[int | None, str]],
    symbols: Sequence[Mapping[str, str]],
    results: Sequence[PieceResult],
) -> dict[str, SymbolRange]:
    """Return the captured sizes for which some piece's code holds for fewer than were asked."""
    narrowed: dict[str, SymbolRange] = {}
    for (number, _), names in zip(slots, symbols, strict=True):
        if number is None:
            continue
        for symbol, (low, high) in results[number].ranges.items():
            known = narrowed.get(names[symbol])
            lows, highs = [low or 0], [high]
            if known is not None:
                lows.append(known.low)
                highs.append(known.high)
            narrowed[names[symbol]] = SymbolRange(
                low=max(lows), high=min((n for n in highs if n is not None), default=None)
            )
    return narrowed


def _closed(check: Mapping[str, Any], narrowed: Mapping[str, SymbolRange]) -> dict[str, Any]:
    """Finish a call check (`capture.dynamo.Capture.open_check`) and compile it."""
    lines, conditions = list(check["lines"]), list(check["conditions"])
    for symbol, bounds in narrowed.items():
        size, meaning = check["sizes"][symbol]
        conditions.append(f"{meaning} is in {bounds}, for which code was compiled")
        upper = "" if bounds.high is None else f" <= {bounds.high}"
        lines.append(f"if not ({bounds.low} <= {size}{upper}): return {len(conditions) - 1}")
    source = check_source(check["header"], lines)
    filename = check["filename"]
    return {
        "source": source,
        "filename": filename,
        "marshalled": base64.b64encode(marshal.dumps(compile(source, filename, "exec"))).decode(),
        "constants": check["constants"],
        "conditions": conditions,
    }


def check_source(header: str, lines: Sequence[str]) -> str:
    """Return a call check as Python source: 0 if all holds, else a condition's number."""
    return "\n".join([header, *(f"    {line}" for line in (*lines, "return 0"))]) + "\n"
