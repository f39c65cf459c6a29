"""Cutting: each known rule, once, on a graph that breaks without it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from precast.errors import SplitError
from precast.split.at_layers import SplitAtLayers, auto_splitter
from precast.split.at_ops import SplitAtOps
from precast.split.build import StitchGraph, build_stitch
from precast.split.clean import clean_graph
from precast.split.nodes import short_name
from precast.split.plan import CutPlan, Whole, make_plan

NAMESPACE = "precast_test_plan"


@pytest.fixture(scope="module", autouse=True)
def foreign_operator() -> Iterator[None]:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("attention(Tensor x) -> Tensor")
    library.impl("attention", lambda x: x * 2, "CompositeExplicitAutograd")
    yield
    library._destroy()


class Recorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = result
        return result


def trace(draw: Callable[..., Any], num_inputs: int = 1) -> GraphModule:
    """Build a graph of (s0, 4) inputs by calling `draw(graph, s0, *inputs)`; clean it."""
    graph = Graph()
    placeholders = [graph.placeholder(name) for name in ("s0", "x", "y", "z")[: num_inputs + 1]]
    graph.output((draw(graph, *placeholders),))
    module = GraphModule({}, graph)
    real = torch.ones(3, 4)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode, torch.no_grad(), enable_python_dispatcher():
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        x = mode.from_tensor(real, symbolic_context=context, source=LocalSource("x"))
        Recorder(module).run(x.shape[0], x, *[torch.empty_like(x) for _ in range(num_inputs - 1)])
    return clean_graph(module)


def cut(module: GraphModule, *ops: str, num_inputs: int = 1) -> tuple[CutPlan, StitchGraph]:
    """Cut at operators by name, and check that the result is the original."""
    plan = make_plan(module, SplitAtOps(ops))
    stitch = build_stitch(module, plan)
    inputs = [torch.rand(3, 4) for _ in range(num_inputs)]
    copies = [x.clone() for x in inputs]
    torch.manual_seed(0)
    wanted = module(3, *inputs)
    torch.manual_seed(0)
    found = stitch.module(3, *copies)
    for one, other in zip([*wanted, *inputs], [*found, *copies], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return plan, stitch


def calls(module: GraphModule) -> list[str]:
    return [short_name(n) for n in module.graph.nodes if n.op in ("call_function", "call_method")]


def test_getitem_is_moved_to_its_producer() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        pair = g.call_function(torch.max, (x, 1, True))
        y = g.call_function(torch.sin, (x,))
        z = g.call_function(torch.mul, (y, g.call_function(operator.getitem, (pair, 0))))
        return g.call_function(torch.add, (z, g.call_function(operator.getitem, (pair, 1))))

    plan, stitch = cut(trace(draw), "aten::sin")
    assert [p.is_native for p in plan.partitions] == [False, True, False]
    assert len(stitch.calls[0].outputs) == 2  # Both elements, and never the pair.
    assert all(
        isinstance(n.meta["example_value"], (torch.Tensor, torch.SymInt))
        for call in stitch.calls
        for n in call.module.graph.find_nodes(op="placeholder")
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_computes_with_quantized_tensors_runs_natively() -> None:
    """Up to where they are plain again; their fake values are plain all the while."""
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.sin, (x,))
    q = graph.call_function(torch.quantize_per_tensor, (y, 0.1, 0, torch.quint8))
    q = graph.call_method("dequantize", (graph.call_method("relu", (q,)),))
    graph.output((graph.call_function(torch.cos, (q,)),))
    module = GraphModule({}, graph)
    with FakeTensorMode() as mode:  # Of fixed sizes: there is no fake `dequantize` of others.
        Recorder(module).run(mode.from_tensor(torch.ones(3, 4)))

    plan = make_plan(clean_graph(module), Whole())
    assert [p.is_native for p in plan.partitions] == [False, True, False]
    assert plan.partitions[1].reasons == ("op-unsupported",)
    assert len(plan.partitions[1].nodes) == 3
    stitch = build_stitch(module, plan)
    inputs = torch.rand(3, 4)
    assert torch.equal(stitch.module(inputs)[0], module(inputs)[0])


def test_no_tuple_crosses_a_cut() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        halves = g.call_method("chunk", (g.call_function(torch.exp, (x,)), 2, 1))
        y = g.call_function(torch.sin, (x,))
        return g.call_function(torch.mul, (y, g.call_function(torch.cat, (halves, 1))))

    _, stitch = cut(trace(draw), "sin")
    assert len(stitch.calls[0].outputs) in (1, 2)


def test_consecutive_split_ops_merge() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.sin, (g.call_function(torch.exp, (x,)),))
        return g.call_function(torch.exp, (g.call_function(torch.cos, (y,)),))

    plan, stitch = cut(trace(draw), "sin", "cos")
    assert [p.is_native for p in plan.partitions] == [False, True, False]
    assert calls(stitch.calls[1].module) == ["sin", "cos"]


def test_a_piece_of_only_empty_merges_into_its_neighbour() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.sin, (x,))
        buffer = g.call_function(torch.empty_like, (y,))
        return g.call_function(torch.cos, (y,), {"out": buffer})

    plan, _ = cut(trace(draw), "sin", "cos")
    assert [p.is_native for p in plan.partitions] == [True]


def test_a_piece_of_only_views_merges_into_its_neighbour() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_method("t", (g.call_function(torch.sin, (x,)),))
        return g.call_function(torch.cos, (y,))

    plan, _ = cut(trace(draw), "sin", "cos")
    assert plan.num_pieces == 0


def test_sizes_cross_a_cut_as_integers() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.exp, (x,))
        double = g.call_function(operator.mul, (s, 2))
        z = g.call_function(torch.sin, (y,))
        wide = g.call_method("view", (g.call_function(torch.exp, (z,)), double, 2))
        return g.call_function(torch.exp, (wide,))

    _, stitch = cut(trace(draw), "sin")
    piece = stitch.pieces[-1]
    assert piece.inputs == ("sin", "mul")
    assert isinstance(list(piece.module.graph.nodes)[1].meta["example_value"], torch.SymInt)


def test_a_whole_size_never_crosses_a_cut() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        size = g.call_method("size", (g.call_function(torch.exp, (x,)),))
        y = g.call_function(torch.sin, (x,))
        y = g.call_method("reshape", (g.call_function(torch.exp, (y,)), size))
        y = g.call_function(torch.sin, (y,))
        return g.call_method("reshape", (g.call_function(torch.exp, (y,)), size))

    _, stitch = cut(trace(draw), "sin")
    for call in stitch.calls:
        for node in call.module.graph.find_nodes(op="placeholder"):
            assert not isinstance(node.meta["example_value"], tuple)


def test_a_piece_gets_a_tensor_that_gives_each_of_its_sizes() -> None:
    """
    Compiled code takes tensors only: a size that no input's shape shows would be unknown to it.
    """

    def draw(g: Graph, s: Node, x: Node) -> Node:
        row = g.call_function(torch.sin, (g.call_method("sum", (x, 0)),))
        return g.call_function(torch.exp, (g.call_method("expand", (row, s, 4)),))

    _, stitch = cut(trace(draw), "sin")
    assert stitch.pieces[-1].inputs == ("sin", "x", "s0")


def test_random_operators_run_natively() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(F.dropout, (g.call_function(torch.exp, (x,)), 0.5, True))
        return g.call_function(torch.exp, (g.call_function(torch.rand_like, (y,)),))

    plan, _ = cut(trace(draw))
    assert [p.reasons for p in plan.partitions] == [(), ("random-op",), ()]


def test_dropout_outside_training_is_its_input() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        return g.call_function(torch.exp, (g.call_function(F.dropout, (x, 0.5, False)),))

    assert calls(trace(draw)) == ["exp"]


def test_foreign_operators_run_natively_under_every_rule() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.exp, (x,))
        operator_ = getattr(torch.ops, NAMESPACE).attention.default
        return g.call_function(torch.exp, (g.call_function(operator_, (y,)),))

    module = trace(draw)
    for rule in (Whole(), SplitAtOps(), SplitAtLayers()):
        plan = make_plan(module, rule)
        assert [p.reasons for p in plan.partitions] == [(), ("foreign-op",), ()]


def test_operators_with_data_dependent_results_run_natively() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.exp, (x,))
        return g.call_function(torch.nonzero, (y,))

    plan = make_plan(trace(draw), Whole())
    assert plan.partitions[-1].reasons == ("data-dependent",)


@pytest.mark.parametrize(
    "name",
    [
        "aten::sin",
        "aten.sin",
        "torch.sin",
        "sin",
        "torch.s?n",
        "*.sin",
    ],
)
def test_an_operator_is_found_by_any_of_its_names(name: str) -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        return g.call_function(torch.exp, (g.call_function(torch.sin, (x,)),))

    plan, _ = cut(trace(draw), name)
    assert [p.is_native for p in plan.partitions] == [True, False]
    assert plan.unmatched == ()


def test_a_name_that_fits_nothing_is_reported() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        return g.call_function(torch.exp, (x,))

    assert make_plan(trace(draw), SplitAtOps(("exp", "mylib::sine"))).unmatched == ("mylib::sine",)


def test_an_autocast_region_is_never_cut() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.exp, (x,))
        mode = g.call_function(
            torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)
        )
        y = g.call_function(torch.mm, (y, g.call_method("t", (x,))))
        y = g.call_function(torch.sin, (y,))
        g.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
        return g.call_function(torch.exp, (y,))

    plan = make_plan(trace(draw), SplitAtOps(("sin",)))
    assert [p.is_native for p in plan.partitions] == [False, True, False]
    assert "_exit_autocast" in "".join(plan.partitions[1].nodes)
    assert "mm" in plan.partitions[1].nodes


def test_switching_off_an_autocast_that_is_off_goes() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        g.call_function(torch._C._set_grad_enabled, (False,))
        mode = g.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", None, False, None))
        y = g.call_function(torch.exp, (x,))
        g.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
        return y

    assert calls(trace(draw)) == ["exp"]


def test_an_unused_write_is_no_dead_code() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        g.call_method("add_", (x, 1.0))
        g.call_function(torch.sin, (x,))
        return g.call_function(torch.exp, (x,))

    assert calls(trace(draw)) == ["add_", "exp"]


def test_views_of_one_tensor_are_made_outside_the_piece() -> None:
    """
    Two outputs of one piece that shared memory would be copies once the piece is compiled.
    """

    def draw(g: Graph, s: Node, x: Node) -> Any:
        halves = g.call_method("chunk", (g.call_function(torch.exp, (x,)), 2, 1))
        return [g.call_function(operator.getitem, (halves, i)) for i in (0, 1)]

    module = trace(draw)
    stitch = build_stitch(module, make_plan(module, Whole()))
    assert stitch.pieces[0].outputs == ("exp",)
    left, right = stitch.module(3, torch.rand(3, 4))[0]
    assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def test_an_output_that_is_an_input_is_that_input() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Any:
        written = g.call_method("add_", (x, 1.0))
        return [written, g.call_function(torch.exp, (written,))]

    module = trace(draw)
    stitch = build_stitch(module, make_plan(module, Whole()))
    assert stitch.pieces[0].outputs == ("exp",)
    assert stitch.pieces[0].mutated == (0,)
    x = torch.rand(3, 4)
    assert stitch.module(3, x)[0][0] is x


def test_a_piece_that_writes_into_memory_it_sees_twice_runs_natively() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Any:
        tall = g.call_method("t", (x,))
        y = g.call_function(torch.sin, (tall,))
        g.call_method("add_", (x, 1.0))
        return g.call_function(torch.mul, (g.call_function(torch.exp, (tall,)), y))

    plan, _ = cut(trace(draw), "sin", "t")
    assert plan.num_pieces == 0
    assert "aliasing" in plan.partitions[0].reasons


def test_a_tensor_reshaped_in_place_is_refused_by_name() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Any:
        y = g.call_function(torch.exp, (x,))
        return g.call_method("unsqueeze_", (y, 0))

    with pytest.raises(SplitError, match="'unsqueeze_'"):
        make_plan(trace(draw), Whole())


def layered(num_layers: int, op: str = "exp") -> GraphModule:
    class Block:  # Stands for a module's class.
        pass

    def draw(g: Graph, s: Node, x: Node) -> Node:
        x = g.call_function(torch.cos, (x,))
        for layer in range(num_layers):
            for _ in range(2):
                x = g.call_function(getattr(torch, op), (x,))
                path = f"L['self']._modules['model'].layers.{layer}"
                x.meta["nn_module_stack"] = {
                    "1": ("L['self'].model", Block),
                    f"{layer}x": (path, Block),
                }
        return g.call_function(torch.sin, (x,))

    return trace(draw)


def test_each_repeated_block_is_one_piece_and_so_is_what_lies_between() -> None:
    module = layered(4)
    rule = auto_splitter(module)
    assert rule == SplitAtLayers()
    plan = make_plan(module, rule)
    assert [p.region for p in plan.partitions] == [
        "",
        *(f"model.layers.{i}" for i in range(4)),
        "",
    ]


def test_few_blocks_are_not_cut_apart() -> None:
    module = layered(3)
    assert auto_splitter(module) == Whole()
    assert make_plan(module, SplitAtLayers()).num_pieces == 1
    assert make_plan(module, SplitAtLayers(min_repeats=3)).num_pieces == 5


def test_blocks_may_be_named() -> None:
    module = layered(2)
    assert make_plan(module, SplitAtLayers(modules=("Block",))).num_pieces > 1
    assert make_plan(module, SplitAtLayers(modules=("model.layers.0",))).num_pieces == 3
    assert make_plan(module, SplitAtLayers(modules=("Nothing",))).unmatched == ("Nothing",)


def test_foreign_operators_that_repeat_decide_the_rule() -> None:
    def draw(g: Graph, s: Node, x: Node) -> Node:
        for _ in range(4):
            x = g.call_function(torch.exp, (x,))
            x = g.call_function(getattr(torch.ops, NAMESPACE).attention.default, (x,))
        return x

    assert auto_splitter(trace(draw)) == SplitAtOps()


def test_what_meets_a_conjugate_or_negative_view_runs_natively() -> None:
    """
    Compiled code reads the memory beneath and not the mark that it is to be conjugated.
    """

    def draw(g: Graph, s: Node, x: Node) -> Node:
        y = g.call_function(torch.exp, (x,))
        conjugate = g.call_method("conj", (g.call_function(torch.complex, (y, y)),))
        imaginary = g.call_function(torch.imag, (conjugate,))
        parts = g.call_method("unbind", (imaginary,), {"dim": 1})
        part = g.call_function(operator.getitem, (parts, 1))
        return g.call_function(torch.exp, (g.call_function(torch.sin, (part,)),))

    plan, stitch = cut(trace(draw))
    assert [p.reasons for p in plan.partitions] == [(), ("lazy-view",), ()]
    assert calls(stitch.module.native_1)[-1] == "sin"
