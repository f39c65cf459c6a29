"""What Precast makes sets no full garbage collection off, at once or right afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from precast.runtime import collector
from precast.runtime.collector import no_collection

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


def test_another_thread_may_turn_it_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks while another has it off, which turns it on before this one would turn it off."""

    class Planted:
        """The collector, turned on by another thread right after it was asked for."""

        @staticmethod
        def isenabled() -> bool:
            was = gc.isenabled()
            gc.enable()
            return was

        enable, disable, collect = gc.enable, gc.disable, gc.collect

    monkeypatch.setattr(collector, "gc", Planted)
    gc.disable()
    try:
        with no_collection():
            pass
        assert gc.isenabled()
    finally:
        gc.enable()


def test_an_interrupted_collection_leaves_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planted:
        isenabled, enable, disable = gc.isenabled, gc.enable, gc.disable

        @staticmethod
        def collect(_: int) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(collector, "gc", Planted)
    with pytest.raises(KeyboardInterrupt), no_collection():
        pass
    assert gc.isenabled()
