"""On a GPU: equal to eager, and warm in a second process without any module of the compilers.

The steps are those of `run_gpu.py`, each in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason=f"torch {torch.__version__} finds no CUDA device here"
    ),
]

SCRIPT = Path(__file__).with_name("run_gpu.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all steps: a `-warm` step finds what the step before it left."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "step", ["sanity", "sanity-warm", "llama", "llama-warm", "bert", "bert-warm", "progressive"]
)
def test_a_step_comes_out_as_in_eager(step: str, cache: Path) -> None:
    """
    Outputs, caches written in place and generated tokens are those of eager.
    """
    if not step.startswith("sanity"):
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--step", step, "--cache", str(cache)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
