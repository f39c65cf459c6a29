"""The child that captures: what it may take, and how its end is told."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from precast.background import capture
from precast.background.capture import CaptureChild
from precast.config import CompilationConfig
from precast.errors import CaptureCrashedError, CompileMemoryError, CompileTimeoutError
from precast.passes.chosen import NO_PASSES


def ask(monkeypatch: pytest.MonkeyPatch, program: str, **limits: Any) -> subprocess.Popen[bytes]:
    """Have a program in place of the child; return its process when it has ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start(stderr: Any) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        )
        return started[0]

    monkeypatch.setattr(capture, "_start", start)
    monkeypatch.setattr(capture, "_LEAST_S", 0.5)
    config = CompilationConfig(**limits)
    ambient: Any = None
    try:
        CaptureChild().blueprint(b"", b"", config, NO_PASSES, ambient, "net")
    finally:
        assert started[0].returncode is not None, "it is gone"
    return started[0]


def test_a_child_that_hangs_is_ended_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its imports count; but it has some time, however low the limit for compilers is."""
    with pytest.raises(CompileTimeoutError) as caught:
        ask(monkeypatch, "import time; time.sleep(600)", max_compile_time=1)
    assert caught.value.limit_s == 1
    with pytest.raises(CompileTimeoutError) as caught:
        ask(monkeypatch, "import time; time.sleep(600)", max_compile_time=0.01)
    assert caught.value.limit_s == 0.5


def test_a_child_that_takes_too_much_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import time; held = b'x' * (300 << 20); time.sleep(600)"
    with pytest.raises(CompileMemoryError) as caught:
        ask(monkeypatch, program, max_compile_memory=100 << 20)
    assert caught.value.peak_bytes is None or caught.value.peak_bytes > 100 << 20


def test_a_child_that_dies_is_told_from_a_model_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CaptureCrashedError, match=r"ended with 3: no such luck"):
        ask(monkeypatch, "import sys; print('no such luck', file=sys.stderr); sys.exit(3)")
