"""Statistics: counts of many processes in files that nothing can spoil, and that spoil nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast import events
from precast.errors import Reason
from precast.monitoring import stats
from precast.monitoring.stats import StatsListener, add_up, read_stats
from precast.testing import every_fault

REASON = Reason("tier-failed", "no route to host", "Check it")
NOW_S = 1_700_000_000.0  # 2023-11-14, 22:13 UTC.
DAY = "2023-11-14.jsonl"


def ready(*, warm: bool = True) -> events.ModelReady:
    return events.ModelReady("m", 0.02, 3, 1, 3, 0, 1, 30.0, warm)


def no_cause(misses: list[dict[str, Any]]) -> None:
    """Explain nothing."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the place of the statistics; the folder that holds it is there."""
    return tmp_path / "stats"


MakeListener = Callable[..., StatsListener]


@pytest.fixture
def make_listener(folder: Path) -> MakeListener:
    """Return what makes a listener whose clocks stand still unless others are given."""

    def make(**arguments: Any) -> StatsListener:
        defaults: dict[str, Any] = {"clock": lambda: 0.0, "now": lambda: NOW_S}
        return StatsListener(
            str(folder), arguments.pop("explain", no_cause), **defaults | arguments
        )

    return make


def test_a_start_is_one_line_with_what_happened(folder: Path, make_listener: MakeListener) -> None:
    listener = make_listener()
    listener(events.CacheHit("key-0", "redis", 0.001, 500))
    listener(events.CacheHit("key-0", "disk", 0.001, 500))  # Looked up again: no second hit.
    listener(events.PieceLoaded("p", "k", "cache", 0.001, 30.0))
    listener(events.TierFailed("s3", "read manifest", REASON))
    assert not folder.exists()  # Nothing before the start is over.
    listener(ready())
    (line,) = read_stats(str(folder))
    assert line["at"] == NOW_S
    assert line["pid"] == os.getpid()
    assert line["counts"] == {
        "hits": {"redis": {"count": 1, "bytes": 500, "seconds": 0.001}},
        "loads": {"count": 1, "seconds": 0.001},
        "reasons": {"tier-failed": 1},
        "seconds_saved": 30.0,
        "starts": {"warm": {"count": 1, "seconds": 0.02}},
    }
    assert line["misses"] == []
    assert (folder.stat().st_mode & 0o777, (folder / DAY).stat().st_mode & 0o777) == (0o700, 0o600)


def test_misses_are_counted_by_cause_and_kept_without_their_parts(
    folder: Path, make_listener: MakeListener
) -> None:
    def explain(misses: list[dict[str, Any]]) -> None:
        assert [miss["parts"] for miss in misses] == [{"torch": "2.13"}, {"model": "m"}]
        misses[0]["cause"] = "torch"

    listener = make_listener(explain=explain)
    listener(events.PieceMissed("piece_0", "key", {"torch": "2.13"}))
    listener(events.AssemblyMissed("m", "other", {"model": "m"}, None))
    listener(events.PieceMissed("piece_0", "key", {"torch": "2.13"}))  # Looked up again.
    listener(events.PieceCompiled("piece_0", "key", "aot_inductor", 10.0, 1000, 1))
    listener(events.ArtifactPublished("key", "disk", 1100, 0.1))
    listener(ready(warm=False))
    (line,) = read_stats(str(folder))
    assert line["counts"]["misses"] == {"piece": {"torch": 1}, "assembly": {"not explained": 1}}
    assert line["counts"]["compiles"] == {"count": 1, "seconds": 10.0, "bytes": 1000}
    assert line["counts"]["published"] == {"disk": {"count": 1, "bytes": 1100}}
    assert line["misses"][0] == {
        "kind": "piece",
        "name": "piece_0",
        "key": "key",
        "problem": None,
        "cause": "torch",
    }


def test_lines_add_up(folder: Path, make_listener: MakeListener) -> None:
    for listener in (make_listener(), make_listener()):
        listener(events.CacheHit("key-0", "disk", 0.001, 500))
        listener(ready())
        listener(ready(warm=False))
    total = add_up(read_stats(str(folder)))
    assert total["hits"] == {"disk": {"count": 2, "bytes": 1000, "seconds": 0.002}}
    assert {kind: n["count"] for kind, n in total["starts"].items()} == {"warm": 2, "cold": 2}


def test_a_busy_model_writes_once_a_minute(folder: Path, make_listener: MakeListener) -> None:
    seconds = 0.0
    listener = make_listener(clock=lambda: seconds)
    for seconds in (1.0, 30.0, 59.0):  # noqa: B007 - the clock reads it.
        listener(events.TierFailed("s3", "read manifest", REASON))
    assert not folder.exists()
    seconds = 61.0
    listener(events.TierFailed("s3", "read manifest", REASON))
    assert [line["counts"] for line in read_stats(str(folder))] == [{"reasons": {"tier-failed": 4}}]


@pytest.mark.parametrize(
    "damage",
    [b'{"format":1,"at":1,"cou', b"\xff\x00", b"[]", b'{"format":2}', b"[" * 100_000],
    ids=["half", "no text", "no object", "other format", "deep"],
)
def test_a_spoilt_line_spoils_only_itself(
    folder: Path, make_listener: MakeListener, damage: bytes
) -> None:
    make_listener()(ready())
    with (folder / DAY).open("ab") as file:
        file.write(damage)
    make_listener()(ready())
    assert len(list(read_stats(str(folder)))) == 2


@pytest.mark.parametrize(
    "obstacle", ["no cache", "a file", "a link", "a folder for a file", "open to others"]
)
def test_what_cannot_be_written_is_not(
    tmp_path: Path, make_listener: MakeListener, folder: Path, obstacle: str
) -> None:
    if obstacle == "no cache":
        folder = tmp_path / "nowhere" / "v1" / "stats"
    elif obstacle == "open to others":
        tmp_path.chmod(0o777)
    elif obstacle == "a file":
        folder.write_text("mine")
    elif obstacle == "a link":
        folder.mkdir()
        (folder / DAY).symlink_to(tmp_path / "elsewhere")
    else:
        (folder / DAY).mkdir(parents=True)
    listener = StatsListener(str(folder), no_cause, now=lambda: NOW_S)
    listener(ready())
    listener(ready())
    assert list(read_stats(str(folder))) == []
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_no_failing_file_operation_reaches_the_model(tmp_path: Path) -> None:
    """
    Nor does it keep the next process from writing whole lines.
    """
    for fault in every_fault():
        (tmp_path / str(fault.n)).mkdir()
        folder = tmp_path / str(fault.n) / "stats"
        with fault:
            StatsListener(str(folder), no_cause)(ready())
        StatsListener(str(folder), no_cause)(ready())
        assert len(list(read_stats(str(folder)))) in (1, 2)


def test_old_days_are_removed_with_a_new_days_first_line(
    folder: Path, make_listener: MakeListener
) -> None:
    folder.mkdir()
    for name in ("2023-08-15.jsonl", "2023-08-17.jsonl", "mine.txt"):  # 91 and 89 days ago.
        (folder / name).write_text("")
    make_listener()(ready())
    assert sorted(path.name for path in folder.iterdir()) == ["2023-08-17.jsonl", DAY, "mine.txt"]


def test_a_days_file_has_a_bound(
    folder: Path, make_listener: MakeListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "MAX_FILE_BYTES", 1000)
    for _ in range(20):
        make_listener()(ready())
    assert 1000 <= (folder / DAY).stat().st_size < 1400


def test_only_days_in_question_are_read(folder: Path, make_listener: MakeListener) -> None:
    make_listener(now=lambda: NOW_S - 86400)(ready())
    make_listener()(ready())
    assert len(list(read_stats(str(folder), NOW_S - 3600))) == 1
    assert len(list(read_stats(str(folder)))) == 2


PROGRAM = """
import os, signal, sys
from precast import events
from precast.monitoring.stats import StatsListener
listener = StatsListener(sys.argv[1], lambda misses: None)
failed = events.TierFailed("s3", "read", __import__("precast.errors").errors.Reason(
    "tier-failed", "m", "r"))
ready = events.ModelReady("m", 0.02, 3, 1, 3, 0, 1, 30.0, True)
"""


def run(folder: Path, program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM + program, str(folder)])


def test_what_is_left_is_written_at_exit_and_once(folder: Path) -> None:
    """
    A fork ends with the parent's counts in its memory; they are not its own.
    """
    program = "listener(failed)\nif os.fork() == 0: sys.exit()\nos.wait()"
    assert run(folder, program).wait() == 0
    assert [line["counts"] for line in read_stats(str(folder))] == [{"reasons": {"tier-failed": 1}}]


def test_a_killed_process_loses_only_what_came_after_its_start(folder: Path) -> None:
    program = "listener(ready); listener(failed); os.kill(os.getpid(), signal.SIGKILL)"
    assert run(folder, program).wait() == -9
    assert [set(line["counts"]) for line in read_stats(str(folder))] == [
        {"seconds_saved", "starts"}
    ]


def test_many_processes_write_at_once_without_mixing_lines(folder: Path) -> None:
    processes = [run(folder, "for _ in range(300): listener(ready)") for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    (path,) = folder.iterdir()
    lines = [line for line in path.read_bytes().splitlines() if line]
    assert len(lines) == 1200
    assert all(json.loads(line)["format"] == 1 for line in lines)
    assert add_up(read_stats(str(folder)))["starts"]["warm"]["count"] == 1200
