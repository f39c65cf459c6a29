"""Serving while pieces compile: real children and workers, cheap compilers."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast import progressive
from precast.events import CompileStarted, Event, SlotSwapped
from precast.serving import CompiledModel
from system.conftest import ROOT
from system.models import (
    Block,
    Broken,
    Filed,
    Hanging,
    HangingLater,
    Narrow,
    Raising,
    assert_same,
    compiled,
    eager,
    make_net,
    names,
    served_by_nobody,
)


@pytest.fixture(autouse=True)
def cold_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")  # These compilers do not need Inductor.
    with torch.no_grad():
        yield


def serve(model: Any, cache_dir: Any, **settings: Any) -> tuple[Any, list[Event]]:
    settings = {"compiler": Filed(), "on_error": "eager", "mode": "progressive", **settings}
    return compiled(model, cache_dir, **settings)


def codes(model: Any) -> list[str]:
    return [reason["code"] for reason in precast.status(model)["reasons"]]


def compilers(model: Any) -> list[str]:
    return [p["compiler"] for a in precast.status(model)["assemblies"] for p in a["pieces"]]


class Local(nn.Module):
    """Holds a lock, and so cannot be sent to another process."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8, 8) for _ in range(depth))
        self.last = nn.Linear(8, 8)
        self.guard = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def make_local() -> Local:
    torch.manual_seed(0)
    return Local().eval()


class BrokenLocal(Local):
    """As that, and cannot be captured whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def make_broken() -> Local:
    torch.manual_seed(0)
    return BrokenLocal().eval()


_WHOLE_WAY = """
import sys, torch, precast
from system.models import Filed, compiled, eager, make_net, names
model, events = compiled(
    make_net(depth=5), sys.argv[1], compiler=Filed(), mode="progressive",
    disable_compile_cache=sys.argv[2] == "off",
)
x = torch.ones(3, 8)
with torch.inference_mode():
    expected = model.forward(x)
    assert torch.equal(model(x), expected)
    print(*names(events))
    assert precast.wait(model, 120)
    pieces = [p["compiler"] for p in precast.status(model)["assemblies"][0]["pieces"]]
    assert set(pieces) == {"filed"} and len(pieces) >= 5, pieces
    for size in (3, 2, 7):
        x = torch.randn(size, 8)
        assert torch.equal(model(x), model.forward(x))
    assert len(precast.status(model)["assemblies"]) == 1
print(*names(events))
print(precast.status(model)["reasons"])
print([n for n in sys.modules if n.startswith(("torch._dynamo", "torch._inductor", "sympy"))])
"""


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_serving_process_never_traces(cache: str, tmp_path: Path, run_python: Any) -> None:
    """It is served eager, then compiled, without importing a tracer; the next start is whole.

    Without a cache it is the same, but for the next start.
    """
    path = tmp_path / "cache"
    first, then, reasons, imported = run_python(_WHOLE_WAY, path, cache).splitlines()
    assert "SlotSwapped" not in first.split()
    happened = then.split()
    assert happened.index("PlanMade") < happened.index("SlotSwapped") < happened.index("ModelReady")
    assert (reasons, imported) == ("[]", "[]")
    if cache == "on":
        _, then, *_ = run_python(_WHOLE_WAY, path, cache).splitlines()
        assert then.split().count("PieceLoaded") == happened.count("PieceCompiled")
        assert then.split()[-2:] == ["AssemblyLoaded", "ModelReady"]
        assert "CaptureFinished" not in then.split()
    else:
        assert not path.exists()


_REAL = """
import sys, torch, precast
from system.models import compiled, make_plain, names
model = make_plain()
model.register_buffer("of_another_model", torch.zeros(1))  # The pieces are the same.
model, events = compiled(
    model, sys.argv[1], compiler="auto", compilation_level="full", mode="progressive"
)
x = torch.linspace(-1, 1, 48).reshape(3, 16)
with torch.inference_mode():
    expected = model.forward(x)
    assert torch.equal(model(x), expected)
    assert precast.wait(model, 240)
    assert (model(x) - expected).abs().max() < 1e-5  # `torch.testing` imports sympy.
print(*names(events))
print(*[p["compiler"] for p in precast.status(model)["assemblies"][0]["pieces"]])
print([n for n in sys.modules if n.startswith(("torch._dynamo", "torch._inductor", "sympy"))])
"""


@pytest.mark.compile
def test_real_code_is_swapped_in_without_a_compiler_in_the_process(
    real_cache: Path, tmp_path: Path, run_python: Any
) -> None:
    """The pieces of another model are found, the rest of the way is all there is to do."""
    shutil.copytree(real_cache, tmp_path / "cache", symlinks=True)
    happened, compilers, imported = run_python(_REAL, tmp_path / "cache").splitlines()
    assert "SlotSwapped" in happened.split()
    assert "PieceLoaded" in happened.split()
    assert "CompileStarted" not in happened.split()
    assert set(compilers.split()) == {"aot_inductor"}
    assert imported == "[]"


def test_a_model_that_cannot_be_sent_is_captured_between_calls(tmp_path: Path) -> None:
    """
    Eight threads call it all the while; every output is eager's. The reason has the cost.
    """
    model, events = serve(make_local(), tmp_path)
    inputs = [torch.randn(size, 8) for size in (2, 3, 5, 8)]
    expected = [eager(model, x) for x in inputs]
    stop = threading.Event()
    problems: list[str] = []
    num_calls = [0] * 8

    def call(number: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                for x, y in zip(inputs, expected, strict=True):
                    try:
                        if not torch.equal(model(x), y):
                            problems.append("another result")
                    except Exception as error:  # noqa: BLE001 - what is looked for.
                        problems.append(repr(error))
                    num_calls[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert precast.wait(model, 120)
    stop.set()
    for thread in threads:
        thread.join()
    assert precast.wait(model, 120)
    assert problems == []
    assert min(num_calls) > 0
    assert codes(model) == ["capture-in-process"]
    assert "held calls up for" in precast.status(model)["reasons"][0]["message"]
    assert set(compilers(model)) == {"filed"}
    assert names(events).count("CaptureFinished") == 1


def test_a_new_shape_runs_eager_and_is_swapped_in_later(tmp_path: Path) -> None:
    """One request for each kind of call, however often it comes; `max_assemblies` holds."""
    model, events = serve(make_local(), tmp_path, max_assemblies=2)
    few, many = torch.randn(1, 8), torch.randn(4, 8)
    cube = torch.randn(2, 3, 8)
    for x in (many, few, cube):
        for _ in range(3):
            assert_same(model(x), eager(model, x))
        assert precast.wait(model, 120)
        for _ in range(2):
            assert_same(model(x), eager(model, x))
    assert precast.wait(model, 120)
    assert len(precast.status(model)["assemblies"]) == 2
    assert "CallOutsideContract" in names(events)
    assert names(events).count("CaptureFinished") <= 3
    before = len(events)
    for x in (few, many, cube):
        assert_same(model(x), eager(model, x))
    assert precast.wait(model, 120)
    assert "CaptureFinished" not in names(events[before:])


def test_code_for_fewer_sizes_is_swapped_in_for_those(tmp_path: Path) -> None:
    """Also where the second piece to land holds for fewer than the first, which serves already."""
    model, _ = serve(make_local(), tmp_path, compiler=Narrow())
    model(torch.randn(4, 8))
    assert precast.wait(model, 120)
    assert compilers(model) == ["narrow"] * 6
    loaded = model._compiled_call_impl.loaded[0]
    assert loaded.why_not((model, torch.randn(6, 8)), {}) is None
    assert loaded.why_not((model, torch.randn(7, 8)), {}) is not None
    for size in (2, 6, 7, 100):
        x = torch.randn(size, 8)
        assert_same(model(x), eager(model, x))
    conditions = precast.status(model)["assemblies"][0]["conditions"]
    assert any("..6" in text for text in conditions), conditions


def test_a_failure_is_not_tried_at_every_call(tmp_path: Path) -> None:
    """Pieces that no compiler takes stay eager, with the reason; a model that cannot be captured
    is left as it was.
    """
    model, events = serve(make_local(), tmp_path, compiler=Raising())
    x = torch.randn(3, 8)
    for _ in range(3):
        assert_same(model(x), eager(model, x))
        assert precast.wait(model, 120)
    assert set(compilers(model)) == {"eager"}
    reasons = {p["reason"]["code"] for p in precast.status(model)["assemblies"][0]["pieces"]}
    assert reasons == {"compile-failed"}
    assert names(events).count("CaptureFinished") == 1

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    served, events = serve(broken, tmp_path)
    for _ in range(3):
        assert_same(served(x), x + 1)
        assert precast.wait(served, 120)
    assert codes(served) == ["capture-in-process", "capture-failed"]
    assert names(events).count("CaptureFailed") == 1


@pytest.mark.parametrize("how", ["fail", "listener"])
def test_the_thread_behind_survives_errors_in_the_answer_to_an_error(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits is not left waiting, and the next kind of call has its turn."""
    num_tried = 0

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    def try_in_vain(*_: object) -> None:
        nonlocal num_tried
        num_tried += 1
        fail()

    def leave(event: Event) -> None:
        if type(event).__name__ == "CaptureFailed":
            raise SystemExit(3)

    monkeypatch.setattr(progressive, "_capture", try_in_vain)
    if how == "fail":
        monkeypatch.setattr(CompiledModel, "fail", fail)
    model = precast.compile(
        nn.Linear(8, 8),
        cache_dir=tmp_path,
        compiler=Filed(),
        mode="progressive",
        progress=False,
        listeners=[leave] if how == "listener" else [],
    )
    thread = model._compiled_call_impl.compiled._behind._state.thread
    for number, shape in enumerate([(3, 8), (2, 3, 8)], 1):
        x = torch.randn(shape)
        assert_same(model(x), eager(model, x))
        assert precast.wait(model, 120)
        assert num_tried == number
    assert thread.is_alive()
    assert precast.status(model)["behind"] == {"doing": None, "waiting": 0}
    assert not list(tmp_path.rglob("failed-*")), "it says nothing of the model"
    if how == "listener":
        model(x)
        assert precast.wait(model, 120)
        assert num_tried == 2, "it was given up all the same"
    precast.release(model)


def children() -> set[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())],
        capture_output=True,
        text=True,
        check=False,
    )
    return {int(pid) for pid in found.stdout.split()}


def wait_for(events: list[Event], name: str) -> None:
    deadline = time.monotonic() + 120
    while name not in names(events):
        assert time.monotonic() < deadline, names(events)
        time.sleep(0.02)


def test_release_during_a_compile_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    model, events = serve(make_local(), tmp_path / "cache", compiler=Hanging())
    x = torch.randn(3, 8)
    model(x)
    wait_for(events, "CompileStarted")
    assert not precast.wait(model, 0.01)
    thread = model._compiled_call_impl.compiled._behind._state.thread
    assert precast.status(model)["behind"]["doing"] == "compiling"
    started = time.monotonic()
    precast.release(model)
    assert time.monotonic() - started < 5
    assert model._compiled_call_impl is None
    assert "ModelReady" not in names(events)
    assert_same(model(x), model.forward(x))
    assert not thread.is_alive()
    assert not children() - before - {0} or _all_gone(children() - before)
    assert list(folder.iterdir()) == []


def test_release_during_a_trace_in_this_process_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls after it go past the gate; what was traced is not cut and written any more."""
    happened: list[str] = []
    state: Any = None

    def trace(*_: Any, alone: Any) -> None:
        with alone:
            happened.append("began")
            while not state.is_ended:
                time.sleep(0.01)
            time.sleep(0.2)
            happened.append("traced")
        happened.append("drawn")

    monkeypatch.setattr(progressive, "draw_call", trace)
    monkeypatch.setattr(progressive, "_RELEASE_S", 0.0)
    model, _ = serve(make_local(), tmp_path)
    state = model._compiled_call_impl.compiled._behind._state
    model(torch.randn(3, 8))
    deadline = time.monotonic() + 60
    while not happened:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    precast.release(model)
    happened.append("released")
    assert happened == ["began", "traced", "released"]
    state.thread.join(20)
    assert not state.thread.is_alive()


def _all_gone(pids: set[int]) -> bool:
    """The `ps` that listed them is one itself."""
    time.sleep(0.2)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


_EXIT = """
import sys, tempfile, threading, time, torch
tempfile.tempdir = sys.argv[2]
from system.models import Hanging, compiled, make_net, names
model, events = compiled(
    make_net(), sys.argv[1], compiler=Hanging(), mode="progressive", on_error="eager"
)
with torch.no_grad():
    model(torch.ones(3, 8))
while sys.argv[3] not in names(events):
    time.sleep(0.01)
    if sys.argv[3] == "capture":
        time.sleep(0.3)
        break
print(time.time(), flush=True)
"""


@pytest.mark.parametrize("stage", ["capture", "CompileStarted"])
def test_an_exit_leaves_nothing_behind(stage: str, tmp_path: Path) -> None:
    """Neither a process nor a file, and at once, whatever a compiler thinks of signals."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    # A group of its own would not hold the children: they have groups of theirs. A mark does.
    mark = f"PRECAST_TEST_MARK={tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", _EXIT, str(tmp_path / "cache"), str(folder), stage],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": path, "PRECAST_TEST_MARK": str(tmp_path)},
    )
    ended = time.time()
    assert ended - float(done.stdout) < 5  # A second on a machine with nothing else to do.
    deadline = time.monotonic() + 5
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert list(folder.iterdir()) == []


_EXIT_INSIDE = """
import sys, threading, time, torch, precast
from precast import progressive, second_look
from precast.sampling import Sampler
from system.models import Filed, compiled, make_net
inside = {}
second_look.REVALIDATION_DELAY_S = 0

def work_for_ever(*args, **kwargs):
    x = torch.ones(256, 256)
    while True:
        try:
            inside[threading.current_thread().name] = x @ x
        except Exception:
            pass

progressive.draw_call = second_look.SecondLook._look = work_for_ever
for _ in range(2):
    folder = sys.argv[1] + "-warm"
    warm, _ = compiled(make_net(), folder, compiler=Filed(), revalidate="background")
    with torch.no_grad():
        warm(torch.ones(3, 8))
    precast.wait(warm)
model = make_net()
model.lock = threading.Lock()  # It cannot be sent.
model, _ = compiled(model, sys.argv[1], compiler=Filed(), mode="progressive", on_error="eager")
sampler = Sampler(lambda x: x, work_for_ever, 1, print)
with torch.no_grad():
    model(torch.ones(3, 8))
    sampler(torch.ones(3))
deadline = time.monotonic() + 60
while len(inside) < 3:
    assert time.monotonic() < deadline, inside
    time.sleep(0.01)
if sys.argv[2] == "released":
    progressive._RELEASE_TRACING_S = progressive._RELEASE_S = 0.1
    precast.release(model)
    precast.release(warm)
print(*sorted(inside))
"""


@pytest.mark.parametrize("when", ["serving", "released"])
def test_an_exit_breaks_off_what_traces_and_what_checks(when: str, tmp_path: Path) -> None:
    """In the middle of torch's code, where the end of a thread would abort the process."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", _EXIT_INSIDE, str(tmp_path / "cache"), when],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["precast-behind", "precast-revalidate", "precast-sample"]
    assert "Traceback" not in done.stderr


def _marked(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_thousand_swaps_under_eight_threads(tmp_path: Path) -> None:
    """Slots are replaced while calls are inside: every output equals eager's."""
    model, _ = compiled(make_local(), tmp_path, compiler=Filed())
    model(torch.randn(3, 8))
    loaded = model._compiled_call_impl.loaded[0]
    table = loaded.slots
    used = [i for i, slot in enumerate(table.slots) if slot is not None]
    originals = {i: (table.callables[i], table.slots[i]) for i in used}
    inputs = [torch.randn(size, 8) for size in range(2, 10)]
    expected = [eager(model, x) for x in inputs]
    stop = threading.Event()
    num_calls, problems = [0] * 8, []

    def call(number: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    torch.testing.assert_close(model(inputs[number]), expected[number])
                except Exception as error:  # noqa: BLE001 - what is looked for.
                    problems.append(repr(error))
                num_calls[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for number in range(1000):
        index = used[number % len(used)]
        run, slot = originals[index]
        # Other code for the same piece: new at every swap, as a compiler's would be.
        table.swap(index, lambda inputs, run=run: tuple(run(inputs)), slot)
        if not number % 50:
            time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert min(num_calls) > 0
    assert codes(model) == []


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise AssertionError


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_soak_over_mixed_shapes_does_not_grow(tmp_path: Path) -> None:
    """Thousands of calls, of more kinds than are compiled: neither objects nor memory grow."""
    model, _ = serve(make_local(), tmp_path, use_inductor=False, max_assemblies=2)
    shapes = [(1, 8), (2, 8), (7, 8), (64, 8), (2, 3, 8), (1, 1, 8), (2, 2, 2, 8), (0, 8)]
    inputs = [torch.randn(shape) for shape in shapes]

    def soak(rounds: int) -> None:
        for _ in range(rounds):
            for x in inputs:
                model(x)

    soak(20)
    assert precast.wait(model, 120)
    soak(50)
    gc.collect()
    objects, memory = len(gc.get_objects()), resident_bytes()
    soak(400)
    gc.collect()
    assert len(gc.get_objects()) - objects < 500
    assert resident_bytes() - memory < 16 << 20
    for x in inputs:
        assert_same(model(x), eager(model, x))


def merge(model: Local) -> None:
    for layer in model.layers:
        layer.up.weight.data.add_(0.01)
        layer.down.weight.copy_(layer.down.weight * 1.5)


def test_weights_merged_in_place_count_at_once(tmp_path: Path) -> None:
    """As a LoRA merge does: before, while and after pieces are compiled."""
    model, _ = serve(make_local(), tmp_path)
    x = torch.randn(3, 8)
    before = model(x)
    merge(model)
    assert precast.wait(model, 120)
    assert not torch.equal(model(x), before)
    for _ in range(2):
        assert_same(model(x), eager(model, x))
        merge(model)
    assert_same(model(x), eager(model, x))
    assert set(compilers(model)) == {"filed"}


@pytest.mark.parametrize(
    ("how", "make"), [("inference", make_local), ("autocast", make_local), ("autocast", make_net)]
)
def test_modes_around_the_call_are_those_of_the_capture(
    how: str, make: Any, tmp_path: Path
) -> None:
    """The call's own mode is captured, and a call in another one is not served by it wrongly."""
    modes: dict[str, Any] = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    model, _ = serve(make(), tmp_path)
    x = torch.randn(3, 8)
    with modes[how]():
        model(x)
        assert precast.wait(model, 120)
        assert "filed" in compilers(model), codes(model)
    for mode in modes.values():
        with mode():
            found, expected = model(x), eager(model, x)
            assert found.is_inference() == expected.is_inference()
            assert_same(found, expected)
    assert precast.wait(model, 120)


def test_a_moved_model_is_followed(tmp_path: Path) -> None:
    """To another dtype and another device and back, as eager would."""
    model, _ = serve(make_local(), tmp_path)
    x = torch.randn(3, 8)
    for change in (
        model.double,
        model.float,
        lambda: model.to("meta"),
        lambda: model.to_empty(device="cpu"),
    ):
        model(x.to(next(model.parameters())))
        assert precast.wait(model, 120)
        change()
        if next(model.parameters()).is_meta:
            assert model(x.to("meta")).is_meta
            assert precast.wait(model, 120)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert_same(model(x), eager(model, x))


def _in_fork(work: Any) -> int:
    """Run something in a fork of this process; return its exit status, or -1 if it hangs."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - shown, since nobody else can.
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """GNU's OpenMP hangs in a fork of a process that has used several threads, in eager too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_serves_on(tmp_path: Path, one_thread: None) -> None:
    """A fork made after a compile, and in the middle of one, with a lock held: it never hangs."""
    model, _ = serve(make_local(), tmp_path)
    hung, events = serve(make_local(), tmp_path / "other", compiler=Hanging())
    x = torch.randn(3, 8)
    model(x)
    assert precast.wait(model, 120)
    hung(x)
    wait_for(events, "CompileStarted")
    expected = eager(model, x)

    def work() -> None:
        with torch.no_grad():
            assert torch.equal(model(x), expected)
            assert torch.equal(hung(x), expected)
            assert precast.wait(model, 60)
            new = torch.randn(2, 2, 8)
            assert torch.equal(hung(new), eager(hung, new))
            precast.release(model)
            precast.release(hung)
            assert torch.equal(model(x), expected)

    compiled_model = model._compiled_call_impl.compiled
    compiled_hung = hung._compiled_call_impl.compiled
    with compiled_model.assemblies.lock, compiled_hung.assemblies.lock:
        holder = threading.Thread(target=lambda: None)
        holder.start()
        holder.join()
        # The lock is held by this thread; in the fork it must not count.
        assert _in_fork(work) == 0
    # The parent's worker was not the fork's to end.
    assert precast.status(hung)["behind"]["doing"] == "compiling"
    assert_same(model(x), expected)
    precast.release(hung)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_of_a_model_in_blocks_has_one_thread_for_all(
    tmp_path: Path, one_thread: None
) -> None:
    model, _ = serve(make_broken(), tmp_path)
    x = torch.randn(3, 8)
    model(x)
    assert precast.wait(model, 120)
    model(x)
    assert precast.wait(model, 120)
    expected = eager(model, x)

    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == "precast-behind"]

    def work() -> None:
        with torch.no_grad():
            assert torch.equal(model.layers[0](x), eager(model.layers[0], x))  # A block first.
            assert torch.equal(model(x), expected)
            assert precast.wait(model, 60)
            assert len(threads()) == 1, threads()
            precast.release(model)
            assert torch.equal(model(x), expected)
            assert threads() == []

    assert len(precast.status(model)["blocks"]) == 5
    assert _in_fork(work) == 0


def test_progressive_wants_a_compiler_that_works_elsewhere() -> None:
    with pytest.raises(precast.PrecastError, match="outside of this process"):
        precast.compile(make_local(), mode="progressive", compiler="inductor")


def test_failures_raise_at_the_wait_if_asked_to(tmp_path: Path) -> None:
    model, _ = serve(make_local(), tmp_path, compiler=Raising(), on_error="raise")
    x = torch.randn(3, 8)
    assert_same(model(x), eager(model, x))
    with pytest.raises(precast.PrecastError, match="no such luck"):
        precast.wait(model, 120)
    assert_same(model(x), eager(model, x))


def test_slots_are_told_of_one_by_one(tmp_path: Path) -> None:
    """Once each; and those pieces are compiled first that most slots run."""
    model, events = serve(make_local(), tmp_path, compile_threads=1)
    model(torch.randn(3, 8))
    assert precast.wait(model, 120)
    slots = model._compiled_call_impl.loaded[0].assembly.slots
    first_name = {number: name for number, name in reversed(slots)}
    count = {name: sum(n == number for n, _ in slots) for number, name in first_name.items()}
    started = [count[event.piece] for event in events if isinstance(event, CompileStarted)]
    assert started == sorted(count.values(), reverse=True)
    assert len(set(started)) > 1
    swapped = [event.slot for event in events if isinstance(event, SlotSwapped)]
    assert sorted(swapped) == list(range(len(compilers(model))))
    with served_by_nobody(model):
        assert model._compiled_call_impl is None


def test_a_model_that_is_gone_leaves_no_thread(tmp_path: Path) -> None:
    model, _ = serve(make_local(), tmp_path)
    thread = model._compiled_call_impl.compiled._behind._state.thread
    assert thread.is_alive()
    del model
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("compiler", "stage"), [(Hanging(), "CompileStarted"), (HangingLater(), "SlotSwapped")]
)
def test_a_model_that_is_gone_is_not_compiled(compiler: Any, stage: str, tmp_path: Path) -> None:
    """Neither its weights nor its workers outlive it, also where a first piece serves already."""
    before = children()
    model, events = serve(make_local(), tmp_path, compiler=compiler, compile_threads=1)
    thread = model._compiled_call_impl.compiled._behind._state.thread
    model(torch.randn(3, 8))
    wait_for(events, stage)
    weight = weakref.ref(model.last.weight)
    del model
    deadline = time.monotonic() + 60
    while weight() is not None:  # The thread is between two steps soon.
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.02)
    thread.join(60)
    assert not thread.is_alive()
    assert _all_gone(children() - before)
    assert "ModelReady" not in names(events)


@pytest.mark.parametrize("surroundings", ["device", "vmap", "trace"])
def test_setting_up_takes_nothing_from_its_surroundings(tmp_path: Path, surroundings: str) -> None:
    """What is rehearsed in `precast.compile` neither fails there nor ends up in someone's trace."""
    model = make_net()
    made: list[Any] = []

    def set_up(x: torch.Tensor) -> torch.Tensor:
        made.append(precast.compile(model, mode="progressive", cache_dir=tmp_path, progress=False))
        return x + 1

    try:
        if surroundings == "device":
            with torch.device("cuda:7"):  # Which no machine of these tests has.
                set_up(torch.ones(1, device="cpu"))
        elif surroundings == "vmap":
            torch.vmap(set_up)(torch.ones(2, 3))
        else:
            from torch.fx.experimental.proxy_tensor import make_fx

            graph = make_fx(set_up)(torch.ones(1)).graph
            called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
            assert called == ["aten.add.Tensor"]
        assert len(made) == 1
    finally:
        precast.release(model)


_OF_MAIN = """
import sys, torch, precast
from system import models
from system.models import compiled, make_of_its_process, names

library = torch.library.Library("of_main", "DEF")
library.define("twice(Tensor x) -> Tensor")
for key in ("CPU", "Meta"):
    library.impl("twice", lambda x: x * 2, key)
models.FLAGS["wide"] = sys.argv[2] != "flag"
x = torch.ones(3, 8)
with torch.no_grad():
    for start in ("cold", "warm"):
        model, events = compiled(
            make_of_its_process(sys.argv[2]), sys.argv[1], compiler=models.Filed(),
            on_error="eager", mode="progressive", keep_slower=True, revalidate=sys.argv[3],
        )
        expected = model.forward(x)
        for _ in range(2):
            assert torch.equal(model(x), expected)
            assert precast.wait(model, 120)
        status = precast.status(model)
        [assembly] = status["assemblies"]
        assert {p["compiler"] for p in assembly["pieces"]} == {"filed"}, status
        reasons = [(reason["code"], reason["message"]) for reason in status["reasons"]]
        if start == "cold":
            [(code, message)] = reasons
            assert code == "capture-in-process", reasons
            print(message)
            precast.release(model)
    assert reasons == [], reasons
    assert "CaptureFinished" not in names(events)
    print(status["not_revalidated"])
"""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("flag", "another state (FLAGS['wide'] is False"),
        ("operator", "AttributeError"),
    ],
)
def test_what_only_this_process_has_is_captured_in_it(
    what: str, says: str, tmp_path: Path, run_python: Any
) -> None:
    """
    What a module global says by now, or an operator of the main script. The next start is warm,
    and a second look, which a child takes too, gives no verdict.
    """
    revalidate = "always" if what == "flag" else "never"
    message, not_looked = run_python(_OF_MAIN, tmp_path, what, revalidate).splitlines()
    assert says in message
    assert "held calls up for" in message
    if what == "flag":
        assert "another state" in not_looked


def test_a_graph_break_is_not_tried_a_second_time(tmp_path: Path) -> None:
    """Whatever its process, it breaks: calls are not held up for it."""
    model, _ = serve(Broken(), tmp_path)
    model(torch.ones(3, 8))
    assert precast.wait(model, 120)
    assert codes(model)[0] == "capture-failed"
    assert "capture-in-process" not in codes(model)
