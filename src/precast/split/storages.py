"""Which values of a graph share memory: views, and what is written in place.

Told by the fake tensors that tracing left on the nodes; nothing runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from precast.split.nodes import is_aggregate, is_call, is_pick, value_of


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
