"""Where a graph is cut: one algorithm for every rule.

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

The graph must have gone through `clean_graph`. `boundaries.py` works out what crosses each cut,
`build.py` makes the pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch.fx import GraphModule, Node

from precast.errors import SplitError
from precast.split.boundaries import Boundaries
from precast.split.nodes import (
    enters_context,
    exits_context,
    inner_graphs,
    is_call,
    is_data_dependent,
    is_empty_factory,
    is_foreign_operator,
    is_known,
    is_pick,
    is_random,
    is_size,
    is_tensor,
    meets_lazy_view,
    names_of,
    reshapes_in_place,
    sets_global_state,
    unsupported_nodes,
    written_arguments,
)
from precast.split.storages import Storages
from precast.values import Value


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
    unsupported = unsupported_nodes(graph_module.graph)
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
        elif meets_lazy_view(node):
            native[node.name] = "lazy-view"
        elif node in unsupported:
            native[node.name] = "op-unsupported"
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


def foreign_operators(graph_module: GraphModule) -> dict[str, int]:
    """Count the operators of other libraries that a graph calls, by name."""
    counts: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if is_call(node) and is_foreign_operator(node):
            name = max(names_of(node), key=len)
            counts[name] = counts.get(name, 0) + 1
    return counts
