"""Where a graph is cut: one algorithm for every rule, and what crosses each cut.

A rule says which operators it wants outside the pieces and which region each node is in; all else
is decided here, because each of these was a wrong result somewhere once:

* sizes belong to no piece: they are computed between pieces and cross a cut as integers;
* `getitem` stays with the operator whose tuple it reads;
* neighbouring native operators make one native partition, and a piece that computes nothing
  (views, `empty`) joins a neighbour;
* a region of autocast is never cut;
* operators that compiled code must not contain run natively, whatever the rule says;
* nodes keep their order, and none that writes is ever repeated;
* a view of a tensor that others can see is made outside the piece, from that tensor.

The graph must have gone through `clean_graph`. `build.py` makes the pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from precast.errors import SplitError
from precast.split.nodes import (
    enters_context,
    exits_context,
    inner_graphs,
    is_aggregate,
    is_call,
    is_data_dependent,
    is_empty_factory,
    is_foreign_operator,
    is_known,
    is_pick,
    is_random,
    is_size,
    is_sizes,
    is_tensor,
    names_of,
    reshapes_in_place,
    sets_global_state,
    value_of,
    written_arguments,
)
from precast.values import Value

#: The partition of the graph's inputs and constants, and of sizes made from them alone.
BEFORE_ALL = -1


class Placement(Value):
    """What a rule says of a graph, by node name.

    `native`: nodes to keep outside the pieces, each with a code from `errors.REASON_CODES` or a
    short word. `regions`: a name for where each node is; a cut is made wherever it changes. A node
    that is not named is where the node before it is. `unmatched`: parts of the rule that fit no
    node, for people.
    """

    native: Mapping[str, str]
    regions: Mapping[str, str]
    unmatched: tuple[str, ...] = ()


class Splitter(Protocol):
    """A rule for cutting graphs. Knows nothing of how a cut is made right."""

    def place(self, graph_module: GraphModule) -> Placement:
        """Say which nodes run natively and which region each node is in."""
        ...


class Whole(Value):
    """No cut that is not necessary: one piece between the operators that must run natively."""

    def place(self, graph_module: GraphModule) -> Placement:
        """Put everything in one region."""
        return Placement(native={}, regions={})


class Partition(Value, kw_only=True):
    """A run of nodes that become one piece, or one native stretch of the execution code."""

    index: int
    is_native: bool
    nodes: tuple[str, ...]
    region: str = ""
    reasons: tuple[str, ...] = ()  # Why it is native, each once, in order.


class CutPlan(Value, kw_only=True):
    """Where a graph is cut. `partition_of` leaves out inputs, constants, sizes and the output."""

    rule: str
    partitions: tuple[Partition, ...]
    partition_of: Mapping[str, int]
    unmatched: tuple[str, ...] = ()  # Parts of the rule that fit no node.

    @property
    def num_pieces(self) -> int:
        """How many partitions are to be compiled."""
        return sum(not partition.is_native for partition in self.partitions)


def make_plan(graph_module: GraphModule, rule: Splitter) -> CutPlan:
    """Cut a cleaned graph by a rule.

    Raises:
        SplitError: The graph holds what no cut can carry over: a higher-order operator with
            sub-graphs, or a tensor that changes its shape in place. Names the node.
    """
    _refuse_uncuttable(graph_module, rule)
    placement = rule.place(graph_module)
    native = _native_nodes(graph_module, placement)
    while True:
        groups = _merge_idle(_groups(graph_module, placement, native), graph_module)
        plan = _plan(groups, native, rule, placement)
        # A piece whose outputs alias in a way that views cannot express runs natively; that may
        # join its neighbours, so the cut is made again. Ends: every round makes more native.
        hazards = Boundaries(graph_module, plan).hazards
        if not hazards:
            return plan
        for index, reason in hazards.items():
            for name in plan.partitions[index].nodes:
                native.setdefault(name, reason)


def _refuse_uncuttable(graph_module: GraphModule, rule: Splitter) -> None:
    for node in graph_module.graph.nodes:
        if not is_call(node):
            continue
        if inner := inner_graphs(node):
            raise SplitError(
                repr(rule), node.name, f"{node.target} takes the sub-graph {', '.join(inner)}"
            )
        if reshapes_in_place(node):
            raise SplitError(
                repr(rule), node.name, f"{node.target} changes the shape of a tensor in place"
            )
        if node.op == "call_module":
            raise SplitError(repr(rule), node.name, f"it calls the module {node.target}")


def _native_nodes(graph_module: GraphModule, placement: Placement) -> dict[str, str]:
    """Return why each native node is native, for the rule's reasons and for our own."""
    native: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if not is_call(node) or is_size(node) or is_pick(node):
            continue
        if is_random(node):
            native[node.name] = "random-op"
        elif is_data_dependent(node):
            native[node.name] = "data-dependent"
        elif sets_global_state(node):
            native[node.name] = "global-state"
        elif is_foreign_operator(node) or not (
            is_known(node) or enters_context(node) or exits_context(node)
        ):
            native[node.name] = "foreign-op"
        elif node.name in placement.native:
            native[node.name] = placement.native[node.name]
    return native


class _Group:
    """A run of nodes on its way to becoming a partition."""

    def __init__(self, is_native: bool, region: str, nodes: list[Node]) -> None:
        self.is_native = is_native
        self.region = region
        self.nodes = nodes


def _groups(
    graph_module: GraphModule, placement: Placement, native: dict[str, str]
) -> list[_Group]:
    groups: list[_Group] = []
    home: dict[Node, _Group] = {}
    region = ""
    for atom in _atoms(graph_module):
        region = next(
            (placement.regions[n.name] for n in atom if n.name in placement.regions), region
        )
        if len(atom) == 1 and is_pick(atom[0]):
            source: Any = atom[0].args[0]
            if source in home:
                home[source].nodes.append(atom[0])
                home[atom[0]] = home[source]
                continue
        is_native = any(node.name in native for node in atom)
        last = groups[-1] if groups else None
        if last is None or last.is_native != is_native or (not is_native and last.region != region):
            last = _Group(is_native, region, [])
            groups.append(last)
        last.nodes.extend(atom)
        home.update(dict.fromkeys(atom, last))
    return groups


def _atoms(graph_module: GraphModule) -> list[list[Node]]:
    """Return what must stay together: single nodes, and whole regions of autocast and the like."""
    atoms: list[list[Node]] = []
    depth = 0
    for node in graph_module.graph.nodes:
        if not is_call(node) or is_size(node):
            continue
        if depth:
            atoms[-1].append(node)
        else:
            atoms.append([node])
        if enters_context(node):
            depth += 1
        elif exits_context(node):
            depth -= 1
    return atoms


def stretches(graph_module: GraphModule) -> list[list[list[Node]]]:
    """Return what lies between the operators that run natively whatever the rule.

    Each stretch is a list of units, in order; a unit stays together in every cut.
    """
    native = _native_nodes(graph_module, Placement(native={}, regions={}))
    found: list[list[list[Node]]] = [[]]
    home: dict[Node, list[Node]] = {}
    for atom in _atoms(graph_module):
        source = atom[0].args[0] if is_pick(atom[0]) else None
        if isinstance(source, Node) and source in home:
            home[source].append(atom[0])
            home[atom[0]] = home[source]
        elif any(node.name in native for node in atom):
            found.append([])
        else:
            found[-1].append(atom)
            home.update(dict.fromkeys(atom, atom))
    return [stretch for stretch in found if stretch]


def _merge_idle(groups: list[_Group], graph_module: GraphModule) -> list[_Group]:
    """Join each piece that is none in itself to a neighbour, a native one if there is one."""
    storages = Storages(graph_module)
    while True:
        groups = _merge_equal(groups)
        place = next(
            (
                place
                for place, group in enumerate(groups)
                if not group.is_native and is_idle(group.nodes, storages)
            ),
            None,
        )
        if place is None:
            return groups
        if len(groups) == 1:
            groups[0].is_native = True  # Nothing to compile.
            return groups
        after = groups[place + 1] if place + 1 < len(groups) else None
        before = groups[place - 1] if place else None
        idle = groups.pop(place)
        if after is not None and (after.is_native or before is None or not before.is_native):
            after.nodes[:0] = idle.nodes
        else:
            assert before is not None
            before.nodes.extend(idle.nodes)


def _merge_equal(groups: list[_Group]) -> list[_Group]:
    merged: list[_Group] = []
    for group in groups:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.is_native == group.is_native
            and (group.is_native or last.region == group.region)
        ):
            last.nodes.extend(group.nodes)
        else:
            merged.append(group)
    return merged


def is_idle(nodes: Collection[Node], storages: Storages) -> bool:
    """Tell whether a run of nodes is not worth a piece: it computes nothing, or reads no tensor.

    A piece takes its sizes from its tensors' shapes; without a tensor it could not have any.
    """
    inside = set(nodes)
    return not any(_computes(node, storages) for node in nodes) or not any(
        is_tensor(argument) and argument not in inside
        for node in nodes
        for argument in node.all_input_nodes
    )


def _computes(node: Node, storages: Storages) -> bool:
    if is_pick(node) or is_empty_factory(node) or enters_context(node) or exits_context(node):
        return False
    return bool(written_arguments(node)) or storages.parent(node) is None


def _plan(
    groups: list[_Group], native: dict[str, str], rule: Splitter, placement: Placement
) -> CutPlan:
    partitions = tuple(
        Partition(
            index=index,
            is_native=group.is_native,
            nodes=tuple(node.name for node in group.nodes),
            region=group.region,
            reasons=tuple(dict.fromkeys(native[n.name] for n in group.nodes if n.name in native))
            if group.is_native
            else (),
        )
        for index, group in enumerate(groups)
    )
    return CutPlan(
        rule=repr(rule),
        partitions=partitions,
        partition_of={name: p.index for p in partitions for name in p.nodes},
        unmatched=placement.unmatched,
    )


class Storages:
    """Which nodes' tensors share memory, by the storage of their fake tensors."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._same: dict[object, object] = {}
        for node in graph_module.graph.nodes:
            # What cleaning replaced by this node was traced as a copy and is none in eager mode.
            for other in node.meta.get("precast_same_storage", ()):
                if isinstance(other, torch.Tensor) and isinstance(value_of(node), torch.Tensor):
                    self._same[self._find(_storage(other))] = self._find(_storage(value_of(node)))

    def of(self, node: Node) -> object | None:
        """Return a token that nodes with the same memory share; None if it is no tensor."""
        value = value_of(node)
        return self._find(_storage(value)) if isinstance(value, torch.Tensor) else None

    def parent(self, node: Node) -> Node | None:
        """Return the argument that a node's value is a view of, or is; None if it is new."""
        value = value_of(node)
        if not is_call(node):
            return None
        if is_pick(node) and node.args and isinstance(node.args[0], Node):
            source = node.args[0]
            return source if self.parent(source) is not None else None
        if is_aggregate(value):
            tensors = list(_tensors_in(value))
            parents = [self._parent_of(node, tensor) for tensor in tensors]
            return parents[0] if all(p is not None for p in parents) else None
        return self._parent_of(node, value) if isinstance(value, torch.Tensor) else None

    def aliases_partly(self, node: Node) -> bool:
        """Tell whether a node gives new tensors and views of its arguments together."""
        value = value_of(node)
        if not is_call(node) or not is_aggregate(value) or is_pick(node):
            return False
        parents = [self._parent_of(node, tensor) for tensor in _tensors_in(value)]
        return any(p is not None for p in parents) and any(p is None for p in parents)

    def _parent_of(self, node: Node, value: torch.Tensor) -> Node | None:
        storage = self._find(_storage(value))
        for argument in node.all_input_nodes:
            if self.of(argument) == storage:
                return argument
        return None

    def _find(self, token: object) -> object:
        while token in self._same and self._same[token] != token:
            token = self._same[token]
        return token


def _storage(value: torch.Tensor) -> object:
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return ("no storage", id(value))  # Sparse tensors, and the like.


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


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


def foreign_operators(graph_module: GraphModule) -> dict[str, int]:
    """Count the operators of other libraries that a graph calls, by name."""
    counts: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if is_call(node) and is_foreign_operator(node):
            name = max(names_of(node), key=len)
            counts[name] = counts.get(name, 0) + 1
    return counts
