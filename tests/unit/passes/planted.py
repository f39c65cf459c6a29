"""Passes that tests plant: good ones, and one for each way in which a pass can go wrong."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph

import precast
from precast.passes.interface import InductorPass

FACTOR = 2.0


def first_call(graph: Graph) -> Any:
    return next(n for n in graph.nodes if n.op.startswith("call") and is_tensor(n))


def is_tensor(node: Any) -> bool:
    return isinstance(node.meta["example_value"], torch.Tensor)


class Doubling(InductorPass):
    """Wrong, though every shape stays: doubles what the first statement makes."""

    def __call__(self, graph: Graph) -> int:
        node = first_call(graph)
        with graph.inserting_after(node):
            double = graph.call_function(operator.mul, (node, FACTOR))
        node.replace_all_uses_with(double)
        double.args = (node, FACTOR)
        return 1


class AddingZero(InductorPass):
    """Right and useless: a change that keeps every value."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __call__(self, graph: Graph) -> dict[str, int]:
        for _ in range(self.times):
            node = first_call(graph)
            with graph.inserting_after(node):
                sum_ = graph.call_function(operator.add, (node, 0))
            node.replace_all_uses_with(sum_)
            sum_.args = (node, 0)
        return {"zero": self.times}


class Raising(InductorPass):
    def __call__(self, graph: Graph) -> None:
        first_call(graph).args = ()  # Half done.
        raise RuntimeError("no such luck")


class Endless(InductorPass):
    def __call__(self, graph: Graph) -> None:
        while True:
            pass


class Dangling(InductorPass):
    """Uses a node before it is made."""

    def __call__(self, graph: Graph) -> None:
        node = first_call(graph)
        with graph.inserting_before(graph.output_node()):
            late = graph.call_function(torch.neg, (node,))
        next(user for user in node.users if user is not late).replace_input_with(node, late)


class Widening(InductorPass):
    def __call__(self, graph: Graph) -> None:
        output = graph.output_node()
        with graph.inserting_before(output):
            wide = graph.call_method("double", (output.args[0][0],))
        output.args = ((wide, *output.args[0][1:]),)


class Reshaping(InductorPass):
    def __call__(self, graph: Graph) -> None:
        output = graph.output_node()
        with graph.inserting_before(output):
            flat = graph.call_method("flatten", (output.args[0][0],))
        output.args = ((flat, *output.args[0][1:]),)


class Dropping(InductorPass):
    def __call__(self, graph: Graph) -> None:
        output = graph.output_node()
        output.args = (output.args[0][:-1],)


class Overwriting(InductorPass):
    """Writes into an input that the piece only reads."""

    def __call__(self, graph: Graph) -> None:
        first = graph.find_nodes(op="placeholder")[0]
        with graph.inserting_before(first_call(graph)):
            graph.call_method("zero_", (first,))


class Unwritable(InductorPass):
    """Calls something that no other process could find."""

    def __call__(self, graph: Graph) -> None:
        node = graph.find_nodes(op="call_function", target=operator.add)[0]
        node.target = lambda x, y: x + y


class Miscalling(InductorPass):
    """Calls an operator with a number of arguments that it does not take."""

    def __call__(self, graph: Graph) -> None:
        node = first_call(graph)
        node.op, node.target, node.args = "call_function", torch.matmul, (node.args[0],)


class OnlySmall(AddingZero):
    def applies_to(self, ranges: Any) -> bool:
        return all(high is not None and high <= 8 for _, high in ranges.values())


class AfterGrad(InductorPass):
    """Counts ATen additions after Inductor's passes."""

    stage = "post_grad"
    nonce = 0

    def __call__(self, graph: Graph) -> int:
        return len(graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor))


class RaisingAfterGrad(InductorPass):
    stage = "post_grad"

    def __call__(self, graph: Graph) -> None:
        raise RuntimeError("not after all")


class WideningAfterGrad(InductorPass):
    stage = "post_grad"

    def __call__(self, graph: Graph) -> None:
        output = graph.output_node()
        node = output.args[0][0]
        with graph.inserting_before(output):
            wide = graph.call_function(
                torch.ops.prims.convert_element_type.default, (node, torch.float64)
            )
        output.args = ((wide, *output.args[0][1:]),)


def gelu_pattern(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


@precast.pattern_pass(gelu_pattern)
def tanh_of_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh").add(0)


def scale_pattern(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.mul.Tensor(torch.ops.aten.add.Tensor(x, y), 3.0)


@precast.pattern_pass(
    scale_pattern, stage="post_grad", examples=lambda: (torch.ones(3, 4), torch.ones(3, 4))
)
def scaled_apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.add.Tensor(
        torch.ops.aten.mul.Tensor(x, 3.0), torch.ops.aten.mul.Tensor(y, 3.0)
    )
