"""Random small graphs, split anyhow: the stitched model is the original, to its last alias."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from precast.split.build import StitchGraph, build_stitch
from precast.split.clean import clean_graph
from precast.split.plan import Placement, make_plan
from precast.stitch import SerializableFunction, generate_execution_code

ROWS = 3  # Of the dynamic size, when run.


class Anyhow:
    """A rule that does as it is told, node by node."""

    def __init__(self, choices: list[int]) -> None:
        self._choices = choices

    def place(self, graph_module: GraphModule) -> Placement:
        native, regions = {}, {}
        for position, node in enumerate(graph_module.graph.nodes):
            choice = self._choices[position % len(self._choices)]
            if choice == 0:
                native[node.name] = "split-op"
            regions[node.name] = str(choice // 3)
        return Placement(native=native, regions=regions)


class Drawing:
    """A graph being drawn, and its values by shape: wide (s, 4), tall (4, s), half (s, 2)."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.size = self.graph.placeholder("s0")
        self.wide = [self.graph.placeholder("x"), self.graph.placeholder("y")]
        self.weight = self.graph.placeholder("weight")
        self.tall: list[Node] = []
        self.half: list[Node] = []
        self.sizes = [self.size]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        return self.graph.call_function(target, args, kwargs)


def _wide(step: Callable[..., Any]) -> Callable[[Drawing, Callable[[list[Node]], Node]], None]:
    return lambda d, pick: d.wide.append(step(d, pick(d.wide), pick))


def _tall(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    d.tall.append(d.call("transpose", pick(d.wide), 0, 1))


def _from_tall(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    if d.tall:
        d.wide.append(d.call("t", pick(d.tall)))


def _chunk(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    pair = d.call("chunk", pick(d.wide), 2, 1)
    d.half.extend(d.call(operator.getitem, pair, index) for index in (0, 1))


def _chunk_and_join(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    pair = d.call(torch.split, pick(d.wide), 2, 1)
    d.wide.append(d.call(torch.cat, pair, 1))  # The tuple itself is an argument.


def _slice_pair(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    triple = d.call(torch.split, pick(d.wide), 1, 1)
    rest = d.call(operator.getitem, triple, slice(1, 3))
    d.half.append(d.call(torch.cat, rest, 1))


def _join_halves(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    if d.half:
        d.wide.append(d.call(torch.cat, (pick(d.half), pick(d.half)), 1))


def _write_half(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    if d.half:
        d.half.append(d.call("mul_", pick(d.half), 1.5))


def _set_column(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    column = d.call(operator.getitem, pick(d.wide), (slice(None), 0))
    d.call(operator.setitem, pick(d.wide), (slice(None), 1), column)


def _maximum(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    pair = d.call(torch.max, pick(d.wide), 1, True)
    d.wide.append(d.call("expand", d.call(operator.getitem, pair, 0), -1, 4))


def _size(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    size = d.call("size", pick(d.wide))
    d.sizes.append(d.call(operator.getitem, size, 0))


def _whole_size(d: Drawing, pick: Callable[[list[Node]], Node]) -> None:
    d.wide.append(d.call("reshape", pick(d.wide), d.call("size", pick(d.wide))))


STEPS: list[Callable[[Drawing, Callable[[list[Node]], Node]], None]] = [
    _wide(lambda d, x, pick: d.call(operator.add, x, pick(d.wide))),
    _wide(lambda d, x, pick: d.call(torch.mul, x, 0.5)),
    _wide(lambda d, x, pick: d.call(torch.nn.functional.linear, x, d.weight)),
    _wide(lambda d, x, pick: d.call("add_", x, 1.0)),
    _wide(lambda d, x, pick: d.call(operator.iadd, x, pick(d.wide))),
    _wide(lambda d, x, pick: d.call(torch.nn.functional.relu, x, inplace=True)),
    _wide(lambda d, x, pick: d.call(torch.add, x, 2.0, out=pick(d.wide))),
    _wide(lambda d, x, pick: d.call(torch.nn.functional.dropout, x, 0.5, False)),
    _wide(lambda d, x, pick: d.call("contiguous", x)),
    _wide(lambda d, x, pick: d.call("to", x, torch.float32)),
    _wide(lambda d, x, pick: d.call("view", x, pick(d.sizes), 4)),
    _wide(lambda d, x, pick: d.call("clone", x)),
    _wide(lambda d, x, pick: d.call(torch.full, (pick(d.sizes), 4), 0.25)),
    _wide(lambda d, x, pick: d.call("copy_", d.call(torch.empty, pick(d.sizes), 4), x)),
    _wide(lambda d, x, pick: d.call("expand_as", x, pick(d.wide))),
    _tall,
    _from_tall,
    _chunk,
    _chunk_and_join,
    _slice_pair,
    _join_halves,
    _write_half,
    _set_column,
    _maximum,
    _size,
    _whole_size,
]


@st.composite
def drawings(draw: st.DrawFn) -> Drawing:
    """Draw a graph of a few steps that returns a few of its values."""
    drawing = Drawing()

    def pick(nodes: list[Node]) -> Node:
        return nodes[draw(st.integers(0, len(nodes) - 1))]

    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=14)):
        step(drawing, pick)
    values = drawing.wide + drawing.tall + drawing.half
    chosen = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4))
    drawing.graph.output((tuple(values[i] for i in chosen),))
    return drawing


class _Recorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = result
        return result


def trace(graph: Graph) -> GraphModule:
    """Record fake values as Dynamo does, the first size of `x` and `y` being dynamic."""
    module = GraphModule({}, graph)
    real = torch.ones(ROWS, 4)
    # With the dispatcher in Python, as in Dynamo, an idle dropout looks like a copy.
    with (
        FakeTensorMode(shape_env=ShapeEnv()) as mode,
        torch.no_grad(),
        enable_python_dispatcher(),
    ):
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        x = mode.from_tensor(real, symbolic_context=context, source=LocalSource("x"))
        y = torch.empty_like(x)
        weight = torch.ones(4, 4)
        _Recorder(module).run(x.shape[0], x, y, weight)
    return module


def inputs() -> list[Any]:
    """Return fresh equal inputs."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(ROWS, 4, generator=generator) for _ in range(2))
    return [ROWS, x, y, torch.randn(4, 4, generator=generator)]


def aliases(values: list[Any]) -> list[tuple[int, int]]:
    """Return which of some values share memory."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    pointers = [t.untyped_storage().data_ptr() for t in tensors]
    return [
        (i, k) for i, p in enumerate(pointers) for k, q in enumerate(pointers) if i < k and p == q
    ]


def strict_pieces(stitch: StitchGraph) -> list[Any]:
    """Return the pieces, each checked to keep to what compiled code can do."""
    pieces: list[Any] = [None] * (max((c.index for c in stitch.calls), default=-1) + 1)
    for call in stitch.pieces:

        def piece(values: list[Any], call: Any = call) -> Any:
            before = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
            outputs = call.module(*values)
            assert isinstance(outputs, tuple)
            assert len(outputs) == len(call.outputs)
            assert all(isinstance(output, torch.Tensor) for output in outputs)
            inputs = [v for v in values if isinstance(v, torch.Tensor)]
            for i, _ in aliases([*outputs, *inputs]):
                assert i >= len(outputs), f"{call.name} returns an alias"
            for position, (old, new) in enumerate(zip(before, values, strict=True)):
                if position not in call.mutated and isinstance(old, torch.Tensor):
                    assert torch.equal(old, new), f"{call.name} writes into input {position}"
            return outputs

        pieces[call.index] = piece
    return pieces


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(drawings(), st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_split_anyhow_and_stitched_equals_the_original(
    drawing: Drawing, choices: list[int]
) -> None:
    """
    Whatever the cut: the same outputs, the same writes into inputs, the same aliases; and no
    piece returns an alias or writes where it does not say so.
    """
    wanted_inputs = inputs()
    try:
        module = trace(drawing.graph)
        wanted = GraphModule({}, drawing.graph).forward(*wanted_inputs)[0]
    except RuntimeError:
        reject()  # Eager refuses it too: a write into an expanded tensor.

    clean_graph(module)
    stitch = build_stitch(module, make_plan(module, Anyhow(choices)), weights=["weight"])
    code = generate_execution_code(stitch.module)
    function = SerializableFunction.from_json(
        json.loads(json.dumps(SerializableFunction(code).to_json()))
    )
    for run in (stitch.module, lambda *args: function(strict_pieces(stitch), *args)):
        found_inputs = inputs()
        found = run(*found_inputs)[0]
        for one, other in zip([*wanted, *wanted_inputs], [*found, *found_inputs], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        assert aliases([*wanted, *wanted_inputs]) == aliases([*found, *found_inputs])
        assert [t.stride() for t in wanted] == [t.stride() for t in found]
