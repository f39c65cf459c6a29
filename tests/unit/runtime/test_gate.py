from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from precast.runtime import gate as module
from precast.runtime.gate import CallGate


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_nobody_is_inside_while_one_is_alone() -> None:
    """Calls of eight threads and twenty times alone: they never meet, and all go on."""
    gate = CallGate()
    inside, problems, stop = [0], [], threading.Event()
    lock = threading.Lock()
    num_calls = [0] * 8

    def call(number: int) -> None:
        while not stop.is_set():
            with gate:
                with lock:
                    inside[0] += 1
                with gate:  # A model within a model.
                    time.sleep(0.0005)
                with lock:
                    inside[0] -= 1
            num_calls[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with gate.alone(lambda: False) as is_alone:
            assert is_alone
            before = list(num_calls)
            time.sleep(0.002)
            problems += [inside[0], *(a - b for a, b in zip(num_calls, before, strict=True))]
    stop.set()
    for thread in threads:
        thread.join()
    assert not any(problems)
    assert min(num_calls) > 0


def test_a_call_that_does_not_end_holds_nobody_up() -> None:
    """Others are let in again, and who waits to be alone can be called off."""
    gate = CallGate()
    leave, called_off, outcome = threading.Event(), threading.Event(), []

    def stay() -> None:
        with gate:
            leave.wait()

    def wait_alone() -> None:
        with gate.alone(called_off.is_set) as is_alone:
            outcome.append(is_alone)

    staying = threading.Thread(target=stay, daemon=True)
    staying.start()
    waiting = threading.Thread(target=wait_alone)
    waiting.start()
    time.sleep(0.05)
    with gate:
        pass
    called_off.set()
    waiting.join()
    assert outcome == [None]
    with gate:
        leave.set()
    staying.join()


class Caller:
    """A thread inside a gate, until it is told to leave; then it comes back, if it is to."""

    def __init__(self, gate: CallGate, *, comes_back: bool = False) -> None:
        self.is_inside = False
        self.is_back = False
        self._gate = gate
        self._leave = threading.Event()
        self._comes_back = comes_back
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        with self._gate:
            self.is_inside = True
            self._leave.wait()
        if self._comes_back:
            with self._gate:
                self.is_back = True

    def leave(self) -> None:
        self._leave.set()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


class Alone:
    """A thread that wants in alone."""

    def __init__(self, gate: CallGate) -> None:
        self.is_inside = False
        self.held: module.HeldUp | None = None
        self._leave = threading.Event()
        self._gate = gate
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        with self._gate.alone(lambda: False) as self.held:
            self.is_inside = True
            self._leave.wait()

    def leave(self) -> None:
        self._leave.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_a_long_call_holds_no_short_one_up() -> None:
    """They are let in until it ends; then its thread's next one waits, and the gate is shut."""
    gate = CallGate()
    long = Caller(gate, comes_back=True)
    wait_for(lambda: long.is_inside)
    alone = Alone(gate)
    wait_for(lambda: gate._shuts_after is not None)
    for _ in range(100):
        with gate:
            assert not alone.is_inside
    assert gate._held_since is None
    long.leave()
    wait_for(lambda: alone.is_inside)
    wait_for(lambda: gate._held_since is not None)
    assert not long.is_back
    alone.leave()
    long.join()
    assert long.is_back


def test_tries_that_fail_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls were held up for is told, of every try, and the others are let in between."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: time.sleep(0.001))
    monkeypatch.setattr(module, "time", clock)
    gate = CallGate()
    first = Caller(gate)
    wait_for(lambda: first.is_inside)
    alone = Alone(gate)
    wait_for(lambda: gate._shuts_after is not None)
    second = Caller(gate)  # It keeps the gate from being empty once the first has ended.
    wait_for(lambda: second.is_inside)
    first.leave()
    wait_for(lambda: gate._is_shut)
    third = Caller(gate)
    wait_for(lambda: gate._held_since is not None)
    now[0] = 10.0
    wait_for(lambda: third.is_inside)
    assert not alone.is_inside
    second.leave()
    third.leave()
    for caller in (first, second, third):
        caller.join()
    now[0] = 100.0
    wait_for(lambda: alone.is_inside)
    fourth = Caller(gate)
    wait_for(lambda: gate._held_since is not None)
    now[0] = 103.0
    alone.leave()
    fourth.leave()
    fourth.join()
    assert alone.held is not None
    assert (alone.held.total_s, alone.held.longest_s) == (13.0, 10.0)
