"""What nothing needs is dropped; what is computed twice is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from precast.passes.builtin import VERSIONS
from precast.passes.facts import is_of_torch, is_removable, writes
from precast.passes.interface import InductorPass
from precast.passes.piece_graph import drop_unused

if TYPE_CHECKING:
    from torch.fx import Graph, Node


class CleanUp(InductorPass):
    """Dead code, and equal operations, in pieces that write into nothing."""

    name = "clean_up"

    def identity(self) -> str:
        """Return the version."""
        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> dict[str, int]:
        """Count dropped and joined operations."""
        joined = 0
        if not any(map(writes, graph.nodes)):
            outputs = graph.output_node().all_input_nodes
            first: dict[Any, Node] = {}
            for node in list(graph.nodes):
                if not is_removable(node) or not is_of_torch(node):
                    continue
                same = first.setdefault(_call_of(node), node)
                # Two outputs stay two tensors.
                if same is not node and node not in outputs:
                    node.replace_all_uses_with(same)
                    graph.erase_node(node)
                    joined += 1
        return {"unused": drop_unused(graph), "equal": joined}


def _call_of(node: Node) -> Any:
    return node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items()))
