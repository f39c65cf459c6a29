"""A piece as a graph that passes may change, and what must be true of it after each of them.

The piece is read from its text, its nodes get fake values, and after a change it is written
again: what can be written is a straight line of operators with names, and its specs say whether
inputs and outputs are still the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from precast.graph.canonical import CannotWrite, write_piece
from precast.graph.inputs import fake_inputs
from precast.graph.piece import Piece, TensorSpec
from precast.graph.read import as_captured, read_piece
from precast.passes.facts import is_removable, value_of


class BrokenGraphError(Exception):
    """A change broke a rule; `node` is where."""

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(node, problem)
        self.node = node
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem} (at {self.node})" if self.node else self.problem


class PieceGraph:
    """One piece on its way through passes. `module.graph` is what they change."""

    def __init__(self, piece: Piece) -> None:
        self.module = read_piece(piece)
        self._piece = piece
        # Inference tensors would not tell what writes into them.
        with torch.inference_mode(False):
            self._mode, self._inputs, symbols = fake_inputs(piece)
        self._names = {str(symbol.node.expr): name for name, symbol in symbols.items()}
        self._ranges = {theirs: piece.symbols[name] for theirs, name in self._names.items()}
        self._names_of_inputs = [node.name for node in self._placeholders()]
        self._mutated = self._propagate()
        # Not the piece's own specs: the same sizes may be written in another way.
        self._outputs = self._written().outputs

    def _placeholders(self) -> list[Node]:
        return list(self.module.graph.find_nodes(op="placeholder"))

    def snapshot(self) -> Graph:
        """Return a copy of the graph as it is."""
        return copy_graph(self.module.graph)

    def restore(self, graph: Graph) -> None:
        """Go back to a snapshot."""
        self.module = GraphModule(torch.nn.Module(), graph, "piece")

    def lines(self) -> str:
        """Return the graph as text, to see whether it has changed and to show it."""
        return lines_of(self.module.graph)

    def settle(self) -> Piece:
        """Drop what nothing needs any more, check the graph, and return it as a piece.

        Raises:
            BrokenGraphError: It is no longer a graph for this piece.
        """
        graph = self.module.graph
        try:
            graph.lint()
        except Exception as error:
            raise BrokenGraphError("", f"the graph is invalid: {error}") from error
        if [node.name for node in self._placeholders()] != self._names_of_inputs:
            raise BrokenGraphError("", "the graph takes other inputs")
        mutated = self._propagate()
        drop_unused(graph)
        if mutated != self._mutated:
            raise BrokenGraphError("", f"it writes into inputs {mutated}, not {self._mutated}")
        written = self._written()
        if len(written.outputs) != len(self._outputs):
            raise BrokenGraphError(
                "output", f"{len(written.outputs)} outputs where there were {len(self._outputs)}"
            )
        for number, (new, old) in enumerate(zip(written.outputs, self._outputs, strict=True)):
            if _without_idle_strides(new) != _without_idle_strides(old):
                raise BrokenGraphError("output", f"output {number} is {new}, was {old}")
        return dataclasses.replace(self._piece, text=written.text)

    def _written(self) -> Piece:
        piece = self._piece
        try:
            written = write_piece(
                self.module, self._ranges, mutated=piece.mutated, autocast=piece.autocast
            )
        except CannotWrite as problem:
            raise BrokenGraphError("", f"the graph cannot be written: {problem}") from problem
        if any(self._names[theirs] != ours for ours, theirs in written.symbols.items()):
            raise BrokenGraphError("", "its sizes have other names")
        return written.piece

    def _propagate(self) -> list[int]:
        """Give every node a fake value; return the positions of inputs that are written into."""
        with torch.inference_mode(False), as_captured(self._piece), self._mode, torch.no_grad():
            inputs = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                for t in self._inputs
            ]
            fresh = iter(inputs)
            values: dict[Node, Any] = {}
            for node in self.module.graph.nodes:
                if node.op == "output":
                    break
                try:
                    values[node] = next(fresh) if node.op == "placeholder" else _run(node, values)
                except Exception as error:
                    raise BrokenGraphError(
                        node.format_node() or node.name, f"{type(error).__name__}: {error}"
                    ) from error
                node.meta["example_value"] = values[node]
        return [i for i, tensor in enumerate(inputs) if tensor._version]


def _run(node: Node, values: dict[Node, Any]) -> Any:
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    tensors = [values[n] for n in node.all_input_nodes if isinstance(values[n], torch.Tensor)]
    before = [tensor._version for tensor in tensors]
    if node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif node.op == "call_function":
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    else:
        raise TypeError(f"a piece holds no {node.op}")
    node.meta["precast_writes"] = before != [tensor._version for tensor in tensors]
    return result


def copy_graph(graph: Graph) -> Graph:
    """Return a copy whose nodes have the same metadata."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def lines_of(graph: Graph) -> str:
    """Return a graph as text, a node a line."""
    return "\n".join(
        f"output {node.args}" if node.op == "output" else str(node.format_node())
        for node in graph.nodes
    )


def drop_unused(graph: Graph) -> int:
    """Erase what computes something that nothing uses; return how many nodes that were."""
    unused = [node for node in reversed(graph.nodes) if node.op != "output"]
    return sum(1 for node in unused if _drop_if_unused(graph, node))


def _drop_if_unused(graph: Graph, node: Node) -> bool:
    if node.users or not is_removable(node):
        return False
    graph.erase_node(node)
    return True


def _without_idle_strides(spec: TensorSpec) -> Any:
    """A spec without the strides of dimensions of length 1, which say nothing."""
    strides = [step for step, size in itertools.zip_longest(spec.stride, spec.shape) if size != 1]
    return spec.dtype, spec.shape, strides, spec.device


__all__ = [
    "BrokenGraphError",
    "PieceGraph",
    "copy_graph",
    "drop_unused",
    "lines_of",
    "value_of",
]
