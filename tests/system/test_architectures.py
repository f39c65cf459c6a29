"""Real architectures come out equal to eager; `benchmarks/architectures.py` runs twenty of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "architectures.py"


@pytest.fixture(scope="module")
def architectures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    # Two kinds of call are enough here, the second of other sizes than the first.
    module.SHAPES = ((2, 9), (3, 17))
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "mixtral"])
def test_an_architecture_equals_eager(architectures: ModuleType, tmp_path: Path, name: str) -> None:
    """
    Captured, cut, written as text, read back and stitched; pieces run eager.
    """
    outcome = architectures.run(name, "eager", str(tmp_path))
    assert outcome.error == ""
    assert outcome.difference <= architectures.TOLERANCE
    assert outcome.num_unique > 0
    assert outcome.num_unique < outcome.num_pieces, "equal layers are one piece"
