from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from precast.compilers.verify import verify_from_text
from precast.errors import CompileError
from precast.graph.inputs import edge_sizes, zero_sizes
from precast.graph.piece import Piece
from precast.parts import PieceCutter
from unit.compilers.example_pieces import FOREIGN, GATED, MUTATING, ROWS, TINY, spec


def chain(num_statements: int, **more: Any) -> Piece:
    """Return a piece that adds to its first input again and again, and returns two of the sums."""
    lines = ["s0 = a0.size(0)", "v0 = operator.mul(a0, a1)"]
    lines += [f"v{i} = torch.add(v{i - 1}, a1)" for i in range(1, num_statements - 1)]
    last = num_statements - 1
    lines.append(f"v{last} = v{last - 1}.view(s0, 2, 2)")
    text = "".join(f"    {line}\n" for line in lines)
    return Piece(
        text=f"def piece(a0, a1):\n{text}    return (v{last}, v1)\n",
        inputs=(spec("s0", 4), spec(4)),
        outputs=(spec("s0", 2, 2), spec("s0", 4)),
        symbols=ROWS,
        **more,
    )


@pytest.mark.parametrize("piece", [GATED, MUTATING, chain(12)], ids=["gated", "mutating", "chain"])
def test_a_piece_in_two_parts_is_the_piece(piece: Piece, tmp_path: Path) -> None:
    """
    Values, writes, aliases and strides are those of the whole, at every size; what is written
    down is plain data.
    """
    cutter = PieceCutter()
    details = json.loads(json.dumps(dict(cutter.compile(piece, str(tmp_path)).details)))
    joined = cutter.load(details, {}, None)

    assert len(details["pieces"]) == 2
    assert details["unproven"] == {}
    sizes = [*edge_sizes(piece), *zero_sizes(piece)]
    result = verify_from_text(piece, joined, sizes, "parts")
    assert result.max_abs_error == 0
    assert len(result.sizes) == len(sizes)


def test_a_long_chain_is_cut_near_its_middle(tmp_path: Path) -> None:
    details = PieceCutter().compile(chain(20), str(tmp_path)).details
    counts = [part["text"].count("torch.add") for part in details["pieces"]]

    assert sum(counts) == 18
    assert min(counts) >= 6


def test_equal_halves_are_one_piece(tmp_path: Path) -> None:
    piece = Piece(
        text="def piece(a0, a1):\n"
        "    v0 = torch.nn.functional.linear(a0, a1, None)\n"
        "    v1 = torch.nn.functional.linear(v0, a1, None)\n"
        "    return (v1,)\n",
        inputs=(spec("s0", 4), spec(4, 4)),
        outputs=(spec("s0", 4),),
        symbols=ROWS,
    )
    cutter = PieceCutter()
    details = cutter.compile(piece, str(tmp_path)).details

    assert len(details["pieces"]) == 1
    assert [number for number in details["slots"] if number is not None] == [0, 0]
    verify_from_text(piece, cutter.load(details, {}, None), edge_sizes(piece), "parts")


def test_the_parts_run_under_the_autocast_of_the_whole(tmp_path: Path) -> None:
    bfloat = spec("s0", 4, dtype="bfloat16")
    piece = Piece(
        text="def piece(a0, a1):\n"
        "    v0 = torch.nn.functional.linear(a0, a1, None)\n"
        "    v1 = torch.nn.functional.linear(v0, a1, None)\n"
        "    return (v1,)\n",
        inputs=(spec("s0", 4), spec(4, 4)),
        outputs=(bfloat,),
        symbols=ROWS,
        autocast=("cpu", "bfloat16"),
    )
    cutter = PieceCutter()
    details = cutter.compile(piece, str(tmp_path)).details

    assert {part["autocast"][1] for part in details["pieces"]} == {"bfloat16"}
    verify_from_text(piece, cutter.load(details, {}, None), edge_sizes(piece), "parts")


@pytest.mark.parametrize("piece", [TINY, FOREIGN], ids=["one operator", "one beside a native"])
def test_what_cannot_be_cut_says_so(piece: Piece, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="nothing to cut"):
        PieceCutter().compile(piece, str(tmp_path))
