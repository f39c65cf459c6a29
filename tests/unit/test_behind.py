"""Who works behind calls gives way, and nobody else waits."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from precast import behind


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every pause, in place of the pause itself."""
    found: list[float] = []
    monkeypatch.setattr(behind.time, "sleep", found.append)
    return found


def test_a_thread_that_serves_does_not_pause(pauses: list[float]) -> None:
    behind.give_way()
    assert pauses == []


def test_a_thread_that_works_behind_pauses_and_no_other(pauses: list[float]) -> None:
    def work() -> None:
        behind.work_behind()
        behind.give_way()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    behind.give_way()
    assert len(pauses) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="threads have such names on Linux")
def test_compiled_code_can_tell_such_a_thread_by_its_name() -> None:
    def own_name() -> str:
        return Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()

    names = []

    def work() -> None:
        behind.work_behind()
        names.append(own_name())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [behind.NAME]
    assert own_name() != behind.NAME
