from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from precast.split.by_compute import SplitByCompute
from precast.split.cost import FLOPS_PER_BYTE, CostModel, concrete_size
from precast.torch_private import make_fake_mode, record_values

HUGE = 1 << 20  # A square of this side has 4 TB of floats.


def costs(
    target: Any, *shapes: tuple[Any, ...], mode: Any = None, **kwargs: Any
) -> tuple[CostModel, Node]:
    """Return the model of one call's graph, and the call."""
    graph = Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    call = graph.call_function(target, tuple(inputs), kwargs)
    graph.output((call,))
    mode = mode or FakeTensorMode()
    with mode:
        values = [torch.empty(shape) for shape in shapes]
    module = GraphModule({}, graph)
    record_values(module, mode, values)
    return CostModel(module), call


def test_a_product_counts_its_flops_and_allocates_nothing() -> None:
    model, call = costs(torch.nn.functional.linear, (3, HUGE), (HUGE, HUGE))

    assert model.flops(call) == 2 * 3 * HUGE * HUGE
    assert model.bytes_moved(call) == 4 * (3 * HUGE + HUGE * HUGE + 3 * HUGE)
    storage = model.storage(next(iter(call.args)))  # type: ignore[arg-type]
    assert model.storage_bytes(storage) == 4 * 3 * HUGE


def test_attention_is_counted_on_a_cpu_too() -> None:
    shape = (2, 4, 16, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    model, call = costs(attention, shape, shape, shape)

    assert model.flops(call) == 2 * 2 * 4 * 16 * 16 * (8 + 8)


def test_a_convolution_counts() -> None:
    model, call = costs(torch.nn.functional.conv2d, (1, 3, 16, 16), (8, 3, 3, 3))
    assert model.flops(call) == 2 * 14 * 14 * 8 * 3 * 3 * 3


def test_what_torch_does_not_count_is_one_an_element_or_its_bytes() -> None:
    model, call = costs(torch.sin, (5, 7))

    assert model.flops(call) == 35
    assert model.work(call) == FLOPS_PER_BYTE * 2 * 35 * 4


def test_a_view_costs_nothing() -> None:
    model, call = costs(torch.t, (5, 7))
    assert (model.flops(call), model.bytes_moved(call), model.work(call)) == (0, 0, 0)


def test_a_table_is_read_by_rows() -> None:
    graph = Graph()
    ids, table = graph.placeholder("ids"), graph.placeholder("table")
    call = graph.call_function(torch.nn.functional.embedding, (ids, table))
    graph.output((call,))
    module = GraphModule({}, graph)
    with FakeTensorMode() as mode:
        values = [torch.empty(2, dtype=torch.int64), torch.empty(HUGE, 10)]
    record_values(module, mode, values)

    assert CostModel(module).bytes_moved(call) == 2 * 8 + 2 * (2 * 10 * 4)


def test_an_open_size_counts_as_it_was_captured_else_at_its_bound() -> None:
    mode, sizes = make_fake_mode({"s0": (0, 64)}, {"s0": 9})
    model, call = costs(torch.nn.functional.linear, (sizes["s0"], 4), (8, 4), mode=mode)
    assert model.flops(call) == 2 * 9 * 4 * 8

    bounded, unbounded = (mode.shape_env.create_unbacked_symint() for _ in range(2))
    torch._check(bounded >= 0)
    torch._check(bounded <= 50)
    torch._check(unbounded >= 3)
    assert (concrete_size(bounded), concrete_size(bounded * 2)) == (50, 100)
    assert concrete_size(unbounded) == 3


def test_flops_decide_how_many_pieces() -> None:
    graph = Graph()
    value = graph.placeholder("x")
    weight = graph.placeholder("weight")
    for _ in range(6):
        value = graph.call_function(torch.nn.functional.linear, (value, weight))
    graph.output((value,))
    module = GraphModule({}, graph)
    with FakeTensorMode() as mode:
        values = [torch.empty(512, 512), torch.empty(512, 512)]
    record_values(module, mode, values)

    regions = SplitByCompute(flops=2 * 2 * 512**3).place(module).regions
    assert list(regions.values()) == ["part 0"] * 2 + ["part 1"] * 2 + ["part 2"] * 2
