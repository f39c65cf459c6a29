"""Errors say what happened, what happens now and what to do; reasons carry known codes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from precast import errors
from precast.errors import Reason


def test_a_message_has_the_value_the_outcome_and_the_remedy() -> None:
    error = errors.CompileTimeoutError("layer_mlp", "aot_inductor", 600.0)
    assert str(error) == (
        "aot_inductor could not compile piece 'layer_mlp': not finished after 600 s; "
        "the piece stays eager. Raise `max_compile_time` (now 600) to wait longer."
    )
    assert (error.piece, error.compiler, error.limit_s) == ("layer_mlp", "aot_inductor", 600.0)


def test_a_config_error_names_field_value_and_origin() -> None:
    error = errors.ConfigError("mode", "fast", "one of 'a'", "Did you mean 'a'?", "PRECAST_MODE")
    assert isinstance(error, ValueError)
    assert str(error) == (
        "setting 'mode' must be one of 'a', got 'fast' from PRECAST_MODE; "
        "nothing was compiled. Did you mean 'a'?"
    )


def test_a_capture_error_points_at_the_users_line() -> None:
    error = errors.CaptureError("Decoder", "graph break: print()", "model.py:12")
    assert "print() at model.py:12;" in str(error)
    assert error.reason.location == "model.py:12"


def test_a_crash_says_how_the_worker_ended() -> None:
    assert "signal 11" in str(errors.CompileCrashedError("p", "c", signal=11))
    error = errors.CompileCrashedError("p", "c", exit_code=1, stderr="g++: not found\n")
    assert "exit code 1, saying 'g++: not found'" in str(error)


def test_an_error_becomes_a_reason_with_the_same_words() -> None:
    error = errors.StoreError("disk", "write", "No space left on device")
    assert error.reason == Reason(
        "tier-failed", "tier 'disk' failed to write: No space left on device", error.remedy
    )


def test_a_reason_reads_as_sentences() -> None:
    reason = Reason("op-unsupported", "no lowering for foo", "Nothing to do", "m.py:3")
    assert str(reason) == "op-unsupported at m.py:3: no lowering for foo. Nothing to do."


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown reason code 'nonsense'"):
        Reason("nonsense", "", "")


def test_a_remedy_begins_like_a_sentence() -> None:
    """It follows a full stop in the log, and "What to do:" elsewhere."""
    remedies = [
        (f"{path.name}:{call.lineno}", ast.unparse(call.args[2]).lstrip("f").strip("'\""))
        for path in Path(errors.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Reason"
        if len(call.args) > 2 and isinstance(call.args[2], ast.Constant | ast.JoinedStr)
    ]
    assert len(remedies) > 10
    assert [remedy for remedy in remedies if not remedy[1][:1].isupper()] == []
