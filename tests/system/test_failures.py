"""A piece that could not be compiled: not tried at each start, and not given up for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from precast.events import AssemblyRejected, Event
from system.models import Refusing, assert_same, compiled, eager, make_net, names

INPUTS = torch.linspace(-2, 2, 24).reshape(3, 8)


def start(folder: Path, **settings: Any) -> tuple[list[Event], Any]:
    """Start once as a new process would; return what happened, and the piece's status."""
    model, events = compiled(
        make_net(), folder, compiler=Refusing(), on_error="eager", verify=False, **settings
    )
    with torch.no_grad():
        assert_same(model(INPUTS), eager(model, INPUTS))
    pieces = precast.status(model)["assemblies"][0]["pieces"]
    precast.release(model)
    return events, pieces


def test_a_failure_is_remembered_then_tried_again_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The stored assembly, in which the piece runs eager, counts as long as the failure does.
    """
    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")
    monkeypatch.setenv("TEST_REFUSE", "1")
    events, pieces = start(tmp_path)
    assert "PieceFailed" in names(events)
    assert {piece["compiler"] for piece in pieces} == {"eager"}

    monkeypatch.delenv("TEST_REFUSE")
    events, pieces = start(tmp_path)
    assert "AssemblyLoaded" in names(events), "warm, though it would work by now"
    assert "CaptureFinished" not in names(events)
    [reason] = {piece["reason"]["message"] for piece in pieces}
    assert "remembered from" in reason

    events, pieces = start(tmp_path, failure_memory=1e-6)
    [rejected] = [event for event in events if isinstance(event, AssemblyRejected)]
    assert rejected.reason.code == "stale-assembly"
    assert "PieceCompiled" in names(events)
    assert {piece["compiler"] for piece in pieces} == {"refusing"}

    events, pieces = start(tmp_path)
    assert "AssemblyLoaded" in names(events)
    assert {piece["compiler"] for piece in pieces} == {"refusing"}
    assert len(list(tmp_path.glob("v1/ac/*/*-0.json"))) == 1
    assert not list(tmp_path.glob("v1/ac/*/*-1.json")), "it took the other one's place"
