"""One spelling for what models write in many ways, so that equal blocks get equal texts.

Only what is exact: the same operations on the same numbers in the same dtypes, under another name
or with the two sides of a sum or product exchanged. These passes see the whole graph, before it is
cut; `x * rsqrt(...)` and `rsqrt(...) * x` are then one piece in the cache, from whichever model.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from precast.passes.facts import geometry_of, is_of_torch, layout_of, name_of, value_of
from precast.passes.interface import InductorPass

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_CASTS = {"float": torch.float32, "half": torch.float16, "double": torch.float64}
_CASTS["bfloat16"] = torch.bfloat16
_ACTIVATIONS = frozenset({"silu", "gelu", "relu", "sigmoid", "tanh"})


class CanonicalNorm(InductorPass):
    """Root-mean-square norms: `x.pow(2)`, `mean(-1)`, `+ eps`, `torch.rsqrt`, `x *`, `weight *`."""

    name = "canonical_norm"

    def identity(self) -> str:
        """Return the version."""
        from precast.passes.builtin import VERSIONS

        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> dict[str, int]:
        """Count the norms that were written in another way."""
        found = [node for node in graph.nodes if _is(node, "rsqrt")]
        return {"rms_norm": sum(map(_respell_norm, found))}


class CanonicalResidual(InductorPass):
    """Sums of two tensors of one kind: `operator.add`, what was there first first."""

    name = "canonical_residual"

    def identity(self) -> str:
        """Return the version."""
        from precast.passes.builtin import VERSIONS

        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> dict[str, int]:
        """Count the sums that were written in another way."""
        place = {node: number for number, node in enumerate(graph.nodes)}
        count = 0
        for node in graph.nodes:
            sides = _sides(node, "add")
            if sides is not None and _are_alike(*sides):
                first, second = sorted(sides, key=place.__getitem__)
                count += _respell(node, operator.add, first, second)
        return {"residual_add": count}


class ActivationAndMultiply(InductorPass):
    """Gates: `activation(gate) * up`, the activation first."""

    name = "activation_and_multiply"

    def identity(self) -> str:
        """Return the version."""
        from precast.passes.builtin import VERSIONS

        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> dict[str, int]:
        """Count the gates that were written in another way."""
        matches = dict.fromkeys(sorted(_ACTIVATIONS), 0)
        for node in graph.nodes:
            sides = _sides(node, "mul")
            if sides is None or not _are_alike(*sides):
                continue
            active = [side for side in sides if name_of(side) in _ACTIVATIONS]
            if len(active) == 1 and is_of_torch(active[0]):
                other = sides[1] if sides[0] is active[0] else sides[0]
                matches[name_of(active[0])] += _respell(node, operator.mul, active[0], other)
        return {name: count for name, count in matches.items() if count}


def _respell_norm(rsqrt: Node) -> bool:
    """Give a norm one spelling; False where it has it, or is no such norm."""
    shifted = rsqrt.args[0] if len(rsqrt.args) == 1 and not rsqrt.kwargs else None
    added = _sides(shifted, "add", numbers=True)
    if added is None:
        return False
    mean, eps = added if isinstance(added[1], float) else added[::-1]
    if not isinstance(eps, float) or not _is(mean, "mean"):
        return False
    squared = mean.args[0]
    root = _squared(squared)
    if root is None or _mean_of(mean) is None:
        return False
    changed = _respell(squared, "pow", root, 2)
    changed |= _respell(mean, "mean", squared, -1, keepdim=True)
    changed |= _respell(shifted, operator.add, mean, eps)
    changed |= _respell(rsqrt, torch.rsqrt, shifted)
    changed |= _respell_cast(root)
    for user in list(rsqrt.users):
        sides = _sides(user, "mul")
        if sides is None or root not in sides:
            continue
        changed |= _respell(user, operator.mul, root, rsqrt)
        changed |= _respell_weight(user)
    return changed


def _respell_weight(scaled: Node) -> bool:
    """Write `weight * x`, and the cast that may come before it, in one way."""
    changed = False
    for cast in [user for user in scaled.users if _cast_to(user) is not None]:
        changed |= _respell_cast(cast)
    for node in [scaled, *(user for user in scaled.users if _cast_to(user) is not None)]:
        for user in list(node.users):
            sides = _sides(user, "mul")
            if sides is not None and sides[0] is not sides[1]:
                weight = sides[1] if sides[0] is node else sides[0]
                if value_of(weight).dim() == 1:
                    changed |= _respell(user, operator.mul, weight, node)
    return changed


def _squared(node: Any) -> Node | None:
    """Return what a node is the square of."""
    found: Any = None
    is_power = _is(node, "pow") and list(node.args[1:]) in ([2], [2.0])
    if (is_power or _is(node, "square")) and not node.kwargs:
        found = node.args[0]
    elif (sides := _sides(node, "mul")) is not None and sides[0] is sides[1]:
        found = sides[0]
    is_float = found is not None and value_of(found).dtype.is_floating_point
    return found if is_float else None


def _mean_of(node: Node) -> Node | None:
    """Return what a node is the mean of, over the last dimension, which is kept."""
    names = ("input", "dim", "keepdim")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if set(given) != set(names) or given["keepdim"] is not True or len(node.args) > 3:
        return None
    found: Any = given["dim"]
    dims = [found] if isinstance(found, int) else list(found)
    source: Any = given["input"]
    if len(dims) != 1 or dims[0] not in (-1, value_of(source).dim() - 1):
        return None
    return source  # type: ignore[no-any-return]


def _cast_to(node: Any) -> torch.dtype | None:
    """Return the dtype that a node casts to, where it does nothing else."""
    if not _is_call(node) or node.op != "call_method":
        return None
    name, rest = node.target, [*node.args[1:], *node.kwargs.values()]
    if name in _CASTS and not rest:
        return _CASTS[name]
    is_plain = set(node.kwargs) <= {"dtype"} and len(rest) == 1
    if name in ("to", "type") and is_plain and isinstance(rest[0], torch.dtype):
        return rest[0]
    return None


def _respell_cast(node: Any) -> bool:
    dtype = _cast_to(node)
    if dtype is None:
        return False
    return _respell(node, "to", node.args[0], dtype)


def _sides(node: Any, name: str, *, numbers: bool = False) -> Any:
    """Return the two sides of a sum or product: tensors, or with `numbers` one of them a number."""
    if not _is(node, name) or len(node.args) != 2 or node.kwargs:
        return None
    tensors = [isinstance(value_of(side), torch.Tensor) for side in node.args]
    return tuple(node.args) if all(tensors) or (numbers and any(tensors)) else None


def _are_alike(first: Node, second: Node) -> bool:
    """Whether two tensors have one shape, dtype and layout: exchanging them then shows nowhere."""
    return bool(layout_of(value_of(first)) == layout_of(value_of(second)))


def _is_call(node: Any) -> bool:
    return getattr(node, "op", None) in ("call_function", "call_method")


def _is(node: Any, name: str) -> bool:
    return bool(
        _is_call(node)
        and name_of(node) == name
        and is_of_torch(node)
        and isinstance(value_of(node), torch.Tensor)
    )


def _respell(node: Any, target: Any, *args: Any, **kwargs: Any) -> bool:
    """Let a node call something else that computes the same; False where it does already.

    Nothing is changed unless torch says that dtype, shape and strides stay what they are.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    if (node.op, node.target, node.args, node.kwargs) == (op, target, args, kwargs) and [
        type(value) for value in node.args
    ] == [type(value) for value in args]:
        return False
    values = [value_of(argument) for argument in args]
    with torch.no_grad():
        made = (
            getattr(values[0], target)(*values[1:], **kwargs)
            if isinstance(target, str)
            else target(*values, **kwargs)
        )
    if geometry_of(made) != geometry_of(value_of(node)):
        return False
    node.op, node.target, node.args, node.kwargs = op, target, args, kwargs
    return True


__all__ = ["ActivationAndMultiply", "CanonicalNorm", "CanonicalResidual"]
