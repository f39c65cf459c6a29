"""Inductor's graph, in Inductor's hands: what must be true of it after a pass has changed it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from precast.passes.facts import geometry_of
from precast.passes.piece_graph import BrokenGraphError


class AtenGraph:
    """What was true of a graph before a pass; `settle` finds out whether it still is."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known = {node: _call_of(node) for node in graph.nodes}
        self._inputs = [node.name for node in graph.find_nodes(op="placeholder")]
        self._outputs = [_kind_of(value) for value in self._output_values()]
        self._written = self._written_inputs()

    def settle(self) -> None:
        """Drop dead nodes, give new ones their values, and check the graph.

        Raises:
            BrokenGraphError: It is invalid, or computes other kinds of outputs.
        """
        graph = self._graph
        try:
            graph.eliminate_dead_code()  # ATen operators say for themselves whether they write.
            graph.lint()
        except Exception as error:
            raise BrokenGraphError("", f"the graph is invalid: {error}") from error
        if [node.name for node in graph.find_nodes(op="placeholder")] != self._inputs:
            raise BrokenGraphError("", "the graph takes other inputs")
        self._update()
        if (written := self._written_inputs()) != self._written:
            raise BrokenGraphError("", f"it writes into {written}, not into {self._written}")
        outputs = [_kind_of(value) for value in self._output_values()]
        if len(outputs) != len(self._outputs):
            raise BrokenGraphError(
                "output", f"{len(outputs)} outputs where there were {len(self._outputs)}"
            )
        for number, (new, old) in enumerate(zip(outputs, self._outputs, strict=True)):
            if new != old:
                raise BrokenGraphError("output", f"output {number} is {new}, was {old}")

    def _output_values(self) -> list[Any]:
        values = self._graph.output_node().args[0]
        nodes = values if isinstance(values, (tuple, list)) else (values,)
        return [node.meta.get("val") if isinstance(node, Node) else node for node in nodes]

    def _written_inputs(self) -> list[str]:
        """Inputs that the graph ends by copying into."""
        return sorted(
            node.args[0].name
            for node in self._graph.nodes
            if node.target is torch.ops.aten.copy_.default
            and isinstance(node.args[0], Node)
            and node.args[0].op == "placeholder"
        )

    def _update(self) -> None:
        """Compute the fake values of what is new, and of all that reads what has changed."""
        changed: set[Node] = set()
        for node in self._graph.nodes:
            if node.op != "call_function":
                continue
            is_known = self._known.get(node) == _call_of(node) and "val" in node.meta
            if is_known and changed.isdisjoint(node.all_input_nodes):
                continue
            before = node.meta.get("val")
            try:
                node.meta["val"] = _value_of_call(node)
            except Exception as error:
                raise BrokenGraphError(
                    node.format_node() or node.name, f"{type(error).__name__}: {error}"
                ) from error
            if _kind_of(before) != _kind_of(node.meta["val"]):
                changed.add(node)


def _call_of(node: Node) -> Any:
    return node.target, str(node.args), str(node.kwargs)


def _value_of_call(node: Node) -> Any:
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    with torch.no_grad(), _fake_mode(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_mode(node: Node) -> Any:
    from precast.torch_private import fake_mode_of

    return fake_mode_of(n.meta.get("val") for n in node.graph.nodes)


def _kind_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return geometry_of(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind_of, value))
    return type(value).__name__
