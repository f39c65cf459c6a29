"""A warm start in a new process imports no compiler, and traces, compiles and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import sys, torch
from system.models import compiled, make_plain, make_net, names
x = torch.ones(3, 16) if sys.argv[2] == "plain" else torch.ones(3, 8)
if sys.argv[2] == "plain":
    model, events = compiled(make_plain(), sys.argv[1], compiler="auto", compilation_level="full")
else:
    model, events = compiled(make_net(), sys.argv[1])
with torch.inference_mode():
    for _ in range(3):
        model(x)
    model(torch.cat([x, x]))
print(*names(events))
print(*[name for name in sys.modules
        if name.partition(".")[0] in ("sympy", "triton", "transformers")
        or name.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx",
                            "precast.on_miss", "precast.cold_start"))])
"""


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return all files but those of statistics, which each start adds a line to."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "stats"
    }


@pytest.mark.compile
def test_a_warm_process_imports_no_compiler(real_cache: Path, run_python: Any) -> None:
    """
    Neither Dynamo nor Inductor, sympy or Triton is in `sys.modules` after warm calls, nor what is
    ours for compiling.
    """
    before = snapshot(real_cache)
    happened, imported = run_python(_PROGRAM, real_cache, "plain").splitlines()
    assert "AssemblyLoaded" in happened.split()
    assert "PieceLoaded" in happened.split()
    forbidden = (
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "triton",
        "precast.on_miss",
        "precast.cold_start",
    )
    assert [name for name in imported.split() if name.startswith(forbidden)] == []
    assert snapshot(real_cache) == before


def test_a_warm_process_traces_nothing(tmp_path: Path, run_python: Any) -> None:
    """Also where every piece is text: reading it imports more, but traces nothing."""
    run_python(_PROGRAM, tmp_path / "cache", "net")
    happened, _ = run_python(_PROGRAM, tmp_path / "cache", "net").splitlines()
    assert happened.split() == ["CacheHit", "AssemblyLoaded", "ModelReady"]
