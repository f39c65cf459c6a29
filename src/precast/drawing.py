"""A captured graph cut and written, with the code that calls its pieces: all but compiling them.

Passes for whole graphs run here, the rule for cutting is chosen, and what has no text is left
between the pieces. Where the graph is from and what becomes of its pieces is `backend.py`'s.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precast.contract import autocast_state
from precast.errors import Reason
from precast.events import Emit, FellBack, PlanMade
from precast.passes.chosen import ChosenPasses

if TYPE_CHECKING:
    import torch

    from precast.config import CompilationConfig
    from precast.graph.canonical import CannotWrite, WrittenPiece
    from precast.graph.piece import Piece, SymbolRange
    from precast.split.build import PieceCall, StitchGraph
    from precast.stitch import ExecutionCode

#: Whether the weights of these names may become views of one tensor; of one, with any others.
MayPack = Callable[[Sequence[str]], bool]


# In which single operators are left out of a piece that has no text; then the piece goes whole.
_MOST_ROUNDS = 3


class Drawing:
    """A graph cut, its pieces written and its stitching code generated.

    `pieces` are the unique ones, `names` theirs; `slots` says of each slot which piece it runs
    (None: inlined) and its name, `symbols` which captured size each of that piece's symbols is.
    `execution` takes the slots' callables, then (if it takes weights) one list of weights a
    slot (`groups`), then `rest` (weights that native code reads) and the call's arguments.
    `packs` are weights that stack others, by name, and `passes` what passes did to the graph.
    """

    __slots__ = (
        "execution",
        "groups",
        "mutated",
        "names",
        "packs",
        "passes",
        "pieces",
        "rest",
        "slots",
        "split",
        "symbols",
        "texts",
    )

    def __init__(self, **fields: Any) -> None:
        self.execution: ExecutionCode = fields["execution"]
        self.groups: list[list[str]] = fields["groups"]
        self.mutated: set[str] = fields["mutated"]
        self.names: list[str] = fields["names"]
        self.packs: dict[str, list[str]] = fields["packs"]
        self.passes: list[dict[str, Any]] = fields["passes"]
        self.pieces: list[Piece] = fields["pieces"]
        self.rest: list[str] = fields["rest"]
        self.slots: list[tuple[int | None, str]] = fields["slots"]
        self.split: str = fields["split"]
        self.symbols: list[dict[str, str]] = fields["symbols"]
        self.texts: list[str] = fields["texts"]


def draw(
    graph_module: torch.fx.GraphModule,
    *,
    ranges: Mapping[str, SymbolRange],
    sources: Mapping[str, str],
    arguments: Sequence[str],
    weights: Sequence[str],
    config: CompilationConfig,
    emit: Emit,
    name: str,
    passes: ChosenPasses,
    may_pack: MayPack,
) -> Drawing:
    """Change and cut a captured graph, write its pieces and generate the code that calls them.

    Args:
        graph_module: From Dynamo; it is changed.
        ranges: What sizes its symbols may take.
        sources: Where each placeholder comes from, as an expression.
        arguments: Placeholders that each call gives, in order.
        weights: Placeholders that are bound once.
        config: Of the model.
        emit: Is told what happens.
        name: Of the model.
        passes: Those for whole graphs are run.
        may_pack: Whether the weights of these names may become views of one tensor.

    Raises:
        SplitError: The graph cannot be cut: it holds a higher-order operator, say.
    """
    from precast.stitch import generate_execution_code

    stitched, written, rule, changes = cut_and_write(
        graph_module,
        ranges=ranges,
        sources=sources,
        arguments=arguments,
        weights=weights,
        config=config,
        emit=emit,
        name=name,
        passes=passes,
        may_pack=may_pack,
    )
    unique: dict[str, int] = {}
    pieces: list[Piece] = []
    names: list[str] = []
    for call in stitched.pieces:
        piece = written[call.index].piece
        if piece.text not in unique:
            unique[piece.text] = len(pieces)
            pieces.append(piece)
            names.append(call.region or call.name)
    emit(PlanMade(name, len(stitched.pieces), len(pieces), rule))
    graph = stitched.module.graph
    nodes = {node.target: node for node in graph.find_nodes(op="call_module")}
    for call in stitched.pieces:
        node = nodes[call.name]
        # Compiled code takes tensors only: sizes it reads from their shapes.
        node.args = tuple(node.args[i] for i in written[call.index].kept_inputs)
    _order_placeholders(graph, arguments)
    execution = generate_execution_code(stitched.module, stitched.weight_groups)
    slots: list[tuple[int | None, str]] = []
    symbols: list[Mapping[str, str]] = []
    by_index = {call.index: call for call in stitched.pieces}
    for index, piece_name in enumerate(execution.piece_names):
        found = by_index.get(index)
        if found is None or piece_name is None:
            slots.append((None, ""))
            symbols.append({})
        else:
            slots.append((unique[written[index].piece.text], found.region or found.name))
            symbols.append(written[index].symbols)
    groups = stitched.weight_groups
    return Drawing(
        execution=execution,
        groups=[groups.get(i, []) for i in range(len(slots))],
        mutated=_mutated(stitched),
        names=names,
        packs=changes.packs,
        passes=changes.rows,
        pieces=pieces,
        rest=[name for name in execution.arguments if name not in arguments],
        slots=slots,
        split=rule,
        symbols=symbols,
        texts=sorted(map(digest_of_text, unique)),
    )


def cut_and_write(
    graph_module: torch.fx.GraphModule,
    *,
    ranges: Mapping[str, SymbolRange],
    sources: Mapping[str, str],
    arguments: Sequence[str],
    weights: Sequence[str],
    config: CompilationConfig,
    emit: Emit,
    name: str,
    passes: ChosenPasses,
    may_pack: MayPack,
) -> tuple[StitchGraph, dict[int, WrittenPiece], str, GraphChanges]:
    """Clean, change and cut a graph and write its pieces; return the rule's name too.

    Raises:
        SplitError: The graph cannot be cut.
    """
    from precast.split.build import build_stitch
    from precast.split.clean import clean_graph
    from precast.split.plan import make_plan

    autocasts = autocast_state()
    clean_graph(graph_module, [device for device, _ in autocasts])
    _read_sizes(graph_module, sources, arguments)
    changes = _run_passes(graph_module, passes, may_pack)
    weights = [*weights, *changes.packs]
    rule = _choose_rule(graph_module, config)
    refused: dict[str, str] = {}
    _tell_unsupported(graph_module, emit, name)
    num_rounds = 0
    while True:
        plan = make_plan(graph_module, _WithNative(rule, refused))
        stitched = build_stitch(graph_module, plan, weights)
        written, problems = _write_all(stitched, ranges, autocasts)
        if not problems:
            return stitched, written, plan.rule, changes
        # What has no text runs as it is, between the pieces. Ends: each round refuses more.
        for call, problem in problems:
            inside = plan.partitions[call.index].nodes
            at_fault = [node for node in problem.nodes if node in inside]
            if not at_fault or num_rounds >= _MOST_ROUNDS:
                at_fault = list(inside)
            emit(
                FellBack(
                    name,
                    call.name,
                    Reason(
                        "op-unsupported",
                        f"{problem}; it runs eager between the pieces",
                        "Nothing to do for a right result",
                    ),
                )
            )
            refused.update(dict.fromkeys(at_fault, "op-unsupported"))
        num_rounds += 1


def _tell_unsupported(graph_module: torch.fx.GraphModule, emit: Emit, name: str) -> None:
    """Tell which operators run natively since no compiler takes what they compute with."""
    from precast.split.nodes import short_name, unsupported_nodes

    operators = sorted({short_name(node) for node in unsupported_nodes(graph_module.graph)})
    if operators:
        reason = Reason(
            "op-unsupported",
            f"{', '.join(operators)}: no compiler takes quantized, sparse or nested tensors; it "
            "runs natively, between the pieces",
            "Nothing to do for a right result",
        )
        emit(FellBack(name, None, reason))


def pack_nothing(names: Sequence[str]) -> bool:
    """Refuse."""
    return False


class GraphChanges:
    """What passes did to a whole graph: `packs` as in `Drawing`, and a row for each pass."""

    def __init__(self) -> None:
        self.packs: dict[str, list[str]] = {}
        self.rows: list[dict[str, Any]] = []


def digest_of_text(text: str) -> str:
    """Return the digest by which an assembly remembers the text of a piece."""
    return hashlib.sha256(text.encode()).hexdigest()


def _run_passes(
    graph_module: torch.fx.GraphModule, passes: ChosenPasses, may_pack: MayPack
) -> GraphChanges:
    """Run the passes for whole graphs; they are ours, and exact."""
    changes = GraphChanges()
    for name, one in passes.on_whole_graph():
        started = time.perf_counter()
        if name.startswith("merge_linears"):
            matches, packs = one.merge(graph_module.graph, may_pack)
            changes.packs.update(packs)
        else:
            matches = one(graph_module.graph)
        graph_module.graph.lint()
        seconds = time.perf_counter() - started
        changes.rows.append(
            {"name": name, "stage": "graph", "matches": matches, "seconds": seconds}
        )
    return changes


class _WithNative:
    """A splitting rule, and nodes that run natively besides."""

    def __init__(self, rule: Any, refused: Mapping[str, str]) -> None:
        self._rule = rule
        self._refused = refused

    def __repr__(self) -> str:
        return repr(self._rule)

    def place(self, graph_module: torch.fx.GraphModule) -> Any:
        placement = self._rule.place(graph_module)
        return placement.replace(native={**placement.native, **self._refused})


def _choose_rule(graph_module: torch.fx.GraphModule, config: CompilationConfig) -> Any:
    from precast.plugins import load_plugin
    from precast.split.at_layers import auto_splitter
    from precast.split.plan import Whole

    if config.compilation_level == "full":
        return Whole()
    if config.split is None:
        return auto_splitter(graph_module)
    return (
        load_plugin("splitters", config.split)() if isinstance(config.split, str) else config.split
    )


def _read_sizes(
    graph_module: torch.fx.GraphModule, sources: Mapping[str, str], arguments: Sequence[str]
) -> None:
    """Replace sizes that enter the graph by reading them from the tensors that enter it."""
    from precast.capture.places import size_of

    graph = graph_module.graph
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    tensors = {source: name for name, source in sources.items()}
    last = list(placeholders.values())[-1] if placeholders else None
    for name, node in placeholders.items():
        size = size_of(sources.get(name, ""))
        if size is None or name in arguments or last is None:
            continue
        if not node.users:
            graph.erase_node(node)
            continue
        tensor = placeholders[tensors[size[0]]]
        with graph.inserting_before(last.next):
            read = graph.call_method(size[1], (tensor, size[2]))
        read.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    graph_module.recompile()


def _write_all(
    stitched: StitchGraph,
    ranges: Mapping[str, SymbolRange],
    autocasts: Sequence[Sequence[str]],
) -> tuple[dict[int, WrittenPiece], list[tuple[PieceCall, CannotWrite]]]:
    from precast.graph.canonical import CannotWrite, write_piece

    written: dict[int, WrittenPiece] = {}
    problems: list[tuple[PieceCall, CannotWrite]] = []
    for call in stitched.pieces:
        try:
            piece = write_piece(
                call.module,
                ranges,
                mutated=call.mutated,
                autocast=_autocast_of(autocasts),
            )
        except CannotWrite as problem:
            problems.append((call, problem))
        else:
            written[call.index] = piece
    return written, problems


def _autocast_of(autocasts: Sequence[Sequence[str]]) -> tuple[str, str] | None:
    if not autocasts:
        return None
    device, dtype = autocasts[-1]
    return device, dtype.removeprefix("torch.")


def _order_placeholders(graph: torch.fx.Graph, arguments: Sequence[str]) -> None:
    """Put the call's arguments last, in the order in which the entry code passes them."""
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    ordered = [name for name in placeholders if name not in arguments]
    ordered.extend(name for name in arguments if name in placeholders)
    anchor = None
    for name in reversed(ordered):
        node = placeholders[name]
        first = anchor if anchor is not None else next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)
        anchor = node
    graph.lint()


def _mutated(stitched: StitchGraph) -> set[str]:
    """Names of the placeholders that any call of the stitching graph writes into.

    A write into a view of a placeholder counts for the placeholder.
    """
    found: set[str] = set()
    storages: dict[Any, str] = {}
    nodes = {node.name: node for node in stitched.module.graph.nodes}
    for node in nodes.values():
        if node.op == "placeholder":
            storage = _storage(node)
            if storage is not None:
                storages.setdefault(storage, node.name)
    for call in stitched.calls:
        for position in call.mutated:
            node = nodes.get(call.inputs[position])
            storage = _storage(node) if node is not None else None
            if storage in storages:
                found.add(storages[storage])
    return found


def _storage(node: Any) -> Any:
    import torch

    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return None
    return value.untyped_storage()._cdata
