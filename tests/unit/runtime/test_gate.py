from __future__ import annotations

import threading
import time

from precast.runtime.gate import CallGate


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

    staying = threading.Thread(target=stay)
    staying.start()
    waiting = threading.Thread(target=wait_alone)
    waiting.start()
    time.sleep(0.05)
    with gate:
        pass
    called_off.set()
    waiting.join()
    assert outcome == [False]
    with gate:
        leave.set()
    staying.join()
