"""Passes in real workers and real compilers, and across processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast.background.service import CompileService
from precast.compilers.job import CompileJob, JobResult
from precast.errors import CompileTimeoutError
from precast.events import AssemblyRevalidated
from precast.graph.piece import Piece
from precast.passes.chosen import choose
from system.models import Filed
from system.models import compiled as compiled_model
from unit.compilers.example_pieces import ROWS, spec
from unit.passes import planted

SCALED = Piece(
    text="""def piece(a0, a1):
    v0 = operator.add(a0, a1)
    v1 = operator.mul(v0, 3.0)
    v2 = torch.nn.functional.gelu(v1, approximate='tanh')
    return (v2, v1)
""",
    inputs=(spec("s0", 8), spec("s0", 8)),
    outputs=(spec("s0", 8), spec("s0", 8)),
    symbols=ROWS,
)


@pytest.fixture(scope="module")
def service() -> Any:
    with CompileService(1, timeout_s=120.0) as made:
        yield made


def compiled(service: CompileService, folder: Path, compiler: str, *passes: Any) -> JobResult:
    job = CompileJob(
        piece=SCALED.to_json(),
        compilers=(compiler,),
        directory=str(folder),
        passes=choose(passes).messages(),
        dump_passes=str(folder / "dump"),
    )
    return service.submit(job).result()


@pytest.mark.compile
@pytest.mark.parametrize("compiler", ["aot_inductor", "inductor_standalone", "inductor"])
def test_passes_run_in_workers_at_both_stages(
    service: CompileService, tmp_path: Path, compiler: str
) -> None:
    """
    For each of Inductor's compilers: what matched, and what failed and was left out, is told; the
    result was compared with the piece as it was.
    """
    # The first to fail in the compiler has it compiled again, as the second would: slow for one.
    also = () if compiler == "aot_inductor" else (planted.WideningAfterGrad(),)
    counting = planted.AfterGrad()
    counting.nonce = time.time_ns()  # Else `inductor` has it in its own cache, and runs none.
    done = compiled(
        service,
        tmp_path,
        compiler,
        planted.tanh_of_gelu,
        planted.Widening(),
        planted.RaisingAfterGrad(),
        planted.scaled_apart,
        *also,
        counting,
    )
    assert done.compiler == compiler, done.failures
    assert done.verify is not None
    rows = {row["name"]: row for row in done.details["passes"]}
    assert rows["tanh_of_gelu"]["matches"] == {"matched": 1}
    assert rows["scaled_apart"]["matches"] == {"matched": 1}
    assert rows["AfterGrad"]["matches"]["matched"] >= 1
    for name in ("Widening", "RaisingAfterGrad", *(one.name for one in also)):
        assert rows[name]["failure"]["code"] == "pass-failed"
    assert all(row["seconds"] > 0 for row in rows.values())
    dumped = sorted(path.name for path in (tmp_path / "dump").rglob("*.txt"))
    assert "00-tanh_of_gelu.after.txt" in dumped
    assert "03-scaled_apart.before.txt" in dumped


@pytest.mark.compile
def test_a_wrong_pass_is_found_out(service: CompileService, tmp_path: Path) -> None:
    """
    It keeps every shape; but the reference is the piece before any pass.
    """
    done = compiled(service, tmp_path, "inductor_standalone", planted.Doubling())
    assert done.compiler is None
    assert [failure.code for failure in done.failures] == ["verify-mismatch"]


@pytest.mark.compile
def test_a_pass_without_end_is_ended_with_its_job(tmp_path: Path) -> None:
    environment = {"PRECAST_WORKER_WARM": "0"}  # It never gets to the compiler.
    made = CompileService(1, timeout_s=3.0, environment=environment)
    with made as service, pytest.raises(CompileTimeoutError):
        compiled(service, tmp_path, "aot_inductor", planted.Endless())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 16, bias=False)
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


X = torch.randn(3, 8)


@pytest.mark.compile
def test_a_pass_that_cannot_be_sent_is_compiled_here(tmp_path: Path) -> None:
    """
    With the reason; it runs, and nothing of it is kept.
    """
    seen: list[int] = []
    model = Model()
    precast.compile(
        model, cache_dir=tmp_path, passes=(lambda graph: seen.append(len(graph.nodes)),)
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(X), model.forward(X))
    [piece] = precast.status(model)["assemblies"][0]["pieces"]
    assert piece["compiler"] == "inductor"
    assert piece["reason"]["code"] == "pass-failed"
    assert "cannot be sent" in piece["reason"]["message"]
    assert seen
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.compile
def test_a_wrong_pass_that_cannot_be_sent_is_found_out_too(tmp_path: Path) -> None:
    live = torch.ones(1)

    def wrong(graph: Any) -> int:
        return planted.Doubling()(graph) * int(live)

    model = Model()
    state = torch.random.get_rng_state()
    precast.compile(model, cache_dir=tmp_path, passes=(wrong,))
    with torch.inference_mode():
        assert torch.equal(model(X), model.forward(X))
    [piece] = precast.status(model)["assemblies"][0]["pieces"]
    assert piece["compiler"] == "eager"
    assert piece["reason"]["code"] == "verify-mismatch"
    assert torch.equal(torch.random.get_rng_state(), state)


class Normed(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))


def test_passes_run_behind_too_and_weights_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Calls go on while pieces are compiled: none may meet a weight that is being moved. A child
    that looks again runs the same passes over the whole graph.
    """
    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")
    names = ("merge_linears", "canonical_norm")
    for is_warm in (False, True):
        model, events = compiled_model(
            Normed(),
            tmp_path,
            mode="progressive",
            compiler=Filed(),
            keep_slower=True,
            revalidate="always",
            passes=(*names, planted.AddingZero()),
        )
        with torch.inference_mode():
            expected = model.forward(X)
            model(X)
            precast.wait(model, timeout=60)
            assert torch.equal(model(X), expected)
        [assembly] = precast.status(model)["assemblies"]
        assert [row["name"] for row in assembly["passes"]] == ["canonical_norm"]
        assert assembly["passes"][0]["matches"]
        [piece] = assembly["pieces"]
        assert piece["passes"][0]["matches"] == {"zero": 1}
        assert model.gate.weight.untyped_storage().nbytes() == 4 * model.gate.weight.numel()
        looks = [event for event in events if isinstance(event, AssemblyRevalidated)]
        assert [look.is_valid for look in looks] == [True] * is_warm
        precast.release(model)


SCRIPT = """
    import sys, json, torch, precast
    from torch import nn
    import mine

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 16, bias=False)
            self.up = nn.Linear(8, 16, bias=False)

        def forward(self, x):
            return nn.functional.silu(self.gate(x)) * self.up(x)

    torch.manual_seed(0)
    model = Model()
    precast.compile(
        model, cache_dir="cache", passes=("merge_linears", mine.Mine()), on_error="raise",
        compiler=mine.Cheap(), keep_slower=True, revalidate=sys.argv[1],
        mode=sys.argv[2],
    )
    x = torch.ones(3, 8)
    with torch.inference_mode():
        assert torch.allclose(model(x), model.forward(x), atol=1e-6)
        model.gate.weight.mul_(2)
        assert torch.allclose(model(x), model.forward(x), atol=1e-6)
    status = precast.status(model)
    print(json.dumps({
        "warm": status["is_warm"],
        "packed": [row for one in status["assemblies"] for row in one["passes"]],
        "passes": [row for one in status["assemblies"] for row in one["pieces"][0]["passes"]],
        "heavy": [n for n in ("torch._dynamo", "torch._inductor", "sympy") if n in sys.modules],
    }))
"""
PASS = """
    from precast import InductorPass
    from precast.compilers.eager import EagerAdaptor

    class Cheap(EagerAdaptor):
        name = "cheap"

        def identity(self):
            return {"compiler": "cheap"}

    class Mine(InductorPass):
        def __call__(self, graph):
            return {"seen": 1}
"""


@pytest.mark.compile
def test_an_edited_pass_misses_and_the_same_one_hits(tmp_path: Path) -> None:
    """
    In other processes: a warm start, with merged layers and looked at again, runs no pass and
    imports no compiler; after an edit of the pass there is nothing to start with.
    """
    import json

    def start(source: str, revalidate: str = "never", mode: str = "blocking") -> Any:
        (tmp_path / "mine.py").write_text(textwrap.dedent(source))
        (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT))
        for cached in tmp_path.glob("__pycache__/*"):
            cached.unlink()
        done = subprocess.run(
            [sys.executable, "run.py", revalidate, mode],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PRECAST_WORKER_WARM": "0"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    cold = start(PASS)
    assert not cold["warm"]
    assert cold["packed"][0]["matches"] == {"layers": 2, "products": 1}
    assert cold["passes"][0]["matches"] == {"seen": 1}
    warm = start(PASS + "    # Only a remark.\n", mode="cache_only")
    assert warm["warm"]
    assert warm["heavy"] == []
    assert warm["passes"][0]["matches"] == {"seen": 1}
    assert start(PASS, "always")["warm"]
    assert not start(PASS.replace('"seen": 1', '"seen": 2'), mode="cache_only")["warm"]
