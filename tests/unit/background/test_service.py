from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from precast.background import service as service_module
from precast.background import worker
from precast.background.service import CompileService
from precast.compilers.job import CompileJob
from precast.errors import (
    CompileCrashedError,
    CompileMemoryError,
    CompileTimeoutError,
    CompileUnavailableError,
)
from precast.events import CompileStarted, Event, JobFinished
from unit.compilers.example_pieces import TINY

PLANTED = "unit.background.planted:"
COLD = {"PRECAST_WORKER_WARM": "0"}  # Planted compilers do not need Inductor.


@pytest.fixture(scope="module")
def service() -> Iterator[CompileService]:
    with CompileService(1, timeout_s=60, environment=COLD) as service:
        yield service


def job(tmp_path: Path, *compilers: str) -> CompileJob:
    return CompileJob(
        piece=TINY.to_json(),
        compilers=tuple(PLANTED + name if name[0].isupper() else name for name in compilers),
        directory=str(tmp_path / "job"),
        name="tiny",
    )


def test_a_piece_comes_back_verified(service: CompileService, tmp_path: Path) -> None:
    result = service.submit(job(tmp_path, "eager")).result()

    assert result.compiler == "eager"
    assert result.verify is not None and result.verify["max_abs_error"] == 0
    assert result.verify["sizes"]
    assert result.worker_pid != os.getpid()


def test_what_a_compiler_prints_does_not_disturb_answers(
    service: CompileService, tmp_path: Path
) -> None:
    assert service.submit(job(tmp_path, "Noisy")).result().compiler == PLANTED + "Noisy"


def test_the_next_compiler_is_tried_when_one_fails(service: CompileService, tmp_path: Path) -> None:
    result = service.submit(job(tmp_path, "Raising", "Wrong", "eager")).result()

    assert result.compiler == "eager"
    assert [failure.code for failure in result.failures] == ["compile-failed", "verify-mismatch"]
    assert "no such luck" in result.failures[0].message


def test_a_piece_that_cannot_be_compiled_for_sizes_0_and_1_is_compiled_for_the_others(
    service: CompileService, tmp_path: Path
) -> None:
    result = service.submit(job(tmp_path, "RefusingSmallSizes")).result()

    assert result.failures == ()
    assert result.details["ranges"] == {name: [2, r.high] for name, r in TINY.symbols.items()}
    assert result.verify is not None
    assert min(size for row in result.verify["sizes"] for size in row.values()) == 2


def test_a_worker_whose_device_broke_is_replaced(service: CompileService, tmp_path: Path) -> None:
    first = service.submit(job(tmp_path, "eager")).result()
    result = service.submit(job(tmp_path, "BreakingTheDevice")).result()

    assert result.worker_pid != first.worker_pid
    assert result.compiler == PLANTED + "BreakingTheDevice"
    assert all(low == 1 for low, _ in result.details["ranges"].values())


def test_a_piece_that_every_compiler_refuses_says_why(
    service: CompileService, tmp_path: Path
) -> None:
    result = service.submit(job(tmp_path, "Raising")).result()

    assert result.compiler is None
    assert len(result.failures) == 1


def test_code_that_is_wrong_only_when_empty_is_kept_for_other_sizes(
    service: CompileService, tmp_path: Path
) -> None:
    result = service.submit(job(tmp_path, "WrongWhenEmpty")).result()

    assert result.compiler == PLANTED + "WrongWhenEmpty"
    assert result.details["ranges"] == {"s0": [1, None]}


def test_a_worker_that_crashes_is_replaced_and_its_job_tried_again(
    service: CompileService, tmp_path: Path
) -> None:
    before = service.submit(job(tmp_path / "before", "eager")).result().worker_pid
    result = service.submit(job(tmp_path, "AbortingOnce")).result()

    assert result.compiler == PLANTED + "AbortingOnce"
    assert result.worker_pid != before


def test_a_compiler_that_always_crashes_is_given_up_for_the_next(
    service: CompileService, tmp_path: Path
) -> None:
    result = service.submit(job(tmp_path, "Aborting", "eager")).result()

    assert result.compiler == "eager"
    assert [failure.code for failure in result.failures] == ["compile-crashed"]


def test_a_crash_names_the_signal(service: CompileService, tmp_path: Path) -> None:
    with pytest.raises(CompileCrashedError) as caught:
        service.submit(job(tmp_path, "Aborting")).result()

    assert caught.value.signal == 6


def test_an_allocation_beyond_the_limit_is_a_reason_of_its_own(tmp_path: Path) -> None:
    with CompileService(1, memory_bytes=8 << 30, environment=COLD) as service:
        result = service.submit(job(tmp_path, "Greedy")).result()

    assert result.failures[0].code == "compile-memory"


def test_closing_ends_workers_at_once(tmp_path: Path) -> None:
    events: list[Event] = []
    service = CompileService(1, emit=events.append, environment=COLD)
    running = service.submit(job(tmp_path, "Hanging"))
    waiting = service.submit(job(tmp_path / "next", "eager"))
    while not any(isinstance(event, CompileStarted) for event in events):
        time.sleep(0.05)
    started = time.monotonic()
    service.close()

    assert time.monotonic() - started < 10
    assert running.exception() is not None
    assert waiting.cancelled()
    with pytest.raises(RuntimeError):
        service.submit(job(tmp_path, "eager"))


def test_a_worker_may_die_at_any_stage(tmp_path: Path) -> None:
    """Before it is ready, while its code is tried, after it has answered: one retry each."""
    events: list[Event] = []
    with CompileService(1, environment=COLD, emit=events.append) as service:
        service.prestart()
        while not service._workers:
            time.sleep(0.01)
        os.kill(service._workers[0].pid, signal.SIGKILL)
        first = service.submit(job(tmp_path / "1", "eager")).result()
        second = service.submit(job(tmp_path / "2", "DyingWhenTried")).result()
        os.kill(second.worker_pid, signal.SIGKILL)
        third = service.submit(job(tmp_path / "3", "eager")).result()

    assert [r.compiler for r in (first, second, third)] == [
        "eager",
        PLANTED + "DyingWhenTried",
        "eager",
    ]
    assert len({r.worker_pid for r in (first, second, third)}) == 3
    finished = [event for event in events if isinstance(event, JobFinished)]
    assert [event.code for event in finished] == [None, None, None]
    assert finished[1].attempts == 2


def test_memory_is_counted_over_all_processes_of_a_worker(tmp_path: Path) -> None:
    """Worker and child stay below the limit each; together they do not."""
    events: list[Event] = []
    limit = 1 << 30
    with CompileService(1, memory_bytes=limit, environment=COLD, emit=events.append) as service:
        with pytest.raises(CompileMemoryError) as caught:
            service.submit(job(tmp_path, "GreedyAndSlow")).result()
        pids = {w.pid for w in service._workers}
        assert service.submit(job(tmp_path / "next", "eager")).result().compiler == "eager"

    assert not any(map(is_running, pids))
    assert caught.value.limit_bytes == limit
    assert caught.value.peak_bytes is not None
    assert limit < caught.value.peak_bytes < 2 * limit
    failed, done = [event for event in events if isinstance(event, JobFinished)]
    assert (failed.code, failed.peak_bytes) == ("compile-memory", caught.value.peak_bytes)
    assert failed.seconds > 0
    assert failed.cpu_seconds is not None and failed.cpu_seconds > 0
    assert (done.code, done.compiler) == (None, "eager")
    assert done.written_bytes is not None and done.written_bytes > 0


def test_workers_start_clean_and_share_the_gpus_among_them(tmp_path: Path) -> None:
    """
    A new program in a session of its own, with no descriptor but its pipes, of low priority, its
    children too. Each worker sees one GPU, in turn.
    """
    with (tmp_path / "held open").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        with CompileService(2, environment=COLD, devices=("3", "GPU-5")) as service:
            running = [service.submit(job(tmp_path / n, "Reporting")) for n in "ab"]
            found = [future.result().details["found"] for future in running]

    assert {entry["devices"] for entry in found} == {"3", "GPU-5"}
    for entry in found:
        assert entry["is_leader"]
        assert entry["command"] == ["-m", "precast.background.child", "precast.background.worker"]
        assert not [name for name in entry["descriptors"] if "held open" in name]
        assert entry["nice"] == entry["nice_of_child"] == os.nice(0) + 5


def test_a_hung_compile_is_gone_two_seconds_after_its_time(tmp_path: Path) -> None:
    """
    Two seconds on a machine that has time; a busy one gets some more.
    """
    started: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, CompileStarted):
            started.append(time.monotonic())

    with CompileService(1, timeout_s=3, environment=COLD, emit=note) as service:
        with pytest.raises(CompileTimeoutError):
            service.submit(job(tmp_path, "Hanging")).result()
        took = time.monotonic() - started[0]
        # Unverified: to import torch may take a busy machine as long as this service allows.
        following = job(tmp_path / "next", "eager").replace(verify=False)
        assert service.submit(following).result().compiler == "eager"
    child = int(next((tmp_path / "job").rglob("child")).read_text())

    assert not is_running(child)
    assert took < 3 + 2 + 4


def test_a_job_that_prepares_is_not_cut_off_by_a_low_limit(tmp_path: Path) -> None:
    """Of two that take as long, the one that cuts a piece, say, comes to its end."""
    with CompileService(1, timeout_s=1, environment=COLD) as service:
        slow = job(tmp_path, "Unhurried").replace(verify=False)
        preparing = slow.replace(is_reported=False, directory=str(tmp_path / "preparing"))
        assert service.submit(preparing).result().compiler == PLANTED + "Unhurried"
        with pytest.raises(CompileTimeoutError):
            service.submit(slow).result()


def test_a_limit_beyond_what_an_alarm_takes_is_no_limit(tmp_path: Path) -> None:
    """`max_compile_time` says: give a large number to wait without a limit in practice."""
    with CompileService(1, timeout_s=1e12, environment=COLD) as service:
        following = job(tmp_path, "eager").replace(verify=False)
        assert service.submit(following).result().compiler == "eager"


class Worker:
    """A worker in no process, which answers every job at once."""

    num_to_fail = 0
    pid = os.getpid()
    is_alive = True

    def __init__(self, *_: object) -> None:
        self.requests: list[Mapping[str, Any]] = []
        self.is_ended = False
        if Worker.num_to_fail:
            Worker.num_to_fail -= 1
            raise OSError(24, "Too many open files")

    def wait_until_ready(self, *_: object) -> bool:
        return True

    def send(self, request: Mapping[str, Any]) -> None:
        self.requests.append(request)

    def receive(self, *_: object) -> dict[str, Any]:
        request = self.requests[-1]
        return {"id": request["id"], "compiler": request["compilers"][0], "failures": []}

    def end(self) -> None:
        self.is_ended = True

    kill = end

    def remove_folder(self, _: float) -> None:
        pass


@pytest.fixture
def planted_workers(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    monkeypatch.setattr(service_module, "WorkerProcess", Worker)
    monkeypatch.setattr(Worker, "num_to_fail", 0)
    return Worker


def test_a_worker_that_cannot_be_started_fails_its_job_and_no_other(
    tmp_path: Path, planted_workers: type[Worker]
) -> None:
    """At the start of its thread and for the first job; the second finds one."""
    planted_workers.num_to_fail = 2
    with CompileService(1) as service:
        first, second = (service.submit(job(tmp_path, "eager")) for _ in range(2))
        with pytest.raises(CompileUnavailableError, match="Too many open files"):
            first.result(60)
        assert second.result(60).compiler == "eager"
        assert len(service._threads) == 1


def test_a_job_ends_where_no_thread_can_be_started(
    tmp_path: Path, planted_workers: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with CompileService(2) as service:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            service.prestart()
            failed = service.submit(job(tmp_path, "eager"))
        with pytest.raises(CompileUnavailableError, match="new thread"):
            failed.result(60)
        assert service.submit(job(tmp_path, "eager")).result(60).compiler == "eager"


def test_a_listener_that_ends_its_thread_ends_a_job_alone(
    tmp_path: Path, planted_workers: type[Worker]
) -> None:
    """The worker may be at that job still, and is not asked for the next."""
    num_told = 0

    def leave_once(event: Event) -> None:
        nonlocal num_told
        num_told += 1
        if num_told == 1:
            raise SystemExit(3)

    with CompileService(1, emit=leave_once) as service:
        with pytest.raises(CompileUnavailableError, match="SystemExit"):
            service.submit(job(tmp_path, "eager")).result(60)
        assert service.submit(job(tmp_path, "eager")).result(60).compiler == "eager"
        [worker] = service._workers
        assert len(worker.requests) == 1  # type: ignore[attr-defined]


def test_a_listener_may_close_the_service(tmp_path: Path, planted_workers: type[Worker]) -> None:
    """It is told from the service's own thread, which cannot wait for itself."""
    errors: list[BaseException] = []

    def close(event: Event) -> None:
        try:
            service.close()
        except BaseException as error:
            errors.append(error)
            raise

    service = CompileService(1, emit=close)
    service.submit(job(tmp_path, "eager")).exception(60)
    assert errors == []
    service._threads[0].join(60)
    assert service._workers == []


def test_a_worker_that_never_gets_ready_ends_its_job(
    tmp_path: Path, planted_workers: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "wait_until_ready", lambda *_: False)
    with CompileService(1) as service:
        with pytest.raises(CompileUnavailableError, match="not ready"):
            service.submit(job(tmp_path, "eager")).result(60)
        assert service._workers == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    """What is wrong stands at the beginning; torch goes on with lists of kernels."""
    message = worker._failure("compiler", RuntimeError("the cause" + "x" * 9000 + "the end"))
    text = message["message"]
    assert text.startswith("RuntimeError: the cause")
    assert text.endswith("the end")
    assert len(text) < 2100
