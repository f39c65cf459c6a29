"""What the tests of this folder share: one cache with artifacts that a real compiler made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: For programs whose outputs are compared: how long something takes decides no test, neither
#: whether compiled code is used nor whether progress is shown.
CALM = {"PRECAST_KEEP_SLOWER": "1", "PRECAST_PROGRESS": "0"}


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds `models.make_plain()`, really compiled, for inputs of (n, 16).

    Tests that change it take a copy.
    """
    import torch

    import precast
    from system.models import compiled, make_plain, names

    folder = tmp_path_factory.mktemp("real-cache")
    model, events = compiled(make_plain(), folder, compiler="auto", compilation_level="full")
    with torch.no_grad():
        model(torch.randn(3, 16))
    assert "PieceCompiled" in names(events), events
    precast.release(model)  # Nothing is written behind its back any more.
    return folder


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a program in a new process and returns what it printed."""

    def run(program: str, *arguments: object, **environment: str) -> str:
        path = os.pathsep.join([str(tmp_path), str(ROOT / "src"), str(ROOT / "tests")])
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
