"""The pieces of a cut plan as graph modules, and the graph that calls them.

Nothing is decided here: what crosses a cut is `boundaries.py`'s answer. The stitching graph runs
as it is, and then equals the original; `stitch.py` writes it as plain Python.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from precast.split.boundaries import BEFORE_ALL, Boundaries
from precast.split.nodes import is_number, is_removable, is_size, value_of
from precast.split.plan import CutPlan, Partition
from precast.values import Value


class PieceCall(Value, kw_only=True):
    """One call in the stitching graph: of a piece, or of a native stretch.

    `inputs` and `outputs` are node names of the stitching graph. Inputs stand in this order:
    tensors, sizes, weights, each by first use; so equal blocks take equal lists. `mutated` are
    positions in `inputs`.
    """

    index: int
    name: str  # "piece_3" or "native_4": the submodule of the stitching graph.
    is_native: bool
    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()  # The last of `inputs`.
    mutated: tuple[int, ...] = ()
    region: str = ""
    reasons: tuple[str, ...] = ()


class StitchGraph(Value, kw_only=True):
    """A graph cut to a plan: the module that calls the pieces, and every call in order.

    The module's placeholders are the original's, in their order. Its `meta["precast_calls"]`
    holds the calls too.
    """

    module: GraphModule
    calls: tuple[PieceCall, ...]

    @property
    def pieces(self) -> tuple[PieceCall, ...]:
        """The calls that are to be compiled."""
        return tuple(call for call in self.calls if not call.is_native)

    @property
    def weight_groups(self) -> dict[int, list[str]]:
        """The weights of each piece, as `generate_execution_code` takes them."""
        return {call.index: list(call.weights) for call in self.pieces}


def build_stitch(
    graph_module: GraphModule, plan: CutPlan, weights: Collection[str] | None = None
) -> StitchGraph:
    """Make the pieces of a plan and the graph that calls them.

    Args:
        graph_module: The cleaned graph that the plan was made for. It is not changed.
        plan: From `make_plan`.
        weights: The placeholders that are bound once and not given with each call; by default
            those that the trace found among a module's parameters and buffers.
    """
    return _Builder(graph_module, plan, weights).build()


class _Builder:
    def __init__(
        self, graph_module: GraphModule, plan: CutPlan, weights: Collection[str] | None
    ) -> None:
        self._source = graph_module
        self._plan = plan
        self._boundaries = Boundaries(graph_module, plan)
        self._nodes = {node.name: node for node in graph_module.graph.nodes}
        self._order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        self._weights = {
            node
            for node in graph_module.graph.find_nodes(op="placeholder")
            if (node.name in weights if weights is not None else _is_weight(node))
        }
        self._graph = Graph()
        self._env: dict[Node, Node] = {}

    def build(self) -> StitchGraph:
        kept, returned, stitched = self._live()
        modules: dict[str, Any] = {}
        calls: list[PieceCall] = []
        for node in self._source.graph.nodes:
            if node.op == "placeholder":
                copy = self._copy(node)
                copy.meta["precast_weight"] = node in self._weights
            elif node.op == "get_attr" and node.users:
                self._copy(node)
                modules[str(node.target)] = _attribute(self._source, str(node.target))
        self._emit(stitched, BEFORE_ALL)
        for partition in self._plan.partitions:
            if not kept[partition.index]:
                continue  # All it made is made between the pieces.
            call = self._call(partition, kept[partition.index], returned[partition.index])
            modules[call.name] = call.module
            calls.append(call)
            self._emit(stitched, partition.index)
        output = self._source.graph.output_node()
        self._graph.output(torch.fx.node.map_arg(output.args[0], self._value))
        module = GraphModule(modules, self._graph, class_name="Stitch")
        module.meta.update(self._source.meta)
        module.meta["precast_calls"] = tuple(calls)
        return StitchGraph(module=module, calls=tuple(calls))

    def _live(self) -> tuple[list[list[Node]], list[list[Node]], list[Node]]:
        """Return what is needed: nodes of each partition, those returned, those between."""
        boundaries = self._boundaries
        live = set(map(boundaries.resolved, self._source.graph.output_node().all_input_nodes))
        kept: list[list[Node]] = []
        returned: list[list[Node]] = []
        stitched: list[Node] = []

        def revive_stitched(index: int) -> None:
            for node in reversed(boundaries.stitched):
                if boundaries.ready_after(node) == index and node in live:
                    live.update(map(boundaries.resolved, node.all_input_nodes))
                    stitched.append(node)

        for partition in reversed(self._plan.partitions):
            index = partition.index
            revive_stitched(index)
            outputs = [node for node in boundaries.returned[index] if node in live]
            needed = set(outputs)
            nodes = [self._nodes[name] for name in partition.nodes]
            kept_here: list[Node] = []
            # The nodes of a partition stand in an order in which they can run.
            for node in reversed(nodes):
                if node in needed or not is_removable(node):
                    kept_here.append(node)
                    for argument in node.all_input_nodes:
                        needed.update(self._leaves(argument, index))
            kept.append(kept_here[::-1])
            returned.append(outputs)
            live.update(boundaries.resolved(n) for n in needed if n not in nodes)
        revive_stitched(BEFORE_ALL)
        stitched.sort(key=self._order.__getitem__)
        return kept[::-1], returned[::-1], stitched

    def _leaves(self, node: Node, index: int) -> list[Node]:
        """Return what a partition needs to have for an argument: looks through its inner sizes."""
        if not self._boundaries.is_inner_size(node, index):
            return [node]
        return [n for argument in node.all_input_nodes for n in self._leaves(argument, index)]

    def _call(self, partition: Partition, nodes: list[Node], outputs: list[Node]) -> PieceCall:
        inputs = self._inputs(partition.index, nodes)
        name = f"{'native' if partition.is_native else 'piece'}_{partition.index}"
        module = self._partition_module(name, partition.index, nodes, inputs, outputs)
        call = self._graph.call_module(name, tuple(map(self._value, inputs)))
        picks = []
        for position, node in enumerate(outputs):
            pick = self._graph.create_node(
                "call_function", operator.getitem, (call, position), name=node.name
            )
            pick.meta = dict(node.meta)
            self._env[node] = pick
            picks.append(pick)
        call.meta["example_value"] = tuple(value_of(node) for node in outputs)
        return PieceCall(
            index=partition.index,
            name=name,
            is_native=partition.is_native,
            module=module,
            inputs=tuple(argument.name for argument in call.args if isinstance(argument, Node)),
            outputs=tuple(pick.name for pick in picks),
            weights=tuple(self._value(n).name for n in inputs if n in self._weights),
            mutated=self._boundaries.mutated(partition.index, inputs),
            region=partition.region,
            reasons=partition.reasons,
        )

    def _inputs(self, index: int, nodes: list[Node]) -> list[Node]:
        inside = set(nodes)
        found: dict[Node, None] = {}
        for node in nodes:
            for argument in node.all_input_nodes:
                for leaf in self._leaves(argument, index):
                    if leaf not in inside:
                        found[self._boundaries.resolved(leaf)] = None
        # Whatever stood inside is made inside; only in-place writers resolve to an input.
        reads = [node for node in found if node not in inside]
        is_tensor = [isinstance(value_of(node), torch.Tensor) for node in reads]
        return [
            *(n for n, t in zip(reads, is_tensor, strict=True) if t and n not in self._weights),
            *self._shape_givers(index, reads),
            *(n for n, t in zip(reads, is_tensor, strict=True) if not t and n not in self._weights),
            *(n for n in reads if n in self._weights),
        ]

    def _shape_givers(self, index: int, reads: list[Node]) -> list[Node]:
        """Return tensors of the call whose shapes give the sizes that no input's shape gives.

        Compiled code takes tensors only and reads its sizes from them.
        """
        if self._plan.partitions[index].is_native:
            return []
        wanted = {s for n in reads for s in _symbols(value_of(n)) if is_number(value_of(n))}
        for node in reads:
            wanted -= _dimensions(value_of(node))
        givers: list[Node] = []
        for node in self._source.graph.find_nodes(op="placeholder"):
            if wanted & _dimensions(value_of(node)) and node not in reads:
                givers.append(node)
                wanted -= _dimensions(value_of(node))
        return givers

    def _partition_module(
        self, name: str, index: int, nodes: list[Node], inputs: list[Node], outputs: list[Node]
    ) -> GraphModule:
        graph = Graph()
        env: dict[Node, Node] = {}
        for node in inputs:
            inner = graph.placeholder(node.name)
            _copy_meta(node, inner)
            env[node] = inner

        def value(node: Node) -> Node:
            if node not in env:
                resolved = self._boundaries.resolved(node)
                if resolved in env:
                    return env[resolved]
                assert is_size(node), node
                env[node] = graph.node_copy(node, value)
            return env[node]

        for node in nodes:
            env[node] = graph.node_copy(node, value)
            _copy_meta(node, env[node])
        graph.output(tuple(env[node] for node in outputs))
        return GraphModule({}, graph, class_name=name)

    def _emit(self, stitched: list[Node], index: int) -> None:
        for node in stitched:
            if self._boundaries.ready_after(node) == index:
                self._copy(node)

    def _copy(self, node: Node) -> Node:
        copy = self._graph.node_copy(node, self._value)
        _copy_meta(node, copy)
        self._env[node] = copy
        return copy

    def _value(self, node: Node) -> Node:
        return self._env[self._boundaries.resolved(node)]


def _symbols(value: Any) -> set[Any]:
    """Return the symbols of a size."""
    if not isinstance(value, torch.SymInt):
        return set()
    return set(value.node.expr.free_symbols)


def _dimensions(value: Any) -> set[Any]:
    """Return the symbols that are a whole dimension of a tensor."""
    if not isinstance(value, torch.Tensor):
        return set()
    sizes: tuple[Any, ...] = tuple(value.shape)
    return {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}


def _copy_meta(source: Node, copy: Node) -> None:
    copy.meta = dict(source.meta)
    if hasattr(source, "_dynamo_source"):  # The origin of a graph input.
        copy._dynamo_source = source._dynamo_source


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _is_weight(node: Node) -> bool:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name  # A method in torch 2.11.
    return (
        "_parameters[" in name
        or "_buffers[" in name
        or isinstance(value_of(node), torch.nn.Parameter)
    )
