"""Work is broken off where it stands, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from precast.breakable import Breakable, BrokenOffError, EndingThread


def run(breakable: Breakable, work: Callable[[], None]) -> tuple[threading.Thread, list[str]]:
    """Do some work in a thread, again and again; return when it has begun."""
    said: list[str] = []
    has_begun = threading.Event()

    def serve() -> None:
        try:
            while True:
                with breakable:
                    has_begun.set()
                    work()
                    said.append("did it")
        except BrokenOffError:
            said.append("broken off")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert has_begun.wait(20)
    return thread, said


def work_for_ever() -> None:
    while True:
        time.sleep(0.001)


def test_work_is_broken_off() -> None:
    breakable = Breakable()
    thread, said = run(breakable, work_for_ever)
    assert breakable.is_inside
    breakable.break_off()
    thread.join(20)
    assert said == ["broken off"]
    assert breakable.is_over
    assert not breakable.is_inside


def test_who_catches_everything_is_asked_again() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        while len(caught) < 2:
            try:
                work_for_ever()
            except BaseException as error:  # noqa: BLE001 - as some tracers do.
                caught.append(error)
        work_for_ever()

    breakable = Breakable()
    thread, said = run(breakable, work)
    breakable.break_off()
    thread.join(20)
    assert said == ["broken off"]
    assert len(caught) == 2


def test_nothing_is_begun_afterwards() -> None:
    breakable = Breakable()
    breakable.break_off()
    with pytest.raises(BrokenOffError), breakable:
        raise AssertionError


def test_what_never_stops_is_not_waited_for() -> None:
    breakable, leave = Breakable(), threading.Event()
    thread, _ = run(breakable, lambda: leave.wait() and None)  # One long step, in C.
    breakable.break_off(patience_s=0)
    assert breakable.is_inside
    leave.set()
    thread.join(20)


def test_a_fork_breaks_nothing_off() -> None:
    """The thread is its parent's."""
    breakable = Breakable()
    thread, said = run(breakable, work_for_ever)
    breakable._pid += 1  # As if this were another process.
    breakable.break_off()
    assert thread.is_alive()
    breakable._pid -= 1
    breakable.break_off()
    thread.join(20)
    assert said == ["broken off"]


def run_python(script: str) -> list[str]:
    """Return the lines that a script prints; it must end by itself, and without an error."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


_LAST_STEP = """
import sys, threading, time, torch
from precast.breakable import EndingThread

class Kept:
    def __del__(self):  # As the tensors of a large model, which take a while.
        began.set()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            torch.ones(64, 64) @ torch.ones(64, 64)
        print("let go", flush=True)

began, own, go = threading.Event(), threading.local(), threading.Event()

def keep(kept):
    own.kept = kept

def start():
    kept = Kept()
    if WHERE == "argument":
        EndingThread(lambda _: go.wait(), kept, name="a", end=lambda _: None).start()
    elif WHERE == "local":
        made = [kept]
        EndingThread(
            lambda: go.wait() and keep(made.pop()), name="a", end=lambda _: None
        ).start()
    else:
        EndingThread(lambda: go.wait(), name="a", end=lambda _, kept=kept: None).start()

start()
go.set()  # Now the thread alone has it.
began.wait(30)
print("exit", flush=True)
"""


@pytest.mark.parametrize("where", ["argument", "local", "end"])
def test_the_interpreter_waits_until_a_thread_has_let_go_of_everything(where: str) -> None:
    """Its function has returned long since; torch's code under way would abort the process."""
    assert run_python(f"WHERE = {where!r}\n{_LAST_STEP}") == ["exit", "let go"]


_ONE_FAILS = """
import sys, threading
from precast.breakable import EndingThread
for number in range(4):
    leave = threading.Event()
    def work(leave=leave):
        leave.wait()
        sys.stdout.write("ended" + chr(10))
    def end(_, leave=leave, number=number):
        if number == 1:
            leave.set()
            raise KeyboardInterrupt
        leave.set()
    EndingThread(work, name="a", end=end).start()
"""


def test_all_are_ended_though_one_cannot_be() -> None:
    assert run_python(_ONE_FAILS) == ["ended"] * 4


def test_a_thread_that_has_ended_keeps_nothing() -> None:
    class Kept:
        pass

    kept = Kept()
    gone = weakref.ref(kept)
    thread = EndingThread(lambda _: None, kept, name="a", end=lambda _, kept=kept: None)
    thread.start()
    del kept
    thread.join(20)
    assert gone() is None
    thread.end(0)
