"""What an operator costs, from the shapes that were traced: bytes held, FLOPs, bytes moved.

Nothing is allocated and nothing run: an operator's FLOPs are torch's own count of it over fake
tensors. Symbolic sizes count at the size they were captured with, else at their upper bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from precast.split.nodes import (
    enters_context,
    exits_context,
    inner_graphs,
    is_call,
    is_known,
    is_pick,
    is_size,
    sets_global_state,
    short_name,
    value_of,
    written_arguments,
)
from precast.split.storages import Storages
from precast.torch_private import count_flops

#: Bytes moved count as so many FLOPs: a CPU core computes about ten in the time of one byte, a
#: GPU a hundred and more. It keeps a row of cheap operators from counting as nothing.
FLOPS_PER_BYTE = 10

_READS_ROWS = frozenset(["embedding", "embedding_bag", "index_select", "gather", "take_along_dim"])
_HUGE = 1 << 40


class CostModel:
    """The costs of one cleaned graph's operators."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._storages = Storages(graph_module)
        self._bytes: dict[object, int] = {}
        for node in graph_module.graph.nodes:
            storage = self._storages.of(node)
            if storage is not None:
                size = _extent_bytes(value_of(node))
                self._bytes[storage] = max(size, self._bytes.get(storage, 0))
        self._counted: dict[str, int] = {}

    def storage(self, node: Node) -> object | None:
        """Return a token that nodes with the same memory share; None if it is no tensor."""
        return self._storages.of(node)

    def storage_bytes(self, storage: object) -> int:
        """Return how much memory a token of `storage` stands for."""
        return self._bytes[storage]

    def is_free(self, node: Node) -> bool:
        """Tell whether a node costs nothing: a view, a size, or one value out of a tuple."""
        if not is_call(node) or is_size(node) or is_pick(node):
            return True
        if enters_context(node) or exits_context(node) or sets_global_state(node):
            return True
        return not written_arguments(node) and self._storages.parent(node) is not None

    def bytes_moved(self, node: Node) -> int:
        """Return the bytes that a node reads and writes when nothing is kept in registers."""
        if self.is_free(node):
            return 0
        written = _tensor_bytes(value_of(node))
        reads = [_tensor_bytes(value_of(argument)) for argument in node.all_input_nodes]
        if short_name(node) in _READS_ROWS:
            reads = [min(read, written) for read in reads]
        return written + sum(reads)

    def flops(self, node: Node) -> int:
        """Return a node's floating-point operations; what torch cannot count is one an element."""
        if self.is_free(node):
            return 0
        return max(self._counted_flops(node), _num_elements(value_of(node)))

    def work(self, node: Node) -> int:
        """Return FLOPs, or what moving a node's bytes costs in FLOPs where that is more."""
        return max(self.flops(node), FLOPS_PER_BYTE * self.bytes_moved(node))

    def _counted_flops(self, node: Node) -> int:
        if node.op == "call_module" or not is_known(node) or inner_graphs(node):
            return 0
        args, kwargs = _as_values(node.args), _as_values(node.kwargs)
        seen = f"{node.op} {node.target} {args} {kwargs}"  # Layers repeat.
        if seen not in self._counted:
            self._counted[seen] = _count_flops(node, args, kwargs)
        return self._counted[seen]


class _Shape:
    """A tensor argument with numbers for its sizes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(map(concrete_size, tensor.shape))
        self.stride = tuple(map(concrete_size, tensor.stride()))
        self.dtype = tensor.dtype

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape}{self.stride}"

    def fake(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def _as_values(arguments: Any) -> Any:
    """Put shapes and numbers in place of nodes."""

    def value(item: Any) -> Any:
        found = value_of(item) if isinstance(item, Node) else item
        if isinstance(found, (tuple, list)):
            return type(found)(map(value, found))
        if isinstance(found, torch.Tensor):
            return _Shape(found) if found.layout is torch.strided else found
        return concrete_size(found) if isinstance(found, torch.SymInt) else found

    return map_aggregate(arguments, value)


def _count_flops(node: Node, args: Any, kwargs: Any) -> int:
    def fake(item: Any) -> Any:
        if isinstance(item, (tuple, list)) and not isinstance(item, torch.Size):
            return type(item)(map(fake, item))
        return item.fake() if isinstance(item, _Shape) else item

    def run() -> None:
        given: Any = map_aggregate(args, fake)
        named: Any = map_aggregate(kwargs, fake)
        target: Any = node.target
        if node.op == "call_method":
            getattr(given[0], target)(*given[1:], **named)
        else:
            target(*given, **named)

    return count_flops(run) or 0


def concrete_size(size: Any) -> int:
    """Return a size as a number: itself, as it was captured, or its upper bound."""
    if isinstance(size, int):
        return size
    try:
        hint = size.node.hint
    except AttributeError:
        hint = None
    if hint is not None:
        return int(hint)
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    for bound in (bounds.upper, bounds.lower):
        if bound.is_Integer and int(bound) < _HUGE:  # Else it is infinite, or as good as that.
            return max(int(bound), 1)
    return 1


def _num_elements(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_num_elements, value))
    if not isinstance(value, torch.Tensor):
        return 0
    product = 1
    for size in value.shape:
        product *= concrete_size(size)
    return product


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_tensor_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    return min(_num_elements(value) * value.element_size(), _extent_bytes(value))


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Return the memory from a tensor's first element to its last."""
    if tensor.layout is not torch.strided:
        return _num_elements(tensor) * tensor.element_size()
    shape = [concrete_size(size) for size in tensor.shape]
    if 0 in shape:
        return 0
    steps = [concrete_size(step) for step in tensor.stride()]
    last = sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    return (last + 1) * tensor.element_size()
