"""Code runs with its model's GPU as the current one; with a pretended CUDA, so that none is needed.

`tests/gpu/test_several.py` does it with real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

from precast.runtime.gpu import gpu_of, on_gpu, run_on


class Pretended:
    """Stands for `torch.cuda`, with a current device."""

    def __init__(self) -> None:
        self.current = 0
        self.num_changes = 0

    @contextmanager
    def device(self, number: int) -> Iterator[None]:
        before, self.current = self.current, number
        self.num_changes += 1
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """A machine with GPUs, as far as this module asks."""
    pretended = Pretended()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pretended.current)
    monkeypatch.setattr(torch.cuda, "device", pretended.device)
    return pretended


def on(device: str) -> torch.Tensor:
    """Return a tensor on a device that need not be there."""
    number = torch.device(device).index or 0
    if torch.cuda.is_available() and number >= torch.cuda.device_count():
        pytest.skip(
            f"where there is a GPU, torch makes no fake tensor for a missing one ({device})"
        )
    with FakeTensorMode():
        return torch.empty(2, device=device)


def test_the_models_own_tensors_come_first(cuda: Pretended) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Module())
    model[1].register_buffer("place", on("cuda:2"))
    assert gpu_of(model, (on("cuda:1"),), {}) == 2


def test_a_functions_gpu_is_that_of_its_arguments(cuda: Pretended) -> None:
    assert gpu_of(None, (on("cpu"), [{"x": (on("cuda:1"),)}]), {}) == 1
    assert gpu_of(None, (), {"x": on("cuda:3")}) == 3
    assert gpu_of(None, (on("cpu"), 3, None), {}) is None


def test_nothing_is_looked_at_where_cuda_is_not_in_use() -> None:
    assert gpu_of(None, (on("cuda:1"),), {}) is None


def test_code_runs_on_its_gpu_and_the_current_one_is_as_it_was(cuda: Pretended) -> None:
    run = run_on(1, lambda x: (cuda.current, x))
    assert run("x") == (1, "x")
    assert cuda.current == 0
    with on_gpu(1):
        assert cuda.current == 1
        changes = cuda.num_changes
        assert run("x") == (1, "x")
        assert cuda.num_changes == changes, "it was there already"
    with pytest.raises(ZeroDivisionError):
        run_on(1, lambda: 1 / 0)()
    assert cuda.current == 0


def test_without_a_gpu_nothing_is_wrapped() -> None:
    def run() -> None:
        pass

    assert run_on(None, run) is run
    with on_gpu(None):
        pass
