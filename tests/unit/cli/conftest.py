"""What the command line's tests share: a runner, and a cache where the settings say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from precast.cli.app import app
from stored import Stored

Run = Callable[..., str]


@pytest.fixture
def stored(own_settings: None) -> Stored:
    """Return the cache of this test's settings; it is not made before something is added."""
    return Stored(Path(os.environ["PRECAST_CACHE_DIR"]))


@pytest.fixture
def run() -> Run:
    """Return what runs a command, expects its exit code, and returns all that it printed."""

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments, prog_name="precast")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return run


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Return what runs a command with `--json` and returns what it printed as data."""

    def run_json(*arguments: str, code: int = 0) -> Any:
        return json.loads(run(*arguments, "--json", code=code))

    return run_json
