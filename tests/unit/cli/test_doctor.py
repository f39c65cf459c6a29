from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from precast.cli import checks

ROOT = Path(__file__).parents[3]
RunJson = Callable[..., Any]
Finding = dict[str, Any]


def by_check(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding["check"]: finding for finding in findings}


def test_the_range_of_torch_is_the_projects() -> None:
    declared = re.search(
        r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert declared is not None
    low_major, low_minor, high_major, high_minor = map(int, declared.groups())
    assert ((low_major, low_minor), (high_major, high_minor)) == checks.TORCH_RANGE


@pytest.mark.parametrize(
    ("found", "status"),
    [("2.10.1", "failed"), ("2.11.0", "ok"), ("2.13.0+cu128", "ok"), ("2.14.0a0", "failed")],
)
def test_torch_is_judged_by_its_metadata(
    monkeypatch: pytest.MonkeyPatch, found: str, status: str
) -> None:
    monkeypatch.setattr(checks, "version", lambda name: found)
    (finding,) = checks.check_torch_version()
    assert finding["status"] == status


def script(path: Path, text: str) -> str:
    """Write a program for the shell and return its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def examine_compiler(monkeypatch: pytest.MonkeyPatch, command: str) -> dict[str, Finding]:
    monkeypatch.setenv("CXX", command)
    return by_check(checks.check_compiler(checks.run_child))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_links_statically_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    Its libraries crash or not, by what they use; a real one, with the option built in.
    """
    wrapper = script(tmp_path / "static-g++", 'exec g++ -static-libstdc++ "$@"')
    found = examine_compiler(monkeypatch, wrapper)
    assert found["C++ compiler"]["status"] == "ok"
    assert found["compiled code"]["status"] == "failed"
    assert "statically" in found["compiled code"]["message"]
    assert "CXX=/usr/bin/g++" in found["compiled code"]["remedy"]


def open_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the child process that opens the library not import torch."""
    program = checks._PROBE_TORCH.partition("import torch")[0]
    program += 'print("torch " + json.dumps({"cpu": "", "cuda": None, "devices": []}), flush=True)'
    program += checks._PROBE_TORCH.partition("flush=True)")[2]
    monkeypatch.setattr(checks, "_PROBE_TORCH", program)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_static_library_is_found_even_where_it_does_not_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_without_torch(monkeypatch)
    wrapper = script(tmp_path / "static-g++", 'exec g++ -static-libstdc++ "$@"')
    found = examine_compiler(monkeypatch, wrapper)
    assert found["compiled code"]["status"] == "failed"
    assert "which crashes beside torch's" in found["compiled code"]["message"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_code_that_crashes_is_found_out_and_survived(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    Found without torch here: only the process that opens the library matters.
    """
    monkeypatch.setattr(
        checks, "_PROBE_SOURCE", 'extern "C" int precast_probe(int) { __builtin_trap(); }'
    )
    open_without_torch(monkeypatch)
    found = examine_compiler(monkeypatch, "g++")
    assert found["compiled code"]["status"] == "failed"
    assert "crashes beside torch (signal" in found["compiled code"]["message"]


def test_a_missing_or_broken_compiler_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_torch(command: list[str]) -> subprocess.CompletedProcess[str]:
        if command[0] == sys.executable:
            return subprocess.CompletedProcess(command, 1, "", "ImportError: no torch here")
        return checks.run_child(command)

    monkeypatch.setenv("CXX", "no-such-compiler")
    found = by_check(checks.check_compiler(no_torch))
    assert found["C++ compiler"]["message"] == "'no-such-compiler' is not there"
    assert found["torch import"]["message"] == "ImportError: no torch here"
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'omp.h: no such file' >&2; exit 1"))
    found = by_check(checks.check_compiler(no_torch))
    assert "said: omp.h: no such file" in found["C++ compiler"]["message"]
    assert "compiled code" not in found


def test_a_folder_of_ones_own_is_fine(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    assert "not made yet" in by_check(checks.check_folder(place))["cache folder"]["message"]
    place.mkdir(mode=0o700)
    found = by_check(checks.check_folder(place))
    assert {finding["status"] for finding in found.values()} <= {"ok", "warning"}
    assert found["cache folder"]["status"] == "ok"


def test_a_folder_that_others_may_write_is_a_failure(tmp_path: Path) -> None:
    """
    As it is to a model, which does not use it then.
    """
    place = tmp_path / "open to all"
    place.mkdir()
    place.chmod(0o777)
    found = by_check(checks.check_folder(place))["cache folder"]
    assert found["status"] == "failed"
    assert "chmod" in found["remedy"]


def test_a_file_in_place_of_the_folder_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = by_check(checks.check_folder(tmp_path / "file" / "cache"))["cache folder"]
    assert found["status"] == "failed"


def test_a_folder_without_rights_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    `os.access` is replaced, since root may do everything.
    """
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = by_check(checks.check_folder(tmp_path))["cache folder"]
    assert (found["status"], "may not be read" in found["message"]) == ("failed", True)


def test_a_folder_in_which_nothing_can_be_made_is_a_failure() -> None:
    """
    Not even by root, whom rights do not stop.
    """
    found = by_check(checks.check_folder(Path("/proc/precast/cache")))["cache folder"]
    assert found["status"] == "failed"
    assert found["message"].startswith(("nothing can be made in /proc", "/proc may not be"))


def test_clocks_are_compared_with_the_file_systems(tmp_path: Path) -> None:
    (finding,) = checks.check_clock(tmp_path / "not there yet")
    assert finding["status"] == "ok"
    (finding,) = checks.check_clock(tmp_path, now=lambda: 2e9 + 2 * 86400)
    assert finding["status"] == "warning"
    assert "from this machine's clock" in finding["message"]


def test_a_quick_examination_of_this_machine(run_json: RunJson) -> None:
    found = run_json("doctor", "--quick")
    checked = by_check(found["findings"])
    assert found["num_failed"] == 0
    assert {"python", "torch", "cache folder", "space", "clock", "package"} == set(checked)


def test_a_failed_check_is_exit_code_1(
    run_json: RunJson, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    found = run_json("doctor", "--quick", "--cache-dir", str(tmp_path / "file" / "x"), code=1)
    assert found["num_failed"] == 1
