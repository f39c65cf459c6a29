"""The page that teaches passes, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-pass.md"


@pytest.mark.compile
def test_the_page_works_from_nothing(tmp_path: Path) -> None:
    """
    The first two blocks are one module, the third the program; the second start is warm.
    """
    operator, replacement, program = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "fused.py").write_text(f"{operator}\n\n{replacement}")
    (tmp_path / "serve.py").write_text(
        program + 'print(precast.status(model)["is_warm"], piece["reason"])\n'
    )
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "serve.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    cold, warm = said
    assert cold.startswith("aot_inductor")
    assert "{'matched': 1}" in cold
    assert cold.endswith("False None\n")
    assert warm.endswith("True None\n")
