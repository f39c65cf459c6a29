"""No copy where an in-place update is safe.

Code that was made functional copies a tensor before it writes into it. Where the original is the
piece's own and nobody reads it afterwards, the write may go into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from precast.passes.builtin import VERSIONS
from precast.passes.facts import is_of_torch, layout_of, name_of, storage_of, value_of, writes
from precast.passes.interface import InductorPass

if TYPE_CHECKING:
    from torch.fx import Graph, Node


class InPlace(InductorPass):
    """Drops `clone` before a write, where the cloned tensor is never read again."""

    name = "in_place"

    def identity(self) -> str:
        """Return the version."""
        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> int:
        """Count dropped copies."""
        return sum(
            _drop_copy(graph, node) for node in list(graph.nodes) if name_of(node) == "clone"
        )


def _drop_copy(graph: Graph, node: Node) -> bool:
    if not is_of_torch(node) or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0]
    made, given = value_of(node), value_of(source)
    if not isinstance(made, torch.Tensor) or not isinstance(given, torch.Tensor):
        return False
    if layout_of(made) != layout_of(given):
        return False
    position = {other: place for place, other in enumerate(graph.nodes)}
    sharing = [other for other in position if storage_of(given) in _storages_of(other)]
    is_own = all(other.op != "placeholder" for other in sharing)
    is_last = all(position[user] <= position[node] for other in sharing for user in other.users)
    copies = [other for other in position if storage_of(made) in _storages_of(other)]
    is_written = any(writes(user) for copy in copies for user in copy.users)
    if not (is_own and is_last and is_written):
        return False
    node.replace_all_uses_with(source)
    graph.erase_node(node)
    return True


def _storages_of(node: Node) -> list[Any]:
    value = value_of(node)
    return [storage_of(part) for part in (value if isinstance(value, (tuple, list)) else (value,))]
