"""Linear layers that read one tensor become one product with their weights stacked.

This module changes the graph: the product takes one packed weight. Who binds the graph makes it,
by `precast.runtime.packed`: there the layers' parameters become views of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from precast.passes.facts import geometry_of, name_of, value_of, writes
from precast.passes.interface import InductorPass

if TYPE_CHECKING:
    from torch.fx import Graph, Node

MayPack = Callable[[Sequence[str]], bool]

# Between these the same operation may mean another thing.
_MODES = ("_enter", "_exit", "_set_grad", "_vmap", "_saved_tensors")


class MergeLinears(InductorPass):
    """Merges linear layers; `packs` names the parameters of each packed one, afterwards."""

    name = "merge_linears"
    only_on_gpu = False

    def identity(self) -> str:
        """Return the version."""
        from precast.passes.builtin import VERSIONS

        return VERSIONS[self.name]

    def __call__(self, graph: Graph) -> dict[str, int]:
        """Do nothing: without knowing which parameters may be packed, none are."""
        return self.merge(graph, lambda _: False)[0]

    def merge(self, graph: Graph, may_pack: MayPack) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Merge what can be merged.

        Args:
            graph: The whole graph, as captured and cleaned.
            may_pack: Whether the tensors of these placeholders may become views of one tensor; of a
                single one, whether it may with others.

        Returns:
            How many layers were merged into how many products; and for each new placeholder, the
            placeholders whose tensors it stacks, in order.
        """
        packs: dict[str, list[str]] = {}
        num_layers = num_products = 0
        for group in _groups(graph, may_pack):
            if self.only_on_gpu and value_of(group[0].weight).device.type == "cpu":
                continue
            _merge_group(graph, group, packs)
            num_layers += len(group)
            num_products += 1
        return {"layers": num_layers, "products": num_products} if packs else {}, packs


class MergeLinearsOnGpu(MergeLinears):
    """The same where weights lie on a GPU: on a CPU merging was not found to save time."""

    name = "merge_linears_on_gpu"
    only_on_gpu = True


class _Linear:
    """One linear layer of a graph."""

    def __init__(self, node: Node, source: Node, weight: Node, bias: Node | None) -> None:
        self.node = node
        self.source = source
        self.weight = weight
        self.bias = bias

    @property
    def parameters(self) -> list[Node]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def _read(node: Node, may_pack: MayPack) -> _Linear | None:
    """Return a node as a linear layer whose parameters may be packed."""
    if node.target is not torch.nn.functional.linear:
        return None
    names = ("input", "weight", "bias")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source: Any = given.get("input")
    weight: Any = given.get("weight")
    bias: Any = given.get("bias")
    if not isinstance(value_of(source), torch.Tensor) or not hasattr(weight, "op"):
        return None
    found = _Linear(node, source, weight, bias)
    product = value_of(node)
    for parameter in found.parameters:
        value = value_of(parameter)
        if (
            getattr(parameter, "op", "") != "placeholder"
            or not may_pack([parameter.name])
            or list(parameter.users) != [node]
            or value.dtype is not value_of(weight).dtype
            or not value.dtype.is_floating_point
            or not all(isinstance(size, int) for size in value.shape)
        ):
            return None
    if value_of(weight).dim() != 2 or product.dim() < 2:
        return None
    with torch.no_grad():
        is_dense = geometry_of(product.new_empty(product.shape)) == geometry_of(product)
        # Under an autocast of the model's own it would be cast, here it is not.
        values = [value_of(part) for part in (source, weight, bias)]
        is_same = geometry_of(torch.nn.functional.linear(*values)) == geometry_of(product)
    return found if is_dense and is_same else None


def _groups(graph: Graph, may_pack: MayPack) -> list[list[_Linear]]:
    """Return the layers that read one tensor, while nothing is written and no mode changes."""
    groups: dict[Any, list[_Linear]] = {}
    stretch = 0
    for node in graph.nodes:
        if writes(node) or name_of(node).startswith(_MODES):
            stretch += 1
        found = _read(node, may_pack)
        if found is not None:
            weight = value_of(found.weight)
            kind = (weight.dtype, weight.device, found.bias is None, _region_of(node))
            groups.setdefault((stretch, found.source, kind), []).append(found)
    return [group for group in groups.values() if len(group) > 1 and _may_merge(group, may_pack)]


def _may_merge(group: list[_Linear], may_pack: MayPack) -> bool:
    stacks = zip(*([p.name for p in one.parameters] for one in group), strict=True)
    return all(may_pack(list(names)) for names in stacks)


def _region_of(node: Node) -> Any:
    """Return the block of layers that a node belongs to, so that no product spans two of them."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if re.search(r"\b\d+\b", str(path)):
            return str(path)
    return None


def _merge_group(graph: Graph, group: list[_Linear], packs: dict[str, list[str]]) -> None:
    first = group[0]
    # Read now: what the layers read may itself have been merged since.
    source = first.node.args[0] if first.node.args else first.node.kwargs["input"]
    weight = _packed(graph, [one.weight for one in group], packs)
    biases = [one.bias for one in group if one.bias is not None]
    bias = _packed(graph, biases, packs) if biases else None

    def call(op: str, target: Any, args: tuple[Any, ...], like: Node) -> Node:
        node = graph.create_node(op, target, args)
        node.meta = {k: v for k, v in like.meta.items() if k != "example_value"}
        values = [value_of(argument) for argument in args]
        with torch.no_grad():
            node.meta["example_value"] = (
                getattr(values[0], target)(*values[1:]) if op == "call_method" else target(*values)
            )
        return node

    with graph.inserting_before(first.node):
        linear = torch.nn.functional.linear
        product = call("call_function", linear, (source, weight, bias), first.node)
        start = 0
        for one in group:
            length = value_of(one.weight).shape[0]
            part = call("call_method", "narrow", (product, -1, start, length), one.node)
            # As dense as the layer's own result: others may rely on it. Compiled code fuses it.
            dense = call("call_method", "contiguous", (part,), one.node)
            assert geometry_of(value_of(dense))[:3] == geometry_of(value_of(one.node))[:3]
            one.node.replace_all_uses_with(dense)
            start += length
    for one in group:
        graph.erase_node(one.node)
        for parameter in one.parameters:
            graph.erase_node(parameter)


def _packed(graph: Graph, parameters: list[Node], packs: dict[str, list[str]]) -> Node:
    """Return a new placeholder for the parameters stacked."""
    with graph.inserting_before(parameters[0]):
        node = graph.placeholder(f"precast_packed_{parameters[0].name}")
    value = value_of(parameters[0])
    length = sum(value_of(parameter).shape[0] for parameter in parameters)
    with torch.no_grad():
        node.meta["example_value"] = torch.empty_like(
            value, memory_format=torch.contiguous_format
        ).new_empty((length, *value.shape[1:]))
    packs[node.name] = [parameter.name for parameter in parameters]
    return node
