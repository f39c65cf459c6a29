"""Several models, threads and processes at once, copies of a model, and what is left at the end."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from system.conftest import ROOT
from system.models import assert_same, compiled, eager, make_net, make_plain, names

INPUTS = torch.linspace(-2, 2, 24).reshape(3, 8)


def test_two_models_in_one_process(tmp_path: Path) -> None:
    """Two models of one class, called in turn, and a third of another one."""
    one, events = compiled(make_net(), tmp_path)
    other, other_events = compiled(make_net(eps=0.5), tmp_path)
    third, _ = compiled(make_plain(), tmp_path)
    with torch.no_grad():
        for _ in range(3):
            assert_same(one(INPUTS), eager(one, INPUTS))
            assert_same(other(INPUTS), eager(other, INPUTS))
            assert_same(third(torch.ones(3, 16)), eager(third, torch.ones(3, 16)))
        one.scale = 3.0
        assert_same(one(INPUTS), eager(one, INPUTS))
        precast.release(one)
        assert_same(other(INPUTS), eager(other, INPUTS))
    assert "ModelReleased" in names(events)
    assert "ModelReleased" not in names(other_events)


@pytest.mark.parametrize("is_warm", [False, True])
def test_two_threads(tmp_path: Path, is_warm: bool) -> None:
    """Their first calls at once, then 200 each, sizes varying: one capture, and eager's outputs."""
    if is_warm:
        with torch.no_grad():
            compiled(make_net(), tmp_path)[0](INPUTS)
    model, events = compiled(make_net(), tmp_path)
    inputs = [torch.linspace(-1, 1, 8 * n).reshape(n, 8) for n in (3, 2, 5, 17)]
    with torch.no_grad():
        expected = [eager(model, x) for x in inputs]
    start = threading.Barrier(2)

    def serve(_: int) -> None:
        start.wait()
        with torch.no_grad():
            for number in range(201):
                assert_same(model(inputs[number % 4]), expected[number % 4])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(serve, range(2)))
    assert names(events).count("ModelReady") == 1
    assert names(events).count("CaptureFinished") == (0 if is_warm else 1)


def test_threads_while_the_model_changes(tmp_path: Path) -> None:
    """Another thread exchanges a constant: each call is right for the one or the other value."""
    model, _ = compiled(make_net(), tmp_path)
    allowed = []
    with torch.no_grad():
        for scale in (1.0, 3.0):
            model.scale = scale
            model(INPUTS)
            allowed.append(eager(model, INPUTS))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            model.scale = 1.0 if model.scale == 3.0 else 3.0
            time.sleep(0.001)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with torch.no_grad():
            for _ in range(100):
                found = model(INPUTS)
                assert any(torch.equal(found, value) for value in allowed)
    finally:
        stop.set()
        changer.join()


_COLD = """
import sys, time, torch
from pathlib import Path
from system.models import compiled, make_net, assert_same, eager, names
model, events = compiled(make_net(), sys.argv[1])
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.005)
with torch.no_grad():
    assert_same(model(torch.ones(3, 8)), eager(model, torch.ones(3, 8)))
"""


_ORDERS = (("cache", "a", "b"), ("cache", "b", "a"))


def test_two_processes_cold_on_one_directory(tmp_path: Path) -> None:
    """Both come out right, nothing is set aside, and the next start is warm."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _COLD,
                *map(str, paths),
            ],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for paths in ([tmp_path / name for name in order] for order in _ORDERS)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert not list(tmp_path.rglob("quarantine/*"))
    model, events = compiled(make_net(), tmp_path / "cache")
    with torch.no_grad():
        model(torch.ones(3, 8))
    assert "AssemblyLoaded" in names(events)


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies(how: str, tmp_path: Path) -> None:
    """A copy is a plain model; it and the original know nothing of each other."""
    model, _ = compiled(make_net(), tmp_path / "cache")
    with torch.no_grad():
        model(INPUTS)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "copy":
            twin = copy.copy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, tmp_path / "model.pt")
            twin = torch.load(tmp_path / "model.pt", weights_only=False)
        twin.scale = 3.0
        assert_same(twin(INPUTS), eager(twin, INPUTS))
        assert_same(model(INPUTS), eager(model, INPUTS))
        assert not torch.equal(twin(INPUTS), model(INPUTS))
        assert precast.status(twin)["assemblies"] == []
        twin, _ = compiled(twin, tmp_path / "cache")
        assert_same(twin(INPUTS), eager(twin, INPUTS))
        precast.release(twin)
        assert_same(model(INPUTS), eager(model, INPUTS))
    assert precast.status(model)["assemblies"] != []


_FORK = """
import os, sys, torch
torch.set_num_threads(1)
from system.models import compiled, make_net, assert_same, eager
model, _ = compiled(make_net(), sys.argv[1])
with torch.no_grad():
    model(torch.ones(3, 8))
    child = os.fork()
    assert_same(model(torch.ones(4, 8)), eager(model, torch.ones(4, 8)))
    model.scale = 2.0  # Compiled anew, in both.
    assert_same(model(torch.ones(4, 8)), eager(model, torch.ones(4, 8)))
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0)
"""


def test_fork_after_compile(tmp_path: Path, run_python: Any) -> None:
    """Parent and child both go on serving, and compile what is new."""
    run_python(_FORK, tmp_path / "cache")


def children() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(entry.name))
    return found


def our_temporary_files() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("precast-*")}


@pytest.mark.compile
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_release(real_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to eager, the same object, with no process and no temporary file left."""
    cache, place = shutil.copytree(real_cache, tmp_path / "cache"), tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    before = children()
    settings: Any = {"compiler": "auto", "compilation_level": "full"}
    warm, events = compiled(make_plain(), cache, **settings)
    # Captures, looks for the piece in the cache and starts workers beside it.
    cold, cold_events = compiled(make_plain(), cache, revalidate="background", **settings)
    cold.register_buffer("another", torch.zeros(1))
    x = torch.ones(3, 16)
    with torch.no_grad():
        for model in (warm, cold):
            assert_same(model(x), eager(model, x), exact=False)
            precast.release(model)
            assert model._compiled_call_impl is None
            assert_same(model(x), eager(model, x))
            precast.release(model)  # Again does nothing.
    assert "AssemblyLoaded" in names(events)
    assert "CaptureFinished" in names(cold_events)
    deadline = time.monotonic() + 10
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() <= before
    assert our_temporary_files() == set()
    assert list(place.iterdir()) == []
