"""Random small graphs, split by memory and by work: equal to the whole, within stated bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

from precast.errors import SplitError
from precast.split.build import build_stitch
from precast.split.by_compute import SplitByCompute
from precast.split.by_memory import SplitByMemory, smallest_budget
from precast.split.clean import clean_graph
from precast.split.cost import CostModel
from precast.split.plan import Placement, Splitter, is_idle, make_plan, stretches
from precast.split.storages import Storages
from property.test_split_stitch import Drawing, drawings, inputs, trace

random_graphs = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def cleaned(drawing: Drawing) -> GraphModule:
    try:
        return clean_graph(trace(drawing.graph))
    except RuntimeError:
        reject()


def parts_of(module: GraphModule, placement: Placement) -> list[list[list[object]]]:
    """Return the units of each part of a placement, in order."""
    units = [unit for stretch in stretches(module) for unit in stretch]
    grouped = itertools.groupby(units, key=lambda unit: placement.regions[unit[0].name])
    return [list(group) for _, group in grouped]


def lives_bytes(module: GraphModule, units: list[list[object]]) -> int:
    """Return the most that lives at once, by the definition: tensor by tensor, unit by unit."""
    costs, storages = CostModel(module), Storages(module)
    order = [unit for stretch in stretches(module) for unit in stretch]
    place_of = {node: place for place, unit in enumerate(order) for node in unit}
    made: dict[object, int] = {}
    needed: dict[object, float] = {}
    place = -1
    for node in module.graph.nodes:
        place = place_of.get(node, place)
        if (own := costs.storage(node)) is not None:
            made.setdefault(own, place)
            if node.op == "placeholder":
                needed[own] = float("inf")
        for argument in node.all_input_nodes:
            token = costs.storage(argument)
            end = float("inf") if node.op == "output" else place
            needed[token] = max(end, needed.get(token, -1))
    touched = {
        token
        for unit in units
        for node in unit
        if not costs.is_free(node)  # type: ignore[arg-type]
        or (costs.storage(node) and storages.parent(node) is None and node.op != "call_module")  # type: ignore[arg-type, attr-defined]
        for token in map(costs.storage, (*node.all_input_nodes, node))  # type: ignore[attr-defined]
        if token is not None
    }
    places = [place_of[unit[0]] for unit in units]
    return max(
        sum(
            costs.storage_bytes(token)
            for token in touched
            if made[token] <= at <= max(needed.get(token, -1), made[token])
        )
        for at in places
    )


def assert_equals_whole(drawing: Drawing, module: GraphModule, rule: Splitter) -> None:
    wanted_inputs, found_inputs = inputs(), inputs()
    try:
        wanted = GraphModule({}, drawing.graph).forward(*wanted_inputs)[0]
    except RuntimeError:
        reject()
    stitch = build_stitch(module, make_plan(module, rule), weights=["weight"])
    found = stitch.module(*found_inputs)[0]
    for one, other in zip([*wanted, *wanted_inputs], [*found, *found_inputs], strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@random_graphs
@given(drawings(), st.integers(1, 6))
def test_split_by_memory(drawing: Drawing, num_pieces: int) -> None:
    """
    The stitched model is the original; no piece lives beyond the budget; and no piece could have
    taken in the operator after it: so no cut is without need.
    """
    module = cleaned(drawing)
    budget = smallest_budget(module, num_pieces)
    rule = SplitByMemory(budget_bytes=budget)
    parts = parts_of(module, rule.place(module))

    storages = Storages(module)
    assert len(parts) <= max(num_pieces, len(stretches(module)))
    for part in parts:
        assert lives_bytes(module, part) <= budget
    first_units = [stretch[0] for stretch in stretches(module)]
    for part, following in itertools.pairwise(parts):
        assert not is_idle([node for unit in part for node in unit], storages)  # type: ignore[misc]
        if following[0] not in first_units:
            assert lives_bytes(module, [*part, following[0]]) > budget
    assert_equals_whole(drawing, module, rule)


@random_graphs
@given(drawings(), st.integers(1, 5))
def test_split_by_compute(drawing: Drawing, num_pieces: int) -> None:
    """The stitched model is the original; each piece is within one operator of an even share."""
    module = cleaned(drawing)
    costs, storages = CostModel(module), Storages(module)
    rule = SplitByCompute(num_pieces=num_pieces)
    parts = parts_of(module, rule.place(module))

    work = [[sum(map(costs.work, unit)) for unit in part] for part in parts]  # type: ignore[arg-type]
    total = sum(map(sum, work))
    largest = max((amount for part in work for amount in part), default=0)
    assert len(parts) <= num_pieces
    idle = any(is_idle([n for unit in part for n in unit], storages) for part in parts)  # type: ignore[misc]
    for amounts in work:
        if not idle:
            assert sum(amounts) <= total / num_pieces + 2 * largest
    assert_equals_whole(drawing, module, rule)


def test_what_is_read_late_lives_all_the_time() -> None:
    """
    In one piece five tensors live when `d` is made: its arguments `a` and `b`, itself, and both
    inputs, of which `y` is only read after it. A budget of four gives `y` another piece.
    """
    drawing = Drawing()
    x, y = drawing.wide
    a = drawing.call(torch.mul, x, 2.0)
    b = drawing.call(torch.mul, a, 3.0)
    d = drawing.call(torch.mul, a, b)
    drawing.graph.output((drawing.call(torch.add, d, y),))
    module = clean_graph(trace(drawing.graph))
    tensor = 3 * 4 * 4

    assert smallest_budget(module, 1) == 5 * tensor
    regions = SplitByMemory(budget_bytes=4 * tensor).place(module).regions
    assert list(regions.values()) == ["part 0"] * 3 + ["part 1"]


def test_one_operator_beyond_the_budget_is_named() -> None:
    drawing = Drawing()
    drawing.wide.append(drawing.call(torch.mul, drawing.wide[0], 2.0))
    drawing.graph.output((drawing.wide[-1],))
    module = clean_graph(trace(drawing.graph))
    needs = 2 * 3 * 4 * 4  # An input and an output of 3 by 4 floats.

    assert SplitByMemory(budget_bytes=needs).place(module).regions
    with pytest.raises(SplitError, match=f"'mul'.*{needs}"):
        SplitByMemory(budget_bytes=needs - 1).place(module)
