"""What Precast makes sets no full garbage collection off, at once or right afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_START = """
import gc, sys
import torch, precast
model = torch.nn.Linear(2, 2)
gc.collect()
gc.collect(0)
gc.set_threshold(1000, 0, 0)  # An older generation is due with the next collection.
found = []
gc.callbacks.append(lambda phase, info: found.append(info["generation"]))
precast.compile(model, mode=sys.argv[2], cache_dir=sys.argv[1], progress=False)
left = gc.get_count()[0]
gc.callbacks.clear()
assert len(found) >= 4, found
assert set(found) == {0}, found
assert left < 500, left
assert gc.isenabled()
"""


@pytest.mark.parametrize("mode", ["progressive", "blocking"])
def test_compile_leaves_no_collection_to_the_first_call(mode: str, tmp_path: Path) -> None:
    """In a fresh process, where the imports alone are tens of thousands of objects."""
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run(
        [sys.executable, "-c", _START, str(tmp_path), mode],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.returncode == 0, done.stderr
