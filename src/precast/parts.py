"""One piece cut into several: what is done with a piece that is too large to compile.

`PieceCutter` stands in a worker in a compiler's place: it reads the text back as a graph, cuts it
and writes the parts, as plain data. `join` makes one callable of them and imports no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precast.stitch import SerializableFunction

if TYPE_CHECKING:
    from precast.compilers.interface import CompiledCallable, CompiledPiece
    from precast.graph.canonical import WrittenPiece
    from precast.graph.piece import Piece

#: What a compiler needs for an operator besides its tensors, roughly: it decides where a cut is
#: made through a long chain of small operators.
OPERATOR_BYTES = 4 << 20

#: The cutter's name for a worker.
CUTTER = "precast.parts:PieceCutter"


def join(
    details: Mapping[str, Any], calls: Sequence[Callable[..., Any] | None]
) -> CompiledCallable:
    """Return parts as one callable of the boxed convention.

    Args:
        details: What `PieceCutter` wrote.
        calls: What runs each different part, by its number in `details["pieces"]`.

    Raises:
        ArtifactError: The code between the parts is of another format, or damaged.
    """
    execute = SerializableFunction.from_json(details["execution"]).function
    slots = [None if number is None else calls[number] for number in details["slots"]]
    return lambda inputs: execute(slots, *inputs)


class PieceCutter:
    """Cuts a piece in two, such that the larger half needs as little memory as can be."""

    name = "cutter"
    is_saveable = True

    def identity(self) -> Mapping[str, str]:
        """Return a version; nothing is stored under it."""
        return {"compiler": "cutter", "adaptor": "1"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        """Return the parts as details: no file is written, nothing compiled.

        `pieces` are the different parts, `slots` says which of them each entry of the execution
        code calls, and `symbols`, for each call, which symbol of the whole each of the part's is.

        Raises:
            CompileError: It cannot be cut, or a part has no text.
        """
        from precast.compilers.interface import CompiledPiece
        from precast.compilers.tracing import TracedPiece, piece_name, tracing
        from precast.errors import CompileError, SplitError
        from precast.graph.canonical import CannotWrite, symbol_of, write_piece
        from precast.split.build import build_stitch
        from precast.split.by_memory import SplitByMemory, smallest_budget
        from precast.split.clean import clean_graph
        from precast.split.plan import make_plan
        from precast.stitch import generate_execution_code

        traced = TracedPiece(piece, self.name)
        devices = [] if piece.autocast is None else [piece.autocast[0]]
        ranges = {}
        names = {}
        for name, size in traced.symbols.items():
            symbol = symbol_of(size)
            if symbol is not None:
                names[symbol], ranges[symbol] = name, piece.symbols[name]
        try:
            with tracing(piece):
                traced.record_values()
                graph = clean_graph(traced.graph, devices)
                budget = smallest_budget(graph, 2, OPERATOR_BYTES)
                rule = SplitByMemory(budget_bytes=budget, operator_bytes=OPERATOR_BYTES)
                stitched = build_stitch(graph, make_plan(graph, rule), weights=())
                written = {
                    call.index: write_piece(
                        call.module, ranges, mutated=call.mutated, autocast=piece.autocast
                    )
                    for call in stitched.pieces
                }
        except (SplitError, CannotWrite) as error:
            raise CompileError(piece_name(piece), self.name, f"no cut: {error}") from error
        if len(written) < 2:
            raise CompileError(piece_name(piece), self.name, "there is nothing to cut")
        nodes = {node.target: node for node in stitched.module.graph.find_nodes(op="call_module")}
        for call in stitched.pieces:
            node = nodes[call.name]
            node.args = tuple(node.args[i] for i in written[call.index].kept_inputs)
        code = generate_execution_code(stitched.module)
        numbers: dict[str, int] = {}
        parts: list[WrittenPiece] = []
        for part in written.values():
            if part.piece.text not in numbers:
                numbers[part.piece.text] = len(parts)
                parts.append(part)
        slots = [
            None if name is None else numbers[written[index].piece.text]
            for index, name in enumerate(code.piece_names)
        ]
        details = {
            "pieces": [part.piece.to_json() for part in parts],
            "symbols": [
                [numbers[part.piece.text], {own: names[s] for own, s in part.symbols.items()}]
                for part in written.values()
            ],
            "slots": slots,
            "execution": SerializableFunction(code).to_json(),
            **traced.sizes(),
        }
        return CompiledPiece({}, details)

    def load(
        self, details: Mapping[str, Any], files: Mapping[str, str], piece: Piece | None
    ) -> CompiledCallable:
        """Return the parts joined, each run eager."""
        from precast.graph.piece import Piece as PieceValue
        from precast.graph.read import eager_function

        functions = [eager_function(PieceValue.from_json(part)) for part in details["pieces"]]

        def boxed(function: Callable[..., Any]) -> CompiledCallable:
            return lambda inputs: function(*inputs)

        return join(details, list(map(boxed, functions)))
