"""Compiling in this process, with a compiler whose code cannot be kept."""

from __future__ import annotations

from pathlib import Path

from unit.compilers.example_pieces import TINY
from unit.planted_manager import Planted, Setup


def test_a_compiler_whose_code_cannot_be_kept_compiles_here(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(is_saveable=False))
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert setup.service.jobs == []
    assert result.record is None
    assert result.compiler == "planted"


def test_a_compiler_that_raises_here_is_answered_by_eager(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(is_saveable=False, fails=True))
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert result.compiler == "eager"
    assert result.reason is not None
    assert "no such luck" in result.reason.message
