"""Log lines: one a model, one a piece, and a warning once per cause."""

from __future__ import annotations

import logging

import pytest

from precast import events
from precast.errors import Reason, RecordingUnwritableError
from precast.monitoring.log import LogListener, describe_ready

READY = events.ModelReady("Decoder", 41.2, 33, 3, 31, 2, 2, 80.0, warm=False)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="precast")
    return caplog


def test_a_model_gets_one_line_in_plain_speech(lines: pytest.LogCaptureFixture) -> None:
    LogListener()(READY)
    assert [(r.levelname, r.getMessage()) for r in lines.records] == [
        (
            "INFO",
            "Decoder: compiled 31 of 33 pieces (2 stay eager), 3 different: "
            "2 from cache, 1 new; 41.2 s",
        )
    ]


def test_a_warm_start_says_what_it_saved() -> None:
    warm = READY.replace(seconds=0.0123, compiled=33, eager=0, warm=True)
    assert describe_ready(warm) == (
        "ready in 12 ms from cache, 33 of 33 pieces, 3 different; saved 80.0 s"
    )


def test_a_piece_is_only_told_to_who_debugs(lines: pytest.LogCaptureFixture) -> None:
    log = LogListener()
    log(events.PieceLoaded("mlp", "k", "disk", 0.001, 12.0))
    log(events.PieceCompiled("mlp", "k", "aot_inductor", 12.0, 1000, 1))
    assert [record.levelname for record in lines.records] == ["DEBUG", "DEBUG"]


def test_each_cause_is_warned_of_once(lines: pytest.LogCaptureFixture) -> None:
    """
    Figures in a message may differ from call to call; place and code make the cause.
    """
    log = LogListener()
    for seconds in (1, 2):
        log(events.TierFailed("disk", "write", Reason("tier-failed", f"after {seconds} s", "Wait")))
    log(events.TierFailed("redis", "write", Reason("tier-failed", "refused", "Wait")))
    assert [record.getMessage() for record in lines.records] == [
        "cache tier disk: tier-failed: after 1 s. Wait.",
        "cache tier redis: tier-failed: refused. Wait.",
    ]


def test_two_models_do_not_silence_each_other(lines: pytest.LogCaptureFixture) -> None:
    reason = Reason("outside-contract", "another dtype", "Nothing to do")
    for log in (LogListener(), LogListener()):
        log(events.CallOutsideContract("m", reason))
    assert len(lines.records) == 2


@pytest.mark.parametrize("kind", events.Event.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_event_with_a_reason_is_a_warning(
    kind: type[events.Event], lines: pytest.LogCaptureFixture
) -> None:
    fields = dict.fromkeys(kind.__match_args__, 1) | {"reason": Reason("disabled", "off", "On")}
    if "reason" in kind.__match_args__:
        LogListener()(kind(**fields))
        assert [record.levelname for record in lines.records] == ["WARNING"]


def test_a_broken_listener_is_named(lines: pytest.LogCaptureFixture) -> None:
    LogListener().note_failed_listener(print, RuntimeError("x"))
    assert "listener <built-in function print> failed" in lines.records[0].getMessage()


def test_a_folder_that_takes_no_recordings_is_one_sentence(lines: pytest.LogCaptureFixture) -> None:
    LogListener().note_failed_listener(print, RecordingUnwritableError("/logs", "Read-only"))
    (record,) = lines.records
    assert record.getMessage().startswith("/logs cannot be written: Read-only; nothing was written")
    assert record.exc_info is None
