"""The command line as a program of its own, beside real processes that start models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from precast.cli.app import app
from stored import Stored

RunPython = Callable[..., str]
SOURCE = Path(__file__).parents[2] / "src"

_STARTS = """
import sys, torch
from system.models import compiled, make_net
for settings in ({}, {}, {"split": "ops"}):
    model, _ = compiled(make_net(), sys.argv[1], **settings)
    with torch.inference_mode():
        for _ in range(100):
            model(torch.ones(3, 8))
"""
_COMMAND = """
import sys
from precast.cli import main
try:
    main()
finally:
    print([name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy")])
"""


@pytest.mark.parametrize(
    "command",
    [
        ("stats",),
        ("cache", "ls"),
        ("cache", "verify"),
        ("explain", "--last"),
        ("doctor", "--quick"),
        ("warm", "--help"),
        ("bench", "startup", "--help"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_no_command_imports_torch(
    tmp_path: Path, run_python: RunPython, command: tuple[str, ...]
) -> None:
    stored = Stored(tmp_path / "cache")
    stored.add_assembly(stored.add_piece())
    printed = run_python(_COMMAND, *command, PRECAST_CACHE_DIR=str(stored.root))
    assert len(printed.splitlines()) > 1
    assert printed.splitlines()[-1] == "[]"


def test_starts_of_a_real_process_are_counted_and_explained(
    tmp_path: Path, run_python: RunPython
) -> None:
    """
    Cold, warm, and cold again by another setting; calls of a ready model leave no trace.
    """
    cache = tmp_path / "cache"
    run_python(_STARTS, cache)

    def run(*command: str) -> Any:
        arguments = [*command, "--json", "--cache-dir", str(cache)]
        return json.loads(CliRunner().invoke(app, arguments).stdout)

    found = run("stats")
    assert found["num_lines"] == 3
    assert (found["starts"]["warm"]["count"], found["starts"]["cold"]["count"]) == (1, 2)
    assert found["hits"]["disk"]["count"] == 1
    assert found["misses"] == {"assembly": {"nothing stored": 1, "config": 1}}
    (miss,) = run("explain", "--last")
    assert miss["name"] == "Net"
    assert miss["differs"] == ["config.split: was 'None', is \"'ops'\""]
    listed = [entry["model"] for entry in run("cache", "ls")["entries"]]
    assert listed == ["Net", "Net"]
    assert run("cache", "verify")["problems"] == []


def test_without_the_extra_one_sentence_says_what_to_install() -> None:
    """
    Isolated and without `site`, so that no installed package can be imported.
    """
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from precast.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'precast[cli]'" in done.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "cache")
    for number in range(400):
        stored.add_piece(torch=f"2.{number}")
    command = f"{sys.executable} -m precast cache ls --cache-dir {stored.root}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SOURCE)},
    )
    assert done.stdout.startswith("key")
    assert (done.returncode, done.stderr) == (0, "")
