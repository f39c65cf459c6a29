from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from precast.graph.inputs import random_inputs
from precast.graph.piece import Piece, TensorSpec
from precast.graph.read import eager_function
from precast.passes.chosen import load_pass
from precast.passes.pass_manager import PostGradPassManager
from unit.compilers.example_pieces import ROWS, spec


def piece_of(
    *lines: str, result: str, inputs: Sequence[TensorSpec], output: TensorSpec | None = None
) -> Piece:
    body = "".join(f"    {line}\n" for line in lines)
    names = ", ".join(f"a{i}" for i in range(len(inputs)))
    return Piece(
        text=f"def piece({names}):\n{body}    return ({result},)\n",
        inputs=tuple(inputs),
        outputs=(output or spec("s0", 8),),
        symbols=ROWS,
    )


def after(piece: Piece, *names: str) -> tuple[str, list[dict[str, int]]]:
    """Return a piece's text after passes, checked bit by bit, and their matches."""
    run = PostGradPassManager([load_pass(name) for name in names]).start(piece)
    assert not [row for row in run.reports() if "failure" in row]
    for sizes in ({"s0": 6}, {"s0": 1}):
        theirs_in, ours_in = (random_inputs(piece, sizes, 0) for _ in range(2))
        theirs, ours = eager_function(piece)(*theirs_in), eager_function(run.piece)(*ours_in)
        for one, two in zip([*theirs, *theirs_in], [*ours, *ours_in], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    return run.piece.text, [row["matches"] for row in run.reports()]


X = spec("s0", 8)


def test_what_changes_nothing_goes() -> None:
    piece = piece_of(
        "s0 = a0.size(0)",
        "v0 = a0.view(s0, 8)",
        "v1 = v0.to(torch.float32)",
        "v2 = operator.getitem(v1, (slice(None, None, None), slice(0, 8, None)))",
        "v3 = v2.contiguous()",
        "v4 = v3.expand(-1, 8)",
        "v5 = torch.nn.functional.relu(v4)",
        result="v5",
        inputs=[X],
    )
    text, [matches, _] = after(piece, "no_ops", "clean_up")
    assert matches == {"view": 1, "to": 1, "getitem": 1, "contiguous": 1, "expand": 1}
    assert [line for line in text.splitlines() if " = " in line] == [
        "    v0 = torch.nn.functional.relu(a0)"
    ]


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("v0 = a0.view(8, s0)", spec(8, "s0")),
        ("v0 = a0.to(torch.float64)", spec("s0", 8, dtype="float64")),
        ("v0 = operator.getitem(a0, (slice(None, None, None), slice(0, 4, None)))", None),
        ("v0 = a0.transpose(0, 1)", spec(8, "s0", stride=(1, 8))),
        ("v0 = a0.clone()", None),
        ("v0 = a0.add_(1.0)", None),
        ("v0 = a0.view(torch.int32)", spec("s0", 8, dtype="int32")),
    ],
)
def test_what_changes_something_stays(line: str, output: TensorSpec | None) -> None:
    """
    Other shapes, dtypes and memory, and writes, although their result is their argument.
    """
    piece = piece_of("s0 = a0.size(0)", line, "v1 = operator.add(v0, 1)", result="v1", inputs=[X])
    if "4" in line and "slice" in line:
        output = spec("s0", 4)
    piece = Piece(
        **{
            **{name: getattr(piece, name) for name in Piece.__slots__},
            "outputs": (output or X,),
            "mutated": (0,) if "add_" in line else (),
        }
    )
    assert after(piece, "no_ops") == (piece.text, [{}])


def test_an_output_stays_a_tensor_of_its_own() -> None:
    piece = piece_of("v0 = a0.contiguous()", result="v0", inputs=[X])
    assert after(piece, "no_ops") == (piece.text, [{}])


def test_a_foreign_operator_is_not_judged_by_its_fake_result() -> None:
    """
    Its description returns the argument itself, as a sloppy one does; it computes something else.
    """
    library = torch.library.Library("precast_sloppy", "DEF")
    library.define("negated(Tensor x) -> Tensor")
    library.impl("negated", lambda x: -x, "CPU")
    library.impl("negated", lambda x: x, "Meta")
    piece = piece_of(
        "v0 = torch.ops.precast_sloppy.negated.default(a0)",
        "v1 = operator.add(v0, 1)",
        result="v1",
        inputs=[X],
    )
    assert after(piece, "no_ops", "clean_up")[0] == piece.text


def test_dead_and_double_code_goes_where_nothing_is_written() -> None:
    lines = [
        "v0 = torch.nn.functional.relu(a0)",
        "v1 = operator.mul(a0, 3.0)",
        "v2 = torch.nn.functional.relu(a0)",
        "v3 = operator.mul(v0, v2)",
    ]
    text, [matches] = after(piece_of(*lines, result="v3", inputs=[X]), "clean_up")
    assert matches == {"unused": 1, "equal": 1}
    assert text.count("relu") == 1

    copies = [
        "v0 = a0.clone()",
        "v1 = v0.add_(1.0)",
        "v2 = a0.clone()",
        "v3 = operator.mul(v0, v2)",
    ]
    piece = piece_of(*copies, result="v3", inputs=[X])
    assert after(piece, "clean_up") == (piece.text, [{"unused": 0, "equal": 0}])


def test_a_copy_before_a_write_goes_only_where_nobody_reads_the_original() -> None:
    lines = ["v0 = torch.neg(a0)", "v1 = v0.clone()", "v2 = v1.add_(a0)"]
    text, [matches] = after(piece_of(*lines, result="v1", inputs=[X]), "in_place")
    assert matches == {"matched": 1}
    assert "clone" not in text

    for more, result in (
        (["v3 = operator.mul(v1, v0)"], "v3"),  # The original is read.
        ([], "v0"),  # It is returned.
    ):
        piece = piece_of(*lines, *more, result=result, inputs=[X])
        assert after(piece, "in_place")[0] == piece.text
    of_input = piece_of("v1 = a0.clone()", "v2 = v1.add_(1.0)", result="v1", inputs=[X])
    assert after(of_input, "in_place")[0] == of_input.text
    through_view = piece_of(
        "v0 = torch.neg(a0)",
        "v9 = v0.view(-1)",
        "v1 = v0.clone()",
        "v2 = v1.add_(a0)",
        "v3 = v9.view(-1, 8)",
        "v4 = operator.add(v1, v3)",
        result="v4",
        inputs=[X],
    )
    assert after(through_view, "in_place")[0] == through_view.text


SQUARES = ["{x}.pow(2)", "operator.mul({x}, {x})", "torch.square({x})", "torch.pow({x}, 2)"]
MEANS = ["{s}.mean(-1, keepdim=True)", "torch.mean({s}, dim=(-1,), keepdim=True)"]
SUMS = ["operator.add({m}, 1e-06)", "operator.add(1e-06, {m})", "torch.add({m}, 1e-06)"]
ROOTS = ["torch.rsqrt({e})", "{e}.rsqrt()"]
SCALES = ["operator.mul({x}, {r})", "{r}.mul({x})"]
WEIGHTS = ["operator.mul(a1, {y})", "torch.mul({y}, a1)"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_way_to_write_a_norm_becomes_one_text(dtype: str) -> None:
    """
    Of 192 ways a fifth, and fewer in the narrow dtypes: the numbers stay the same to the last bit.
    """
    casts = ["a0.float()", "a0.to(torch.float32)", "a0.to(dtype=torch.float32)"]
    ways = list(itertools.product(SQUARES, MEANS, SUMS, ROOTS, SCALES, WEIGHTS))
    texts = set()
    for number, (square, mean, add, root, scale, weigh) in enumerate(ways):
        if number % (5 if dtype == "float32" else 16):
            continue
        back = [f"v0.to(torch.{dtype})", f"v0.to(dtype=torch.{dtype})"][number % 2]
        piece = piece_of(
            f"v1 = {casts[number % 3]}",
            f"v2 = {square.format(x='v1')}",
            f"v3 = {mean.format(s='v2')}",
            f"v4 = {add.format(m='v3')}",
            f"v5 = {root.format(e='v4')}",
            f"v0 = {scale.format(x='v1', r='v5')}",
            f"v6 = {back}",
            f"v7 = {weigh.format(y='v6')}",
            result="v7",
            inputs=[spec("s0", 8, dtype=dtype), spec(8, dtype=dtype)],
            output=spec("s0", 8, dtype=dtype),
        )
        run = PostGradPassManager([load_pass("canonical_norm")]).start(piece)
        texts.add(run.piece.text if run.has_changed else None)
        if number % 7 == 0:
            after(piece, "canonical_norm")
    assert len(texts - {None}) == 1


def test_what_is_no_such_norm_is_left_alone() -> None:
    for square, mean, add in (
        ("v1 = a0.pow(3)", "v2 = v1.mean(-1, keepdim=True)", "v3 = operator.add(v2, 1e-06)"),
        ("v1 = torch.square(a0)", "v2 = v1.sum(-1, keepdim=True)", "v3 = operator.add(v2, 1e-06)"),
        ("v1 = torch.square(a0)", "v2 = v1.mean(0, keepdim=True)", "v3 = operator.add(v2, 1e-06)"),
        ("v1 = torch.square(a0)", "v2 = v1.mean(-1, keepdim=True)", "v3 = operator.add(v2, v2)"),
    ):
        piece = piece_of(
            square, mean, add, "v4 = v3.rsqrt()", "v5 = v4.mul(a0)", result="v5", inputs=[X]
        )
        assert after(piece, "canonical_norm") == (piece.text, [{"rms_norm": 0}])


def test_residual_sums_and_gates_become_one_text() -> None:
    for sum_ in ("operator.add(a0, v1)", "v1.add(a0)", "torch.add(v1, a0)"):
        piece = piece_of("v1 = torch.neg(a0)", f"v2 = {sum_}", result="v2", inputs=[X])
        assert "operator.add(a0, v" in after(piece, "canonical_residual")[0]
    for gate in ("operator.mul(v1, v2)", "operator.mul(v2, v1)", "torch.mul(v2, v1)"):
        piece = piece_of(
            "v1 = torch.nn.functional.silu(a0)",
            "v2 = torch.neg(a1)",
            f"v3 = {gate}",
            result="v3",
            inputs=[X, X],
        )
        text = after(piece, "activation_and_multiply")[0]
        assert "operator.mul(v0, v1)" in text or "operator.mul(v1, v2)" in text


def test_sides_that_are_not_alike_stay_where_they_are() -> None:
    """
    A scaled sum is another sum; of two layouts the first decides the result's.
    """
    column = spec("s0", 8, stride=(1, "s0"))
    for line in ("v1 = torch.add(v0, a1, alpha=2)", "v1 = operator.add(v0, a1)"):
        piece = piece_of(
            "v0 = torch.neg(a0)",
            line,
            result="v1",
            inputs=[X, column if "alpha" not in line else X],
        )
        assert after(piece, "canonical_residual")[1] == [{"residual_add": 0}]
