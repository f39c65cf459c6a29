"""What commands make of a model's answers: exit codes, and what people read."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.cli.child import run_trial

Run = Callable[..., str]

REASON = {
    "code": "compile-failed", "message": "no lowering", "remedy": "split there",
    "location": "net.py:3", "where": "layer", "count": 2,
}  # fmt: skip
ROW = {
    "call": "float32[2, 8]", "num_kinds": 1, "num_pieces": 33, "num_unique": 3,
    "num_compiled": 2, "num_from_cache": 1, "seconds": 4.0, "seconds_saved": 0.0, "is_warm": False,
}  # fmt: skip
WARM = {
    "model": "app:make", "calls": [ROW, {**ROW, "num_kinds": 0}], "seconds": 5.0, "num_kinds": 1,
    "num_compiled": 2, "num_from_cache": 1, "seconds_saved": 0.0, "is_warm": False,
    "reasons": [REASON], "has_failures": True, "keys": [], "cache_dir": "/cache", "bundle": None,
    "report": None, "tier_failures": [],
}  # fmt: skip
CHECK = {
    "model": "app:make", "calls": [ROW], "num_different": 0, "max_rel_error": 1e-7,
    "graph_breaks": [], "places": {"compiled": 33, "eager": 0}, "reasons": [],
    "has_failures": False, "report": None,
}  # fmt: skip


def answer_with(
    monkeypatch: pytest.MonkeyPatch, command: str, *rows: dict[str, Any]
) -> list[dict[str, Any]]:
    """Let a command get these answers instead of running a model; return the jobs it gave."""
    jobs = []

    def run_trial(job: dict[str, Any], **environment: str) -> Iterator[dict[str, Any]]:
        jobs.append(job)
        yield from rows

    monkeypatch.setattr(f"precast.cli.{command}.run_trial", run_trial)
    return jobs


def test_what_stayed_eager_is_a_failure_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    jobs = answer_with(monkeypatch, "warm", ROW, {**ROW, "num_kinds": 0}, WARM)
    printed = run("warm", "app:make", "--shapes", "2x8", "--dtype", "bf16", code=1)
    assert "33 pieces, 3 different: 2 compiled, 1 from the cache; 4.0 s" in printed
    assert "no new kind of call" in printed
    assert "2 calls, 1 kind of call: 2 pieces compiled, 1 from the cache, in 5.0 s." in printed
    assert "compile-failed (2 times), layer at net.py:3: no lowering" in printed
    assert "What to do: split there" in printed
    assert (jobs[0]["model"], jobs[0]["dtype"]) == ("app:make", "bfloat16")
    run("warm", "app:make", "--shapes", "2x8", "--allow-eager")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "app:make computes the same as eager in 1 call (off by 1.0e-07 of the largest value "
             "at most), and runs compiled (33 pieces)."),
        ({"num_different": 1, "has_failures": True}, "differs from eager in 1 of 1 call"),
        ({"graph_breaks": [{"why": "a branch", "location": "net.py:3", "line": "if x:"}],
          "has_failures": True}, "has 1 graph break: 33 pieces run compiled, the rest eager."),
        ({"graph_breaks": [{"why": "a branch", "location": "net.py:3", "line": "if x:"}] * 2,
          "places": {"compiled": 0, "eager": 0}, "has_failures": True},
         "but has 2 graph breaks: all of it runs eager."),
        ({"places": {"compiled": 30, "eager": 3}, "reasons": [REASON], "has_failures": True},
         "but 3 of 33 pieces stay eager."),
        ({"places": {"compiled": 0, "eager": 0}, "reasons": [REASON], "has_failures": True},
         "but is not compiled."),
    ],
)  # fmt: skip
def test_a_check_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, run: Run, changes: dict[str, Any], said: str
) -> None:
    result = {**CHECK, **changes}
    answer_with(monkeypatch, "check", result)
    printed = run("check", "app:make", code=int(result["has_failures"]))
    assert said in printed.splitlines()[-1]


def test_a_measurement_says_how_noisy_it_was(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    ways = {
        "eager": {"median_s": 0.02, "spread": 0.05, "against_eager": 1.0},
        "precast": {"median_s": 0.0101, "spread": 1.5, "against_eager": 1.98},
    }
    result = {
        "calls": [{"call": "float32[2, 8]", "ways": ways}], "reasons": [], "has_failures": False,
        "torch": "2.13.0", "device": "CPU", "threads": 2,
    }  # fmt: skip
    answer_with(monkeypatch, "bench", result)
    printed = run("bench", "call", "app:make", "--repeats", "2")
    assert "float32[2, 8]  20 ms  10.1 ms             1.98" in printed
    assert "Medians of 2 processes. Noise: half of the calls" in printed
    assert "one way ±over 100% around their median, ratios of processes ±0%." in printed
    assert "write compile, or eager" in " ".join(
        run("bench", "call", "app:make", "--against", "vllm", code=2).replace("│", " ").split()
    )


def test_a_command_does_not_wait_for_what_the_models_code_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that a factory forked holds the channel of answers open."""
    program = tmp_path / "trial"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, time\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    time.sleep(60)\n"
        f"    open({str(tmp_path / 'ended')!r}, 'w').close()\n"
        "    os._exit(0)\n"
        'os.write(int(sys.argv[3]), b\'{"result": {"pid": %d}}\\n\' % pid)\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr("precast.cli.child.sys.executable", str(program))
    (result,) = run_trial({"model": "app:make"})
    assert not (tmp_path / "ended").exists()
    os.kill(result["pid"], signal.SIGKILL)
