"""What could not be compiled is remembered for a while, where trying again would fail again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from precast.events import FailureRemembered, PieceCompiled, PieceFailed
from unit.compilers.example_pieces import TINY
from unit.planted_manager import TIMEOUT, Planted, Setup, refusal, try_again


def test_a_failed_piece_is_not_tried_at_the_next_start(tmp_path: Path) -> None:
    """It says since when, and until when."""
    try_again(tmp_path, TIMEOUT, after_s=0)
    again = Setup(tmp_path, Planted())
    [result] = again.manager.compile([TINY], ["tiny"])
    assert again.service.jobs == []
    assert result.reason is not None
    assert result.reason.code == "compile-timeout"
    assert "remembered from 1970-01-12 13:46 UTC" in result.reason.message
    assert "tried again after 1970-01-13 13:46 UTC" in result.reason.message
    assert "max_compile_time" in result.reason.remedy
    assert again.kinds(FailureRemembered, PieceFailed) == ["FailureRemembered"]
    assert result.call([torch.ones(2, 4)])[0].sum() == 16


def test_a_failure_with_other_passes_is_another_failure(tmp_path: Path) -> None:
    try_again(tmp_path, TIMEOUT, after_s=0, passes=("no_ops",))
    assert not try_again(tmp_path, passes=("no_ops",)).service.jobs
    assert len(try_again(tmp_path, passes=("no_ops", "in_place")).service.jobs) == 1
    assert len(try_again(tmp_path).service.jobs) == 1


@pytest.mark.parametrize(
    ("failed_with", "now_with"),
    [
        ({}, {"after_s": 86401.0}),
        ({"failure_memory": 0.0}, {}),
        ({}, {"failure_memory": 0.0}),
        ({}, {"after_s": -2 * 86400.0}),
        ({}, {"max_compile_time": 1200.0}),
    ],
    ids=["expired", "not kept", "not wanted", "from the future", "more time"],
)
def test_a_failure_is_tried_again(
    tmp_path: Path, failed_with: dict[str, Any], now_with: dict[str, Any]
) -> None:
    """When it is old, from a clock that was wrong, or the user has given it more."""
    try_again(tmp_path, TIMEOUT, after_s=0, **failed_with)
    again = try_again(tmp_path, **now_with)
    assert len(again.service.jobs) == 1
    assert again.kinds(PieceCompiled, FailureRemembered) == ["PieceCompiled"]
    assert not list(tmp_path.rglob("failed-*")), "it is forgotten"


def test_another_machine_or_compiler_tries_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A refusal counts on all machines, what ran out of time only where it did.
    """
    from precast.cache import failures

    for number, (answer, is_tried) in enumerate(
        [(TIMEOUT, True), (refusal("compile-failed"), False), (refusal("verify-mismatch"), False)]
    ):
        root = tmp_path / str(number)
        try_again(root, answer, after_s=0)
        with monkeypatch.context() as patched:
            patched.setattr(failures, "machine_identity", lambda: "another")
            assert len(try_again(root).service.jobs) == is_tried
        if not is_tried:
            monkeypatch.setenv("CXX", "no-such-compiler")
            assert len(try_again(root).service.jobs) == 1
            monkeypatch.delenv("CXX")


def test_a_record_of_a_failed_piece_counts_as_long_as_the_failure(tmp_path: Path) -> None:
    """
    An assembly that holds it must not pin it for ever.
    """
    setup = Setup(tmp_path, Planted(), TIMEOUT)
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.record is not None
    assert setup.manager.failures.still_stands(result.record)
    reason = setup.manager.failures.reason_of(result.record)
    assert reason is not None
    assert "remembered from" in reason.message
    setup.now_s += 86401
    assert not setup.manager.failures.still_stands(result.record)
    assert not setup.manager.failures.still_stands({**result.record, "failure": None})
    assert setup.manager.failures.still_stands({**result.record, "reason": None, "failure": None})


def test_a_damaged_memory_is_none(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), TIMEOUT)
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.record is not None
    failure = result.record["failure"]
    for bad in (
        {},
        {**failure, "failed_s": "yesterday"},
        {**failure, "reason": {"code": "nonsense", "message": "", "remedy": ""}},
        {**failure, "reason": None},
    ):
        assert not setup.manager.failures.still_stands({**result.record, "failure": bad})


def test_a_record_in_parts_stands_as_long_as_each_part_does(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), refusal("compile-failed"))
    [result] = setup.manager.compile([TINY], ["tiny"])
    sound = {"key": "k", "compiler": "planted", "details": {}, "files": {}}
    whole = {"kind": "parts", "details": {"records": [sound, result.record]}}
    assert setup.manager.failures.still_stands(whole)
    setup.now_s += 2 * 86400.0
    assert not setup.manager.failures.still_stands(whole)
    assert setup.manager.failures.still_stands({"kind": "parts", "details": {"records": [sound]}})
