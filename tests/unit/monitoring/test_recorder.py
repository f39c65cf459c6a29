"""The recorder keeps events with their times, bounded; its recording is data that can be read."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from precast import events
from precast.errors import Reason, RecordingError
from precast.monitoring.recorder import MOST_EVENTS, Recorder, resident_bytes
from precast.monitoring.recording import (
    FORMAT,
    RecordingWriter,
    newest_of,
    plain,
    read_recording,
    recording_of,
    write_recording,
)

REASON = Reason("compile-failed", "refused", "Nothing to do", "model.py:3")
DEEP = b"[" * 60 + b"]" * 60


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_events_are_kept_with_their_times() -> None:
    clock = Clock()
    recorder = Recorder(clock, lambda: 1_700_000_000.0)
    clock.now += 1.5
    recorder(events.ModelReleased("m"))
    assert recorder.events() == [(1.5, events.ModelReleased("m"))]
    assert recorder.opened_at == 1_700_000_000.0
    assert recorder.seconds() == 1.5
    assert recorder.num_dropped == 0


def test_what_is_kept_has_a_bound_and_both_ends() -> None:
    recorder = Recorder(Clock())
    for number in range(3 * MOST_EVENTS):
        recorder(events.SlotSwapped("m", number, "eager"))
    kept = [event.slot for _, event in recorder.events() if isinstance(event, events.SlotSwapped)]
    assert kept == [*range(MOST_EVENTS), *range(2 * MOST_EVENTS, 3 * MOST_EVENTS)]
    assert recorder.num_dropped == MOST_EVENTS


def test_threads_lose_no_event() -> None:
    recorder = Recorder()

    def emit() -> None:
        for _ in range(200):
            recorder(events.ModelReleased("m"))

    threads = [threading.Thread(target=emit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.events()) == 1600
    assert recorder.num_dropped == 0


def test_memory_is_measured_at_the_beginning_and_when_ready() -> None:
    recorder = Recorder()
    recorder(events.ModelReady("m", 1.0, 3, 2, 3, 0, 0, 0.0, True))
    size = resident_bytes()
    if size is None:
        pytest.skip("this system does not say what a process holds")
    assert size > 1 << 20
    assert len(recorder.memory()) == 2
    assert all((found or 0) > 1 << 20 for _, found in recorder.memory())


def test_a_recording_is_plain_data_with_a_version(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder(events.FellBack("m", None, REASON))
    recorder(events.PieceMissed("p", "k", {"compiler": {"version": "1"}, "odd": {1, 2}}))
    recorder(events.PieceVerified("p", "k", float("nan")))
    recorder.save(tmp_path / "start.json")
    found = read_recording(tmp_path / "start.json")
    assert (found["kind"], found["format"]) == ("precast-recording", FORMAT)
    assert found["model"] is None
    first, second, third = found["events"]
    assert first["event"] == "FellBack"
    assert first["reason"] == REASON.as_dict()
    assert second["parts"] == {"compiler": {"version": "1"}, "odd": [1, 2]}
    assert third["max_abs_error"] == "nan"  # JSON has no word for it.


def test_every_event_becomes_json() -> None:
    """So that an event with a field of a new kind cannot spoil a recording."""
    recorder = Recorder()
    for kind in events.Event.__subclasses__():
        recorder(kind(**dict.fromkeys(kind.__match_args__, REASON)))
    found = json.loads(json.dumps(recording_of(recorder), allow_nan=False))
    assert len(found["events"]) == len(events.Event.__subclasses__())


def test_what_json_does_not_know_becomes_text() -> None:
    assert plain({1: (Path("a"), object)})["1"] == ["a", "<class 'object'>"]
    assert plain(float("inf")) == "inf"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no recording"),
        (b'{"kind": "manifest"}', "no recording"),
        (b'{"kind": "precast-recording", "format": 99}', "format 99"),
        (b'{"kind": "precast-recording", "format": 1, "model": %b}' % DEEP, "40 levels deep"),
    ],
)
def test_what_is_no_recording_is_refused_in_words(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=problem):
        read_recording(path)


def test_a_file_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="No such file"):
        read_recording(tmp_path / "a.json")
    with pytest.raises(RecordingError, match="holds no recordings"):
        newest_of(tmp_path)


def test_a_recording_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_recording(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_recording(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_writer_writes_once_ready_and_again_at_the_end(tmp_path: Path) -> None:
    """
    A released model has nothing to show: its recording keeps how it was before.
    """
    recorder = Recorder()
    failures: list[Exception] = []
    writer = RecordingWriter(
        tmp_path / "new", "My/Model", recorder, lambda _, error: failures.append(error)
    )
    states = [{"model": "My/Model"}, None]
    writer.portray_with(lambda: states.pop(0))
    for event in (
        events.ModelReady("m", 1.0, 3, 2, 3, 0, 0, 0.0, True),
        events.ModelReleased("m"),
    ):
        recorder(event)
        writer(event)
        if isinstance(event, events.ModelReady):
            writer._pen.finish()  # What its timer does, a moment later.
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("My-Model-")
    found = read_recording(path)
    assert [event["event"] for event in found["events"]] == ["ModelReady", "ModelReleased"]
    assert found["model"] == {"model": "My/Model"}
    assert failures == []


@pytest.mark.parametrize(
    "event",
    [
        events.PieceLoaded("p", "k", "cache", 0.1, 3.0),
        events.PieceFailed("p", "k", "aot_inductor", REASON),
        events.FellBack("m", None, REASON),
    ],
)
def test_a_writer_does_not_wait_for_the_end(tmp_path: Path, event: events.Event) -> None:
    """
    A start that hangs or is killed shall leave a recording, too. Written by its own thread.
    """
    recorder = Recorder()
    writer = RecordingWriter(tmp_path, "m", recorder, lambda _, error: pytest.fail(str(error)))
    recorder(event)
    writer(event)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (found,) = read_recording(newest_of(tmp_path))["events"]
    assert found["event"] == type(event).__name__


def test_the_later_of_two_that_write_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer may be on its way to the disk with what it knew when the model is released."""
    recorder = Recorder()
    writer = RecordingWriter(tmp_path, "m", recorder, lambda _, error: pytest.fail(str(error)))
    is_writing, is_released = threading.Event(), threading.Event()

    def write_slowly(path: Path, recording: dict[str, Any]) -> None:
        if not is_writing.is_set():
            is_writing.set()
            is_released.wait(1)
        write_recording(path, recording)

    monkeypatch.setattr("precast.monitoring.recording.write_recording", write_slowly)
    timer = threading.Thread(target=writer._pen._write)
    timer.start()
    is_writing.wait()
    recorder(events.ModelReleased("m"))
    writer(events.ModelReleased("m"))
    is_released.set()
    timer.join()
    (found,) = read_recording(newest_of(tmp_path))["events"]
    assert found["event"] == "ModelReleased"


def test_a_recording_of_a_released_model_is_the_users_to_remove(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, "m", Recorder(), lambda _, error: pytest.fail(str(error)))
    writer(events.ModelReleased("m"))
    newest_of(tmp_path).unlink()
    del writer
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_newest_recording_is_found_beside_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecordingError, match="holds no recordings"):
        newest_of(tmp_path)
    Recorder().save(tmp_path / "here.json")
    assert newest_of(tmp_path).name == "here.json"


def test_a_writer_that_cannot_write_says_so_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failures: list[str] = []
    writer = RecordingWriter(
        tmp_path / "file", "m", Recorder(), lambda _, error: failures.append(str(error))
    )
    writer(events.ModelReleased("m"))
    writer(events.ModelReleased("m"))
    assert failures == [
        f"{tmp_path / 'file'} cannot be written: File exists; nothing was written. "
        "Name a folder that is there and may be written."
    ]
