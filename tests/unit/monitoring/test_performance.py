"""Figures per piece and start, and calls that are timed only where one asks for it."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast import events
from precast.config import CompilationConfig
from precast.errors import ConfigError
from precast.events import CacheMiss, PieceCompiled, PieceLoaded, PieceTimed
from precast.monitoring.performance import PerformanceMonitor
from precast.monitoring.recorder import Recorder
from precast.runtime.dispatch import Dispatcher, WatchedDispatcher

READY = events.ModelReady("Model", 1.5, 2, 2, 2, 0, 0, 3.0, warm=False)


def test_figures_are_kept_per_piece_and_sizes() -> None:
    monitor = PerformanceMonitor()
    rows = (
        {"sizes": {"s0": 8}, "compiled_s": 1.0, "eager_s": 1.5},
        {"sizes": {"s0": 2}, "compiled_s": 1.0, "eager_s": 2.0},
    )
    monitor(PieceCompiled("layer", "k", "aot_inductor", 12.0, 1000, 1))
    monitor(PieceTimed("layer", "k", rows))
    monitor(PieceLoaded("head", "k", "disk", 0.001, 3.0))
    monitor(CacheMiss("k", "new"))
    assert monitor.pieces() == {
        "layer": {
            "compile_seconds": 12.0,
            "compiler": "aot_inductor",
            "timing": [{**rows[0], "speedup": 1.5}, {**rows[1], "speedup": 2.0}],
            "speedup": 2.0,
        },
        "head": {"load_seconds": 0.001, "tier": "disk"},
    }


def test_memory_is_read_before_and_after_a_start() -> None:
    monitor = PerformanceMonitor()
    monitor(CacheMiss("k", "new"))
    held = mmap.mmap(-1, 1 << 26)  # Pages of its own, which nothing held before.
    held.write(b"x" * (1 << 26))
    monitor(READY)
    (start,) = monitor.starts()
    grown = start["memory_after"]["resident_bytes"] - start["memory_before"]["resident_bytes"]
    assert (start["model"], start["is_warm"], start["seconds"]) == ("Model", False, 1.5)
    assert grown >= len(held) // 2
    assert start["memory_before"]["device_bytes"] is None or torch.cuda.is_initialized()


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Session:
    name = "Model"

    def __init__(self) -> None:
        self.config = CompilationConfig()
        self.recorder = Recorder()


class Compiled:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.session = Session()


def served(model: nn.Module, serve: Callable[[], Any] = lambda: "served") -> Dispatcher:
    """Have a dispatcher serve a model's calls, as `precast.compile` does."""
    dispatcher = Dispatcher(model, lambda *_: None, lambda _args, _kwargs: serve(), lambda *_: None)
    dispatcher.compiled = Compiled(dispatcher)
    model._compiled_call_impl = dispatcher
    return dispatcher


def test_one_call_in_n_is_timed_and_all_are_counted() -> None:
    monitor, model = PerformanceMonitor(), Model()
    served(model, lambda: time.sleep(0.002))
    monitor.watch(model, every=5)
    for _ in range(23):
        model(torch.ones(1))
    calls = monitor.calls()["Model"]
    assert (calls["num_calls"], calls["count"]) == (23, 4)
    assert 0.002 <= calls["p50"] <= calls["p95"] <= calls["p99"]
    assert 0 < calls["calls_per_s"] < 500
    assert not calls["is_on_device"]


def test_a_model_that_nobody_watches_runs_as_before() -> None:
    """
    The watch changes the dispatcher's class; without one the hot path has not an instruction more.
    """
    monitor, model = PerformanceMonitor(), Model()
    dispatcher = served(model)
    assert type(dispatcher) is Dispatcher
    monitor.watch(model, every=1)
    assert type(dispatcher) is WatchedDispatcher
    model(torch.ones(1))
    monitor.unwatch(model)
    assert type(dispatcher) is Dispatcher
    assert model(torch.ones(1)) == "served"
    assert monitor.calls()["Model"]["num_calls"] == 1


def test_calls_of_many_threads_are_all_counted() -> None:
    monitor, model = PerformanceMonitor(), Model()
    served(model)
    monitor.watch(model, every=10)

    def call() -> None:
        for _ in range(500):
            model(torch.ones(1))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model(torch.ones(1))  # Threads that end at once may write their last numbers in any order.
    assert monitor.calls()["Model"]["num_calls"] == 2001
    assert monitor.calls()["Model"]["count"] == 200


def test_a_call_that_starts_or_fails_is_no_latency() -> None:
    monitor, model = PerformanceMonitor(), Model()

    def start() -> str:
        dispatcher.loaded = (object(),)  # type: ignore[assignment]
        return "compiled"

    def fail() -> None:
        raise ValueError("as eager does")

    dispatcher = served(model, start)
    monitor.watch(model, every=1)
    assert model(torch.ones(1)) == "compiled"
    dispatcher = served(model, fail)
    monitor.watch(model, every=1)
    with pytest.raises(ValueError, match="as eager does"):
        model(torch.ones(1))
    assert monitor.calls()["Model"]["num_calls"] == 2  # Of both watches of that name.
    assert monitor.calls()["Model"]["count"] == 0


def test_a_start_that_loads_nothing_here_is_no_latency() -> None:
    """A model that cannot be captured whole is compiled in blocks, each served by itself."""
    monitor, model = PerformanceMonitor(), Model()
    told: list[events.Event] = []

    def serve() -> None:
        for event in told:
            dispatcher.compiled.session.recorder(event)

    dispatcher = served(model, serve)
    monitor.watch(model, every=1)
    model(torch.ones(1))
    told.append(READY)
    model(torch.ones(1))
    assert monitor.calls()["Model"]["num_calls"] == 2
    assert monitor.calls()["Model"]["count"] == 1


def test_models_that_come_and_go_leave_nothing_behind() -> None:
    monitor = PerformanceMonitor()
    settings: dict[str, Any] = {"disable_compile_cache": True, "compiler": "eager"}
    kept = Model()
    watchers = []
    for number in range(6):
        model = precast.compile(kept if number % 2 else Model(), **settings)
        monitor.watch(model, every=1)
        watchers.append(weakref.ref(model._compiled_call_impl.watcher))
        with torch.inference_mode():
            model(torch.ones(1))
        if number % 2:
            precast.release(model)  # The others are just forgotten.
        del model
    gc.collect()
    assert monitor.calls()["Model"]["num_calls"] == 6
    assert [watcher() for watcher in watchers] == [None] * 6


def test_a_function_that_was_released_is_watched_no_more() -> None:
    monitor = PerformanceMonitor()

    @precast.compile(disable_compile_cache=True, compiler="eager")
    def add_one(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    monitor.watch(add_one, every=1, name="add_one")
    precast.release(add_one)
    add_one(torch.ones(1))
    assert monitor.calls()["add_one"]["num_calls"] == 0


def test_where_precast_is_switched_off_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_DISABLE", "1")
    monitor, model = PerformanceMonitor(), precast.compile(Model())
    monitor.watch(model)
    monitor.unwatch(model)
    assert monitor.calls() == {}


def test_only_what_precast_serves_is_watched_and_by_one_monitor() -> None:
    monitor, model = PerformanceMonitor(), Model()
    with pytest.raises(ConfigError, match=r"call precast\.compile"):
        monitor.watch(model)
    with pytest.raises(ConfigError, match="at least 1"):
        monitor.watch(model, every=0)
    served(model)
    monitor.watch(model)
    with pytest.raises(ConfigError, match="unwatch it where"):
        PerformanceMonitor().watch(model)
    PerformanceMonitor().unwatch(model)
    assert monitor.calls()["Model"]["num_calls"] == 0
    assert type(model._compiled_call_impl) is WatchedDispatcher


def test_two_models_of_one_name_are_added_up_or_named_apart() -> None:
    monitor = PerformanceMonitor()
    for name in (None, None, "other"):
        model = Model()
        served(model)
        monitor.watch(model, every=1, name=name)
        model(torch.ones(1))
    calls = monitor.calls()
    assert {name: calls[name]["num_calls"] for name in calls} == {"Model": 2, "other": 1}


def test_a_forked_process_begins_anew() -> None:
    monitor, model = PerformanceMonitor(), Model()
    served(model)
    monitor.watch(model, every=1)
    monitor(PieceLoaded("head", "k", "disk", 0.001, 3.0))
    for _ in range(3):
        model(torch.ones(1))
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        model(torch.ones(1))
        calls = monitor.calls()["Model"]
        os.write(send, f"{calls['num_calls']} {calls['count']} {len(monitor.pieces())}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(receive, 100) == b"1 1 0"
    assert monitor.calls()["Model"]["num_calls"] == 3


@pytest.mark.gpu
def test_a_gpus_calls_are_timed_by_its_own_clock() -> None:
    """
    The call returns long before the device has done its work, and is not held up.
    """
    monitor, model = PerformanceMonitor(), Model()
    model.weight = nn.Parameter(torch.randn(4096, 4096, device="cuda"))
    work = model.weight.detach()

    def serve() -> None:
        for _ in range(50):
            torch.mm(work, work)

    served(model, serve)
    monitor.watch(model, every=1)
    model(work)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        model(work)
    host_s = (time.perf_counter() - started) / 5
    torch.cuda.synchronize()
    calls = monitor.calls()["Model"]
    assert calls["is_on_device"]
    assert calls["count"] == 6
    assert calls["p50"] > 2 * host_s


@pytest.mark.gpu
def test_a_gpu_tells_how_busy_it_is() -> None:
    pytest.importorskip("pynvml")
    gpu = PerformanceMonitor().gpus()[0]
    assert 0 <= gpu["utilization"] <= 1
    assert 0 < gpu["memory_used_bytes"] <= gpu["memory_total_bytes"]


def test_a_machine_without_a_gpu_has_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert PerformanceMonitor().gpus() == []
