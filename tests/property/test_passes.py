"""Random straight-line pieces: whatever passes run on them, they compute the same."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from precast.graph.inputs import random_inputs
from precast.graph.piece import Piece
from precast.graph.read import eager_function
from precast.passes.builtin import VERSIONS
from precast.passes.builtin.merge_linears import MergeLinears
from precast.passes.chosen import load_pass
from precast.passes.interface import InductorPass
from precast.passes.pass_manager import PostGradPassManager
from precast.passes.piece_graph import PieceGraph
from unit.compilers.example_pieces import ROWS, spec

NAMES = sorted(name for name in VERSIONS if not name.startswith("merge_linears"))
NUM_GRAPHS = 200
SUBSETS_PER_GRAPH = 2

# Each makes a [s0, 8] tensor of others; `{w}` is a weight, `{n}` a fresh name.
LINEAR = "torch.nn.functional.linear({x}, {w}, None)"
STATEMENTS = [
    "operator.add({x}, {y})",
    "torch.add({y}, {x})",
    "operator.mul({x}, {y})",
    "{x}.mul({x})",
    "torch.nn.functional.silu({x})",
    "operator.mul({x}, torch_silu)",
    "{x}.view(s0, 8)",
    "{x}.reshape(-1, 8)",
    "{x}.to(torch.float32)",
    "{x}.float()",
    "{x}.contiguous()",
    "{x}.expand(-1, -1)",
    "operator.getitem({x}, (slice(None, None, None), slice(0, 8, None)))",
    "operator.getitem({x}, slice(0, None, None))",
    "{x}.clone()",
    "{x}.neg()",
    LINEAR,
    LINEAR,
    "torch.nn.functional.relu({x})",
]


def random_piece(number: int, statements: Sequence[str] = STATEMENTS) -> Piece:
    """A piece of a dozen statements: views, copies, writes, norms, gates and linear layers."""
    choose = random.Random(number)
    weights = [f"a{i}" for i in range(2, 6)]
    lines = ["s0 = a0.size(0)"]
    values = ["a0", "a1"]
    copies: list[str] = []

    def add(statement: str) -> str:
        name = f"v{len(lines)}"
        lines.append(f"{name} = {statement}")
        return name

    is_writing = choose.random() < 0.4
    for _ in range(choose.randint(3, 9)):
        x, y = choose.choice(values), choose.choice(values)
        statement = choose.choice(statements)
        if "{w}" in statement and not weights:
            continue
        if choose.random() < 0.15:
            values.append(_add_norm(add, choose, x))
            continue
        if "torch_silu" in statement:
            statement = statement.replace("torch_silu", add(f"torch.nn.functional.silu({y})"))
        if is_writing and copies and choose.random() < 0.5:
            copy = choose.choice(copies)
            other = choose.choice(values)
            add(choose.choice([f"{copy}.add_({other})", f"operator.iadd({copy}, 1.0)"]))
            continue
        name = add(statement.format(x=x, y=y, w=(weights or [""])[0]))
        if "{w}" in statement:
            weights.pop(0)
        if statement == "{x}.clone()":
            copies.append(name)
        values.append(name)
    if is_writing and choose.random() < 0.5:
        add("a1.mul_(0.5)")
        mutated: tuple[int, ...] = (1,)
    else:
        mutated = ()
    made = [value for value in values if value not in ("a0", "a1")]
    outputs = choose.sample(made, min(len(made), choose.randint(1, 3)))
    body = "".join(f"    {line}\n" for line in lines)
    text = f"def piece(a0, a1, a2, a3, a4, a5, a6):\n{body}    return ({', '.join(outputs)},)\n"
    rows = spec("s0", 8)
    return Piece(
        text=text,
        inputs=(rows, rows, *[spec(8, 8)] * 4, spec(8)),
        outputs=(rows,) * len(outputs),
        symbols=ROWS,
        mutated=mutated,
    )


def _add_norm(add: Any, choose: random.Random, x: str) -> str:
    square = add(choose.choice([f"{x}.pow(2)", f"operator.mul({x}, {x})", f"torch.square({x})"]))
    mean = add(f"{square}.mean(dim={choose.choice(['-1', '(-1,)', '1'])}, keepdim=True)")
    shifted = add(choose.choice([f"operator.add({mean}, 1e-05)", f"operator.add(1e-05, {mean})"]))
    root = add(choose.choice([f"torch.rsqrt({shifted})", f"{shifted}.rsqrt()"]))
    scaled = add(choose.choice([f"operator.mul({x}, {root})", f"torch.mul({root}, {x})"]))
    return str(add(choose.choice([f"operator.mul(a6, {scaled})", f"{scaled}.mul(a6)"])))


def run(piece: Piece, text: str, sizes: dict[str, int]) -> list[torch.Tensor]:
    inputs = random_inputs(piece, sizes, seed=sizes["s0"])
    function = eager_function(Piece(**{**_fields(piece), "text": text}))
    return [*function(*inputs), *inputs]


def _fields(piece: Piece) -> dict[str, Any]:
    return {name: getattr(piece, name) for name in Piece.__slots__}


@pytest.mark.parametrize("tenth", range(10))
def test_every_subset_of_passes_keeps_the_results(tenth: int) -> None:
    """
    To the last bit, for outputs and for inputs that are written into; over the 200 graphs each
    subset takes its turn, and the whole list runs on each.
    """
    passes: dict[str, InductorPass] = {name: load_pass(name) for name in NAMES}
    num_subsets = 1 << len(NAMES)
    num_changed = 0
    for number in range(tenth, NUM_GRAPHS, 10):
        piece = random_piece(number)
        expected = run(piece, piece.text, {"s0": 5})
        masks = [num_subsets - 1] + [
            (number * SUBSETS_PER_GRAPH + i) % num_subsets for i in range(SUBSETS_PER_GRAPH - 1)
        ]
        for mask in masks:
            subset = [passes[name] for bit, name in enumerate(NAMES) if mask >> bit & 1]
            done = PostGradPassManager(subset).start(piece)
            problems = [row["failure"] for row in done.reports() if "failure" in row]
            assert not problems, (number, piece.text)
            num_changed += done.has_changed
            for sizes in ({"s0": 5}, {"s0": 1}):
                wanted = expected if sizes["s0"] == 5 else run(piece, piece.text, sizes)
                for mine, theirs in zip(run(piece, done.piece.text, sizes), wanted, strict=True):
                    assert torch.equal(mine, theirs), (number, mask, done.piece.text)
    assert num_changed > 5


def test_merged_linear_layers_compute_the_same() -> None:
    """
    As graphs: with each stacked weight in the place of those that it stacks.
    """
    num_merged = 0
    for number in range(100):
        piece = random_piece(number, [*STATEMENTS, *[LINEAR] * 20])
        sources = re.findall(r"linear\((\w+),", piece.text)
        if len(sources) == len(set(sources)):
            continue
        graph = PieceGraph(piece)
        _, packs = MergeLinears().merge(graph.module.graph, lambda _: True)
        num_merged += len(packs)
        graph.module.graph.lint()
        graph.module.recompile()
        inputs = random_inputs(piece, {"s0": 5}, seed=number)
        by_name = {f"a{i}": tensor.clone() for i, tensor in enumerate(inputs)}
        stacked = {name: torch.cat([by_name[n] for n in names]) for name, names in packs.items()}
        placeholders = [n.name for n in graph.module.graph.find_nodes(op="placeholder")]
        made = graph.module(*({**by_name, **stacked}[name] for name in placeholders))
        wanted = eager_function(piece)(*inputs)
        for mine, theirs in zip(made, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.stride() == theirs.stride()
    assert num_merged > 5
