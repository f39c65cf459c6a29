"""Views, reshapes, slices and casts that change nothing are left out.

Whatever the operation: where the result is the very memory of its argument, with the same dtype,
shape, strides and offset, reading one is reading the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from precast.passes.builtin import VERSIONS
from precast.passes.facts import geometry_of, is_of_torch, name_of, storage_of, value_of, writes
from precast.passes.interface import InductorPass

if TYPE_CHECKING:
    from torch.fx import Graph, Node


class NoOps(InductorPass):
    """Replaces each operation that changes nothing by its argument."""

    name = "no_ops"

    def identity(self) -> str:
        """Return the version."""
        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> dict[str, int]:
        """Count by the name of the operation."""
        matches: dict[str, int] = {}
        outputs = graph.output_node().all_input_nodes
        for node in list(graph.nodes):
            source = _source_of(node)
            # An output stays a tensor of its own.
            if source is None or node in outputs:
                continue
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            name = name_of(node)
            matches[name] = matches.get(name, 0) + 1
        return matches


def _source_of(node: Node) -> Node | None:
    """Return the argument that a node passes on as it is."""
    # Operators of others may describe their results wrongly; torch's own are relied on.
    if not node.all_input_nodes or not is_of_torch(node) or writes(node):
        return None
    source, made = node.all_input_nodes[0], value_of(node)
    given = value_of(source)
    if not isinstance(made, torch.Tensor) or not isinstance(given, torch.Tensor):
        return None
    if storage_of(made) != storage_of(given) or geometry_of(made) != geometry_of(given):
        return None
    return source
