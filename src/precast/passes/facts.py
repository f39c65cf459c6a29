"""What passes ask of a node of torch's functions and methods: its value, whether it writes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in (*_IN_PLACE.split(), "setitem", "delitem")
)


def value_of(node: Any) -> Any:
    """Return the fake value of a node; of anything else, itself."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def name_of(node: Node) -> str:
    """Return the last part of what a node calls: `add` for `torch.add` and for `x.add`."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")).partition(".")[0]


def writes(node: Node) -> bool:
    """Whether a node may write into one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.meta.get("precast_writes") or "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, o)._schema.is_mutable for o in target.overloads())
    name = name_of(node)
    return target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def is_removable(node: Node) -> bool:
    """Whether nothing is lost when a node that nobody uses goes."""
    if node.op not in ("call_function", "call_method") or writes(node):
        return False
    value = value_of(node)
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return bool(parts) and all(
        isinstance(part, (torch.Tensor, int, float, torch.SymInt)) for part in parts
    )


def is_of_torch(node: Node) -> bool:
    """Whether a node calls what torch itself brings: its fake values can be relied on."""
    if node.op == "call_method":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace = str(getattr(target, "_qualified_op_name", "") or target._schema.name)
        return namespace.partition("::")[0] in ("aten", "prims")
    module = str(getattr(target, "__module__", "") or "")
    return module.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "")


def storage_of(value: Any) -> Any:
    """Return what names the memory of a fake tensor; None for anything else."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def geometry_of(tensor: torch.Tensor) -> Any:
    """Return dtype, device, shape, strides and offset, comparable without a guard on sizes."""
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (
        tensor.dtype,
        tensor.device,
        tensor.dim(),
        tuple(map(plain_size, sizes)),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def layout_of(tensor: torch.Tensor) -> Any:
    """Return the geometry without the offset: what two tensors in different memory may share."""
    dtype, device, dim, sizes, *bits = geometry_of(tensor)
    return dtype, device, dim, sizes[:-1], tuple(bits)


def plain_size(size: Any) -> Any:
    """Return a size as a number or as its expression."""
    return size if isinstance(size, int) else size.node.expr
