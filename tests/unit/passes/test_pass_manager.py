from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from precast.graph.inputs import edge_sizes, random_inputs
from precast.graph.piece import Piece
from precast.graph.read import eager_function
from precast.passes.interface import FunctionPass, InductorPass, as_pass
from precast.passes.pass_manager import PostGradPassManager
from unit.compilers.example_pieces import GATED, MUTATING, ROWS, TINY, spec
from unit.passes import planted

BROKEN = [
    (planted.Raising, "RuntimeError: no such luck"),
    (planted.Dangling, "invalid"),
    (planted.Widening, "output 0 is float64"),
    (planted.Reshaping, "output 0 is float32"),
    (planted.Dropping, "1 outputs where there were 2"),
    (planted.Overwriting, "writes into inputs [0]"),
    (planted.Unwritable, "cannot be written"),
    (planted.Miscalling, "TypeError"),
]


def outputs_of(piece: Piece) -> list[list[torch.Tensor]]:
    found = []
    for seed, sizes in enumerate(edge_sizes(piece)):
        inputs = random_inputs(piece, sizes, seed)
        found.append([*eager_function(piece)(*inputs), *inputs])
    return found


def assert_same(piece: Piece, other: Piece) -> None:
    for mine, theirs in zip(outputs_of(piece), outputs_of(other), strict=True):
        for one, two in zip(mine, theirs, strict=True):
            assert torch.equal(one, two)
            assert one.stride() == two.stride()


@pytest.mark.parametrize(("kind", "said"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_pass_that_breaks_a_rule_is_undone_and_left_out(kind: Any, said: str) -> None:
    """
    The passes before and after it have their effect; the reason says what was broken.
    """
    manager = PostGradPassManager([planted.AddingZero(), kind(), planted.AddingZero()])
    run = manager.start(GATED)
    first, broken, last = run.reports()
    assert first["matches"] == last["matches"] == {"zero": 1}
    assert "failure" not in first
    assert "failure" not in last
    assert broken["failure"]["code"] == "pass-failed"
    assert said in broken["failure"]["message"]
    assert run.piece.text.count("operator.add") == GATED.text.count("operator.add") + 2
    assert_same(run.piece, GATED)


def test_a_broken_pass_alone_leaves_the_piece_as_it_was() -> None:
    for kind, _ in BROKEN:
        assert PostGradPassManager([kind()]).start(GATED).piece is GATED


def test_writes_stay_writes() -> None:
    """
    In-place statements whose result nobody reads are no dead code.
    """
    run = PostGradPassManager([planted.AddingZero()]).start(MUTATING)
    assert run.reports()[0]["matches"] == {"zero": 1}
    assert "add_" in run.piece.text
    assert "setitem" in run.piece.text
    assert_same(run.piece, MUTATING)


def test_what_a_pass_made_useless_goes() -> None:
    def forget_the_sum(graph: Any) -> int:
        (sum_,) = [n for n in graph.nodes if n.name == "v3"]
        sum_.replace_all_uses_with(sum_.args[0])
        return 1

    run = PostGradPassManager([as_pass(forget_the_sum)]).start(GATED)
    assert run.reports()[0]["matches"] == {"matched": 1}
    assert "operator.add" not in run.piece.text


def test_a_pass_may_be_for_some_sizes_only() -> None:
    assert PostGradPassManager([planted.OnlySmall()]).start(GATED).piece is GATED


def test_conflicting_passes_run_once_each_in_order() -> None:
    """
    One undoes what the other does: no loop, the last one has the say.
    """

    def to_gelu(graph: Any) -> int:
        return _retarget(graph, torch.nn.functional.relu, torch.nn.functional.gelu)

    def to_relu(graph: Any) -> int:
        return _retarget(graph, torch.nn.functional.gelu, torch.nn.functional.relu)

    text = "def piece(a0):\n    v0 = torch.nn.functional.relu(a0)\n    return (v0,)\n"
    piece = Piece(text=text, inputs=(spec("s0", 4),), outputs=(spec("s0", 4),), symbols=ROWS)
    there = PostGradPassManager([FunctionPass(to_gelu), FunctionPass(to_relu)]).start(piece)
    back = PostGradPassManager([FunctionPass(to_relu), FunctionPass(to_gelu)]).start(piece)
    assert [row["matches"] for row in there.reports()] == [{"matched": 1}, {"matched": 1}]
    assert "relu" in there.piece.text
    assert "gelu" in back.piece.text


def _retarget(graph: Any, old: Any, new: Any) -> int:
    nodes = graph.find_nodes(op="call_function", target=old)
    for node in nodes:
        node.target = new
    return len(nodes)


def test_graphs_are_dumped_before_and_after_each_change(tmp_path: Path) -> None:
    passes = [planted.AddingZero(), planted.OnlySmall(), planted.Raising()]
    run = PostGradPassManager(passes, str(tmp_path)).start(TINY)
    before, after = sorted(tmp_path.rglob("*.txt"), reverse=True)
    assert before.name == "00-AddingZero.before.txt"
    assert before.read_text() == TINY.text
    assert after.read_text() == run.piece.text


def test_a_list_of_passes_has_one_identity_that_knows_the_order() -> None:
    one, two = planted.AddingZero(1), planted.AddingZero(2)
    first = PostGradPassManager([one, two]).identity()
    assert first == PostGradPassManager([planted.AddingZero(1), two]).identity()
    assert first != PostGradPassManager([two, one]).identity()
    assert first != PostGradPassManager([one]).identity()


def test_a_pattern_pass_replaces_what_the_piece_wrote() -> None:
    run = PostGradPassManager([planted.tanh_of_gelu]).start(GATED)
    [row] = run.reports()
    assert row["name"] == "tanh_of_gelu"
    assert row["matches"] == {"matched": 1}
    assert "add(0)" in run.piece.text
    assert_same(run.piece, GATED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stage": "later"},
        {"stage": "post_grad"},
        {"examples": list},
    ],
    ids=",".join,
)
def test_a_pattern_pass_that_cannot_work_is_refused(wrong: Any) -> None:
    from precast import pattern_pass

    with pytest.raises(ValueError, match=r"stage|examples"):
        pattern_pass(planted.gelu_pattern, **wrong)(planted.gelu_pattern)
    with pytest.raises(ValueError, match="same tensors"):
        pattern_pass(planted.gelu_pattern)(lambda x, y: x)


def test_a_pattern_pass_knows_its_sizes() -> None:
    from precast.passes.patterns import pattern_pass

    small = pattern_pass(planted.gelu_pattern, sizes=(1, 16))(planted.gelu_pattern)
    assert small.applies_to({"s0": (1, 16)})
    assert small.applies_to({})
    assert not small.applies_to({"s0": (0, 16)})
    assert not small.applies_to({"s0": (1, None)})


def test_a_thing_that_is_no_pass_is_refused() -> None:
    with pytest.raises(TypeError, match="int"):
        as_pass(3)
    assert isinstance(as_pass(planted.AddingZero), InductorPass)
