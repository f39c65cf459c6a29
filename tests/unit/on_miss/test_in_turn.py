"""One compile for all: what several processes miss at once, one of them compiles."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from precast.cache import DiskCache
from precast.cache.trust import NO_KEYS, Trust
from precast.events import ArtifactPublished, LeaseAwaited, PieceCompiled, TierFailed
from unit.compilers.example_pieces import TINY
from unit.planted_manager import TIMEOUT, Planted, Setup, SlowService, X, refusal


def slow_setup(root: Path, takes_s: float, answer: Any = None, **settings: Any) -> Setup:
    setup = Setup(root, Planted(), **settings)
    setup.service = SlowService(setup.service.compiler, answer, takes_s)
    return setup


def in_thread(setup: Setup) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.extend(setup.manager.compile([TINY], ["tiny"]))
    )
    thread.start()
    return thread, results


def outcomes(setup: Setup) -> list[str]:
    return [event.outcome for event in setup.events if isinstance(event, LeaseAwaited)]


def test_what_another_compiles_is_waited_for_and_loaded(tmp_path: Path) -> None:
    first, second = slow_setup(tmp_path, 0.5), slow_setup(tmp_path, 0.0)
    thread, mine = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    thread.join()
    assert result.from_cache
    assert result.call(X)[0].sum() == 12
    assert mine[0].call(X)[0].sum() == 12
    assert second.service.jobs == []
    assert outcomes(second) == ["found"]
    assert list((tmp_path / "v1" / "lease").iterdir()) == []


def test_a_failure_of_another_is_not_repeated(tmp_path: Path) -> None:
    first, second = slow_setup(tmp_path, 0.5, refusal("compile-failed")), slow_setup(tmp_path, 0.0)
    thread, _ = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    thread.join()
    assert second.service.jobs == []
    assert result.reason is not None
    assert "remembered" in result.reason.message
    assert outcomes(second) == ["found"]


def test_nobody_waits_longer_than_allowed(tmp_path: Path) -> None:
    """
    Then it compiles for itself, and what was published meanwhile is not published again.
    """
    first = slow_setup(tmp_path, 1.0)
    second = slow_setup(tmp_path, 2.0, lease_wait=0.2)
    thread, _ = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    thread.join()
    assert outcomes(second) == ["gave up"]
    assert len(second.service.jobs) == 1
    assert result.from_cache
    assert second.kinds(ArtifactPublished, PieceCompiled) == []


def test_what_a_dead_holder_left_is_taken_over(tmp_path: Path) -> None:
    setup = slow_setup(tmp_path, 0.0)
    leases = DiskCache(tmp_path).leases
    assert leases is not None
    work = setup.manager.compilers.work_name(TINY)
    assert leases.try_acquire(work, "dead", 0.5)
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert outcomes(setup) == ["taken over"]
    assert not result.from_cache
    assert result.call(X)[0].sum() == 12


def test_a_place_for_leases_that_is_away_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "lease").write_text("a file where the folder should be")
    setup = Setup(tmp_path, Planted())
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.call(X)[0].sum() == 12
    assert setup.kinds(TierFailed) == ["TierFailed"]


def test_closing_ends_the_waiting(tmp_path: Path) -> None:
    setup = slow_setup(tmp_path, 0.0)
    leases = DiskCache(tmp_path).leases
    assert leases is not None
    assert leases.try_acquire(setup.manager.compilers.work_name(TINY), "other", 600.0)
    thread, results = in_thread(setup)
    time.sleep(0.2)
    setup.manager.close()
    thread.join(10)
    assert not thread.is_alive()
    assert results[0].compiler == "eager"
    leases.release(setup.manager.compilers.work_name(TINY), "other")


def test_one_of_several_has_its_turn(tmp_path: Path) -> None:
    """
    The others get what it made; where it leaves nothing, they do not wait one after the other.
    """
    managers = [Setup(tmp_path, Planted()).manager for _ in range(3)]
    made: list[int] = []
    turns: list[str] = []

    def take(i: int, makes: bool) -> None:
        work = "work-1" if makes else "work-2"
        with managers[i].turn(work, lambda: bool(made), lambda: made[0] if made else None) as found:
            turns.append("found" if found is not None else "did it")
            if found is None:
                time.sleep(0.5)
                if makes:
                    made.append(i)
                else:
                    managers[i].failures.remember(work, TIMEOUT.reason, ("capture-failed",))

    for makes, expected in ((True, ["did it", "found", "found"]), (False, ["did it"] * 3)):
        made.clear()
        turns.clear()
        started = time.monotonic()
        threads = [threading.Thread(target=take, args=(i, makes)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert turns == expected
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("trust", [NO_KEYS, Trust(allow_unsigned=True)], ids=["none", "unsigned"])
def test_nobody_waits_for_what_may_not_be_used(tmp_path: Path, trust: Trust) -> None:
    """
    Without keys, or with pickles that nobody signed, what others publish is refused: a fleet
    would do the same work one process after the other.
    """
    shared = tmp_path / "shared"

    def setup(name: str, takes_s: float) -> Setup:
        return slow_setup(tmp_path / name, takes_s, shared=shared, trust=trust)

    setup("before", 0.0).manager.compile([TINY], ["tiny"])
    first, second = setup("first", 2.0), setup("second", 0.0)
    thread, mine = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    assert not mine, "it was not waited for"
    thread.join()
    assert len(second.service.jobs) == 1
    assert result.call(X)[0].sum() == 12
    assert outcomes(second) == []


def test_who_holds_the_lease_of_a_whole_waits_for_no_part(tmp_path: Path) -> None:
    """
    Two that wait for parts which the other one holds would wait until they give up.
    """
    setup = slow_setup(tmp_path, 0.0)
    leases = DiskCache(tmp_path).leases
    assert leases is not None
    assert leases.try_acquire(setup.manager.compilers.work_name(TINY), "other", 600.0)
    [result] = setup.manager.compile([TINY], ["tiny"], may_wait=False)
    leases.release(setup.manager.compilers.work_name(TINY), "other")
    assert result.call(X)[0].sum() == 12
    assert len(setup.service.jobs) == 1
    assert outcomes(setup) == []
