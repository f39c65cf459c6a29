"""What `--shapes` may say, which calls it stands for, and what is refused."""

from __future__ import annotations

import pytest

from precast.errors import ModelError
from precast.trial.shapes import (
    ConcreteInput,
    InputSpec,
    edges,
    expand,
    from_json,
    parse_dtype,
    parse_shapes,
    to_json,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4x16", [InputSpec(None, ((4, 4), (16, 16)))]),
        ("x=4x16", [InputSpec("x", ((4, 4), (16, 16)))]),
        (
            "input_ids=1x128:int64, mask=1x128:bf16",
            [
                InputSpec("input_ids", ((1, 1), (128, 128)), "int64"),
                InputSpec("mask", ((1, 1), (128, 128)), "bfloat16"),
            ],
        ),
        ("x=1..8x128", [InputSpec("x", ((1, 8), (128, 128)))]),
        ("t=scalar:int64", [InputSpec("t", (), "int64")]),
        ("2x2,return_dict=false", [
            InputSpec(None, ((2, 2), (2, 2))), InputSpec("return_dict", None, None, False),
        ]),
    ],
)  # fmt: skip
def test_a_text_becomes_inputs(text: str, expected: list[InputSpec]) -> None:
    assert parse_shapes(text) == expected
    assert from_json(to_json(expected)) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is no size"),
        ("4xx16", "'' is no size"),
        ("x=4by16", "'4by16' is no size"),
        ("8..1x4", "'8..1' is an empty range"),
        ("a=1,a=2", "'a' is given twice"),
        ("a b=1", "'a b' is no name of an argument"),
        ("x=1=2", "'x=1=2' is no input"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_part_at_fault(text: str, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_shapes(text)
    assert problem in caught.value.sentences
    assert caught.value.is_usage


def test_a_mistyped_dtype_is_answered_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="Did you mean 'int64'"):
        parse_shapes("x=1:itn64")
    assert parse_dtype("torch.float16") == parse_dtype("half") == "float16"


def shapes_of(calls: list[tuple[ConcreteInput, ...]]) -> list[list[tuple[int, ...] | None]]:
    return [[one.shape for one in call] for call in calls]


def test_equal_ranges_move_together_and_others_by_themselves() -> None:
    calls = expand(parse_shapes("ids=2..4x16..32,mask=2..4x16..32,x=7x2..4"))
    assert shapes_of(calls) == [
        [(4, 32), (4, 32), (7, 4)],
        [(4, 16), (4, 16), (7, 4)],
        [(2, 32), (2, 32), (7, 2)],
        [(2, 16), (2, 16), (7, 2)],
    ]


def test_a_range_from_one_has_a_call_of_two_as_well() -> None:
    assert shapes_of(expand(parse_shapes("1..8x4"))) == [[(8, 4)], [(2, 4)], [(1, 4)]]
    assert shapes_of(expand(parse_shapes("scalar"))) == [[()]]


def test_for_a_comparison_each_range_takes_its_edges_in_turn() -> None:
    calls = expand(parse_shapes("1..40x2..3"), is_exhaustive=True)
    found = [call[0].shape for call in calls]
    assert found[:2] == [(40, 3), (1, 2)]
    assert {shape[0] for shape in found if shape} == set(edges(1, 40))
    assert (40, 2) in found
    assert len(found) == len(set(found)) == len(edges(1, 40)) + 2


def test_edges_are_the_ends_their_neighbours_and_small_sizes() -> None:
    assert edges(1, 40) == [1, 2, 3, 7, 8, 9, 16, 17, 39, 40]
    assert edges(5, 5) == [5]
    assert edges(100, 200) == [100, 101, 199, 200]


def test_too_many_calls_are_refused() -> None:
    text = ",".join(f"a{number}={number + 2}..{number + 20}" for number in range(7))
    with pytest.raises(ModelError, match="128 calls, more than 64"):
        expand(parse_shapes(text))
