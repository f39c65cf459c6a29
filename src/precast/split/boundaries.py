"""What crosses each cut of a plan: what pieces read and return, what is made again between them.

A tensor that leaves a piece as a view of another one is made outside it, from that one; where
that cannot be, the piece is a hazard, and `plan.py` makes it native.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from precast.split.nodes import (
    is_aggregate,
    is_call,
    is_pick,
    is_size,
    is_sizes,
    value_of,
    written_arguments,
)
from precast.split.storages import Storages

if TYPE_CHECKING:
    from precast.split.plan import CutPlan, Partition

#: The partition of the graph's inputs and constants, and of sizes made from them alone.
BEFORE_ALL = -1


class Boundaries:
    """What crosses each cut of a plan, worked out once for checking and for building.

    Attributes:
        reads: For each partition, the nodes of elsewhere that it reads, in order of first use.
        returned: For each partition, its nodes that it returns, in graph order.
        stitched: Nodes that are repeated between the pieces: sizes, and views of what pieces
            return or take.
        same_as: Nodes that write in place and return what they wrote into: the argument itself.
        written: For each partition, the storages that it writes into.
        hazards: Partitions that cannot be pieces, with the reason.
    """

    def __init__(self, graph_module: GraphModule, plan: CutPlan) -> None:
        self._graph = graph_module.graph
        self._partition_of = plan.partition_of
        self._partitions = plan.partitions
        self._storages = Storages(graph_module)
        self._order = {node: place for place, node in enumerate(self._graph.nodes)}
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._ready: dict[Node, int] = {}
        self.hazards: dict[int, str] = {}
        self.reads: list[list[Node]] = [self._reads_of(p) for p in plan.partitions]
        self.same_as: dict[Node, Node] = {}
        self._demanded: dict[Node, None] = {}
        self._settle()
        self.stitched: list[Node] = sorted(
            (n for n in self._demanded if self._is_stitched(n)), key=self._order.__getitem__
        )
        self.returned: list[list[Node]] = [[] for _ in plan.partitions]
        for node in sorted(self._demanded, key=self._order.__getitem__):
            place = self.partition(node)
            if place != BEFORE_ALL and not self._is_stitched(node) and node not in self.same_as:
                self.returned[place].append(node)
        self.written: list[set[object]] = [
            {
                self._storages.of(argument)
                for name in p.nodes
                for argument in self._written_by(self._nodes[name])
            }
            for p in plan.partitions
        ]
        self._find_hazards()

    def partition(self, node: Node) -> int:
        """Return where a node is made; `BEFORE_ALL` for inputs, constants and sizes."""
        return self._partition_of.get(node.name, BEFORE_ALL)

    def ready_after(self, node: Node) -> int:
        """Return the partition after which a node's value can be had between the pieces."""
        if node not in self._ready:
            place = self.partition(node)
            if is_size(node):
                place = max((self.ready_after(a) for a in node.all_input_nodes), default=BEFORE_ALL)
            self._ready[node] = place
        return self._ready[node]

    def is_inner_size(self, node: Node, index: int) -> bool:
        """Tell whether partition `index` has to compute a size itself.

        It does where the size is of one of its own tensors, and for a whole `x.size()`, which
        never crosses a cut.
        """
        return is_size(node) and (self.ready_after(node) >= index or is_sizes(value_of(node)))

    def resolved(self, node: Node) -> Node:
        """Return the node that really holds a value, in-place writers being their argument."""
        while node in self.same_as:
            node = self.same_as[node]
        return node

    def mutated(self, index: int, inputs: list[Node]) -> tuple[int, ...]:
        """Return the positions among `inputs` that partition `index` writes into."""
        return tuple(
            position
            for position, node in enumerate(inputs)
            if self._storages.of(node) is not None
            and self._storages.of(node) in self.written[index]
        )

    def _written_by(self, node: Node) -> list[Node]:
        found: list[Node] = []
        for argument in written_arguments(node):
            if is_aggregate(value_of(argument)):
                found.extend(user for user in argument.users if is_pick(user))
            found.append(argument)
        return found

    def _reads_of(self, partition: Partition) -> list[Node]:
        reads: dict[Node, None] = {}

        def visit(node: Node) -> None:
            if self.is_inner_size(node, partition.index):
                for argument in node.all_input_nodes:
                    visit(argument)
            elif self.partition(node) != partition.index or is_size(node):
                reads[node] = None

        for name in partition.nodes:
            for argument in self._nodes[name].all_input_nodes:
                visit(argument)
        return list(reads)

    def _settle(self) -> None:
        """Find all values needed between the pieces. Grows only, so it ends."""
        wanted: dict[Node, None] = {}
        for reads in self.reads:
            wanted.update(dict.fromkeys(reads))
        wanted.update(dict.fromkeys(self._graph.output_node().all_input_nodes))
        pending = list(wanted)
        while True:
            self._demand(pending)
            pending = []
            for node in self._demanded:
                place = self.partition(node)
                if place == BEFORE_ALL or self._partitions[place].is_native:
                    continue
                if self._is_identity(node):
                    self.same_as[node] = written_arguments(node)[0]
                    needed = [self.same_as[node]]
                elif self._is_stitched(node):
                    needed = node.all_input_nodes
                elif (root := self._root(node)) is not node and self._has_siblings(node):
                    needed = [root]
                else:
                    continue
                pending.extend(n for n in needed if n not in self._demanded)
            if not pending:
                return

    def _demand(self, nodes: list[Node]) -> None:
        for node in nodes:
            if node in self._demanded:
                continue
            self._demanded[node] = None
            if is_size(node):
                self._demand(node.all_input_nodes)

    def _is_identity(self, node: Node) -> bool:
        """Tell whether a node writes into an argument and returns that argument."""
        written = written_arguments(node)
        if not written or not isinstance(value_of(node), torch.Tensor):
            return False
        return self._storages.of(node) == self._storages.of(written[0]) and _looks_like(
            value_of(node), value_of(written[0])
        )

    def _is_stitched(self, node: Node) -> bool:
        """Tell whether a value is made again between the pieces instead of returned by one."""
        if is_size(node):
            return True
        place = self.partition(node)
        if place == BEFORE_ALL or self._partitions[place].is_native or self._is_identity(node):
            return False
        if self._storages.parent(node) is None:
            return False
        root = self._root(node)
        return self.partition(root) != place or (root is not node and self._has_siblings(node))

    def _root(self, node: Node) -> Node:
        """Follow views back to the tensor that owns the memory, or to one from outside."""
        place = self.partition(node)
        while self.partition(node) == place:
            parent = self._storages.parent(node)
            if parent is None:
                return node
            node = parent
        return node

    def _has_siblings(self, node: Node) -> bool:
        """Tell whether the same memory leaves the partition under another name too."""
        place = self.partition(node)
        storage = self._storages.of(node)
        if storage is None:
            return True  # A tuple of views: only needed for what is picked from it.
        return any(
            other is not node
            and self.partition(other) == place
            and self._storages.of(other) == storage
            for other in self._demanded
        )

    def _find_hazards(self) -> None:
        for node in self._demanded:
            place = self.partition(node)
            if place == BEFORE_ALL or self._partitions[place].is_native or node in self.same_as:
                continue
            if self._is_stitched(node):
                # Only a pure view can be made again; and a tuple with new tensors is none.
                if written_arguments(node) or any(
                    self.ready_after(a) > place for a in node.all_input_nodes
                ):
                    self.hazards[place] = "aliasing"
            elif not isinstance(value_of(node), torch.Tensor):
                self.hazards[place] = "aliasing" if is_aggregate(value_of(node)) else "sizes"
            elif self._storages.parent(node) is None and self._is_known_elsewhere(node):
                self.hazards[place] = "aliasing"
        for partition in self._partitions:
            if partition.is_native:
                continue
            index = partition.index
            if any(self._storages.aliases_partly(self._nodes[n]) for n in partition.nodes):
                self.hazards[index] = "aliasing"
            inputs = {self.resolved(n) for n in self.reads[index] if not is_size(n)}
            storages = [s for s in map(self._storages.of, inputs) if s in self.written[index]]
            if len(storages) != len(set(storages)):
                self.hazards[index] = "aliasing"  # It writes into memory that it sees twice.

    def _is_known_elsewhere(self, node: Node) -> bool:
        """Tell whether memory that looks new is that of an older node after all."""
        storage = self._storages.of(node)
        return any(
            self._order[other] < self._order[node] and self._storages.of(other) == storage
            for other in self._nodes.values()
            if is_call(other) or other.op in ("placeholder", "get_attr")
        )


def _looks_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dim() == other.dim()
        and one.dtype == other.dtype
        and all(a is b or _same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))
        and all(
            a is b or _same_size(a, b) for a, b in zip(one.stride(), other.stride(), strict=True)
        )
    )


def _same_size(one: Any, other: Any) -> bool:
    # As expressions: comparing symbolic sizes would add a guard.
    one = one.node.expr if isinstance(one, torch.SymInt) else one
    other = other.node.expr if isinstance(other, torch.SymInt) else other
    return bool(one == other)
