"""Compilers that fail in every way, behind `precast.compile`: the model answers as eager does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast.events import Event, JobFinished, PieceLoaded, PieceSplit
from unit.background import planted
from unit.background.test_service import is_running

SETTINGS: dict[str, Any] = {
    "progress": False,
    "revalidate": "never",
    "compile_threads": 1,
    "max_compile_time": 60,
}
ROOT = Path(__file__).parents[2]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class Long(nn.Module):
    """Three operators a round, one after the other; writes into what it is given."""

    def __init__(self, rounds: int = 5) -> None:
        super().__init__()
        self.rounds = rounds
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x
        for factor in range(self.rounds):
            y = torch.sin(y + self.weight) * factor
        x.add_(y)
        return y, x.transpose(0, 1)


@pytest.fixture(autouse=True)
def cold_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")  # Planted compilers do not need Inductor.


@pytest.mark.parametrize(
    ("compiler", "code", "says", "settings"),
    [
        (planted.Hanging(), "compile-timeout", "2 s", {"max_compile_time": 2}),
        (planted.Raising(), "compile-failed", "no such luck", {}),
        (planted.GreedyAndSlow(), "compile-memory", "bytes", {"max_compile_memory": 1 << 30}),
        (planted.Aborting(), "compile-crashed", "signal 6", {}),
        (planted.Wrong(), "verify-mismatch", "output 0", {}),
        (planted.HalfWritten(), "compile-failed", "cut off", {}),
        (planted.Unwritten(), "compile-failed", "code", {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, planted._Planted) else "",
)
def test_the_model_goes_on_as_eager(
    compiler: Any, code: str, says: str, settings: dict[str, Any]
) -> None:
    model = Scaled()
    events: list[Event] = []
    precast.compile(model, compiler=compiler, listeners=[events.append], **{**SETTINGS, **settings})
    x = torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), model.forward(x))

    [piece] = precast.status(model)["assemblies"][0]["pieces"]
    assert piece["compiler"] == "eager"
    assert piece["reason"]["code"] == code
    assert says in piece["reason"]["message"]
    jobs = [event for event in events if isinstance(event, JobFinished)]
    assert [job.code for job in jobs] == [None if "Unwritten" in repr(compiler) else code]


def run_long(model: nn.Module, rows: int) -> None:
    for x in (torch.randn(rows, 4), torch.randn(rows, 4)):
        ours, theirs = x.clone(), x.clone()
        for one, other in zip(model(ours), model.forward(theirs), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
        assert torch.equal(ours, theirs)


def test_what_is_too_large_is_compiled_in_parts(tmp_path: Path) -> None:
    """
    Cut until each part fits; kept like any other: the next model starts warm without a worker,
    and where only the pieces are known the parts are found again without trying the whole.
    """
    events: list[Event] = []
    settings = {**SETTINGS, "compiler": planted.OnlySmall(), "listeners": [events.append]}
    model = precast.compile(Long(), **settings)
    with torch.no_grad():
        for rows in (5, 2, 9):
            run_long(model, rows)
    [piece] = precast.status(model)["assemblies"][0]["pieces"]
    assert piece["compiler"] == "planted"
    [split] = [e for e in events if isinstance(e, PieceSplit) and e.piece.count("part") == 0]
    assert split.parts > 2
    assert f"compiled in {split.parts} parts" in piece["reason"]["message"]
    assert piece["reason"]["code"] == "compile-memory"

    # A bundle holds the files of parts too.
    precast.save_bundle(model, tmp_path / "bundle")
    elsewhere = {"cache_dir": tmp_path / "empty", "mode": "cache_only"}
    taken = precast.compile(
        Long(), **settings, **elsewhere, bundle=tmp_path / "bundle", allow_unsigned=True
    )
    with torch.no_grad():
        run_long(taken, 5)
    assert precast.status(taken)["is_warm"]

    for forgets_assembly in (False, True):
        events.clear()
        if forgets_assembly:
            folder = Path(os.environ["PRECAST_CACHE_DIR"])
            for path in folder.rglob("ac/*/*-0.json"):
                path.unlink()
        again = precast.compile(Long(), **settings)
        with torch.no_grad():
            for rows in (5, 2):
                run_long(again, rows)
        assert precast.status(again)["is_warm"] is not forgets_assembly
        assert not [event for event in events if isinstance(event, JobFinished)]
        assert [event for event in events if isinstance(event, PieceLoaded)]


@pytest.mark.parametrize(("rounds", "limit_s"), [(11, 10), (24, 3)])
def test_what_takes_too_long_is_cut_once(rounds: int, limit_s: int) -> None:
    """Each half may take as long again: one that does stays eager, and is not cut further."""
    events: list[Event] = []
    settings = {**SETTINGS, "compiler": planted.QuickIfSmall(), "max_compile_time": limit_s}
    model = precast.compile(Long(rounds), **settings, listeners=[events.append])
    with torch.no_grad():
        run_long(model, 5)
    [piece] = precast.status(model)["assemblies"][0]["pieces"]
    assert piece["reason"]["code"] == "compile-timeout"
    codes = [event.code for event in events if isinstance(event, JobFinished)]
    if rounds == 11:
        assert piece["compiler"] == "planted"
        assert "compiled in 2 parts" in piece["reason"]["message"]
        assert codes == ["compile-timeout", None, None]
    else:
        assert piece["compiler"] == "eager"
        assert codes == ["compile-timeout"] * 3


def test_a_part_that_cannot_be_compiled_stays_eager_among_the_others() -> None:
    """So it is kept in the assembly; the whole is tried again where the assembly is not known."""
    settings = {**SETTINGS, "compiler": planted.OnlySmallAndPure()}
    for is_warm in (False, True):
        model = precast.compile(Long(), **settings)
        with torch.no_grad():
            run_long(model, 5)
        [piece] = precast.status(model)["assemblies"][0]["pieces"]
        assert precast.status(model)["is_warm"] is is_warm
        assert piece["compiler"] == "planted"
        assert piece["reason"]["code"] == "compile-memory"
        assert ", 1 eager: " in piece["reason"]["message"]


PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, precast
from precast.background.usage import processes_of
from system.test_compile_faults import SETTINGS, Scaled
from unit.background import planted

torch.set_num_threads(1)
started = threading.Event()
model = precast.compile(
    Scaled(), **{**SETTINGS, "max_compile_time": 8 if sys.argv[2] == "killed, stuck" else 600},
    compiler=planted.Hanging() if sys.argv[2] == "killed" else planted.HangingInC(),
    listeners=[lambda event: started.set() if "CompileStarted" in repr(event) else None],
)

@torch.no_grad()
def run():
    model(torch.randn(3, 4))

threading.Thread(target=run, daemon=True).start()
assert started.wait(120)
def is_child(pid):
    try:
        return b"sleep(600)" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # It has ended.
        return False

children = []
while not children:
    time.sleep(0.05)
    pids = processes_of(os.getpid()) - {os.getpid()}
    children = list(filter(is_child, pids))
print(*pids - set(children))
print(*children)
print(time.monotonic(), flush=True)
if sys.argv[2] != "by itself":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["by itself", "killed", "killed, stuck"])
def test_a_program_that_ends_leaves_nothing_behind(tmp_path: Path, how: str) -> None:
    """
    A compile hangs, in C code where no Python thread runs, or ignoring SIGTERM where the parent is
    killed; its child is in another session. The interpreter's exit takes a second at most, on a
    machine that has time. Stuck in C, a worker whose parent is killed ends some time after its
    deadline, its child later still.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "tests"), how],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
    )
    ended = time.monotonic()
    workers, children, began = done.stdout.splitlines()

    assert (done.returncode == 0) is (how == "by itself"), done.stderr[-2000:]
    mine, theirs = list(map(int, workers.split())), list(map(int, children.split()))
    assert mine and theirs
    if how != "killed, stuck":
        mine += theirs
    deadline = time.monotonic() + (0 if how == "by itself" else 30)
    while any(map(is_running, mine)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, mine))
    if how == "killed, stuck":
        for pid in theirs:
            os.kill(pid, signal.SIGKILL)
    elif how == "by itself":
        assert ended - float(began) < 5
        assert [path.name for path in temporary.iterdir() if "precast" in path.name] == []
    else:
        assert [path.name for path in temporary.iterdir() if "worker" in path.name] == []


FORKING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, precast
from precast.background.service import CompileService
from precast.compilers.job import CompileJob
from system.test_compile_faults import SETTINGS, Scaled
from unit.background import planted
from unit.compilers.example_pieces import TINY

torch.set_num_threads(1)
service = CompileService(1)

def compile_tiny(folder):
    job = CompileJob(piece=TINY.to_json(), compilers=("eager",), directory=folder)
    return service.submit(job).result(60).worker_pid

with torch.no_grad():
    x = torch.randn(3, 4)
    model = precast.compile(Scaled(), compiler=planted.Noisy(), **SETTINGS)
    assert torch.equal(model(x), model.forward(x))
    mine = compile_tiny(sys.argv[2] + "/1")
    child = os.fork()
    assert torch.equal(model(x), model.forward(x))
    worker = compile_tiny(f"{sys.argv[2]}/{os.getpid()}")
    assert (worker == mine) is bool(child), (worker, mine, child)
    model.double()
    try:
        assert torch.equal(model(x.double()), model.forward(x.double()))
        assert len(precast.status(model)["assemblies"]) == 2
    finally:
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert compile_tiny(sys.argv[2] + "/2") == mine
    service.close()
print("done")
"""


def test_both_sides_of_a_fork_go_on(tmp_path: Path) -> None:
    """
    Each compiles with workers of its own, and the child's exit takes nothing from the parent.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(ROOT / "tests"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["done", "done"]
