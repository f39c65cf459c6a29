"""On several GPUs: a model runs on the one that it is on, whichever is the current one.

Run alone: `python -m pytest -m gpu tests/gpu/test_several.py`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import precast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices here",
    ),
]


class Layer(nn.Module):
    """With a tensor that its code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(x.shape[0], device=x.device)
        return nn.functional.gelu(self.linear(x)) + place[:, None]


class Halves(nn.Module):
    """One half of it on each GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer().to("cuda:0"), Layer().to("cuda:1")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).to("cuda:1"))


def make(number: int) -> nn.Module:
    """Return the same model on a GPU."""
    torch.manual_seed(0)
    return Layer().to(f"cuda:{number}").eval().requires_grad_(False)


def check(model: nn.Module, number: int) -> None:
    """Compare with eager, at the edges too."""
    for size in (1, 2, 17):
        torch.manual_seed(size)
        x = torch.randn(size, 64).to(f"cuda:{number}")
        with torch.inference_mode():
            ours, eager = model(x), type(model).forward(model, x)
        torch.cuda.synchronize(number)
        assert ours.device == eager.device
        torch.testing.assert_close(ours, eager, atol=2e-5, rtol=2e-5)


def compilers(model: nn.Module) -> list[str]:
    """Return what the pieces of a served model were compiled by."""
    return [p["compiler"] for a in precast.status(model)["assemblies"] for p in a["pieces"]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache, filled on the first GPU by the first test that asks."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def first_is_current() -> Iterator[None]:
    """Each test begins with the first GPU as the current one."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def served(number: int, cache: Path, **settings: Any) -> nn.Module:
    """Return a served model on a GPU."""
    model = make(number)
    precast.compile(model, cache_dir=str(cache), progress=False, **settings)
    return model


def test_what_one_gpu_compiled_is_warm_on_another(cache: Path) -> None:
    first = served(0, cache)
    check(first, 0)
    second = served(1, cache)
    check(second, 1)
    assert precast.status(second)["is_warm"]
    assert compilers(second) == compilers(first)
    assert set(compilers(second)) == {"aot_inductor"}
    assert torch.cuda.current_device() == 0
    check(first, 0)


def test_a_fresh_process_is_warm_on_the_other_gpu(cache: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_several as t, torch, precast\n"
        "number = int(sys.argv[3]); torch.cuda.set_device(number)\n"
        "model = t.served(number, sys.argv[2]); t.check(model, number)\n"
        "print(precast.status(model)['is_warm'], 'torch._dynamo' in sys.modules)\n"
    )

    def run(number: int) -> str:
        where = [str(Path(__file__).parent), str(cache), str(number)]
        command = [sys.executable, "-c", program, *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split("\n")[-2]

    assert run(0) == "False True"
    assert run(1) == "True False"


def test_a_model_that_moves_is_followed(cache: Path) -> None:
    model = served(0, cache)
    check(model, 0)
    model.to("cuda:1")
    check(model, 1)
    model.to("cuda:0")
    check(model, 0)
    assert set(compilers(model)) == {"aot_inductor"}


def test_threads_serve_both_at_once(cache: Path) -> None:
    models = [served(number, cache) for number in (0, 1)]
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(50):
                check(models[number], number)
        except BaseException as error:  # noqa: BLE001 - told below, in the test's own thread.
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


def test_behind_a_model_on_the_other_gpu(tmp_path: Path) -> None:
    model = served(1, tmp_path, mode="progressive")
    check(model, 1)
    assert precast.wait(model, 120)
    check(model, 1)
    assert compilers(model) == ["aot_inductor"]


def test_the_current_stream_of_its_gpu_is_the_one_that_is_used(cache: Path) -> None:
    model = served(1, cache)
    check(model, 1)
    x = torch.randn(17, 64, device="cuda:1")
    expected = Layer.forward(model, x)
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream), torch.cuda.device(0), torch.inference_mode():
        y = torch.randn(4096, 4096, device="cuda:1")
        for _ in range(20):
            y = y @ y
        late = x + 0 * y[:17, :64].nan_to_num(0, 0, 0)
        ours = model(late)
    stream.synchronize()
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_a_model_on_two_gpus_is_compiled_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Halves().eval().requires_grad_(False)
    precast.compile(model, cache_dir=str(tmp_path), progress=False)
    x = torch.randn(17, 64, device="cuda:0")
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(model(x), Halves.forward(model, x), atol=2e-5, rtol=2e-5)
    reasons = [reason["message"] for reason in precast.status(model)["reasons"]]
    assert any("cuda:0, cuda:1" in reason for reason in reasons), reasons
