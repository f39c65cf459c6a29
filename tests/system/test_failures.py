"""A piece that could not be compiled: not tried at each start, and not given up for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from precast.events import AssemblyRejected, Event, FellBack
from system.models import Filed, Refusing, assert_same, compiled, eager, make_net, names

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


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_code_that_raises_at_call_after_call_is_given_up(
    kind: type[Exception], tmp_path: Path
) -> None:
    """Each call is answered, by eager; after a few the code is not tried. Memory may come back."""
    model, events = compiled(make_net(), tmp_path, compiler=Filed())
    x = torch.randn(3, 8)
    num_tried = 0

    def fail(_inputs: Any) -> Any:
        nonlocal num_tried
        num_tried += 1
        raise kind(f"no such luck, {num_tried} bytes")

    with torch.no_grad():
        expected = eager(model, x)
        model(x)
        table = model._compiled_call_impl.loaded[0].slots
        index = next(i for i, slot in enumerate(table.slots) if slot is not None)
        table.swap(index, fail, table.slots[index])
        for _ in range(6):
            assert torch.equal(model(x), expected)
    fell_back = [e.reason.message for e in events if isinstance(e, FellBack)]
    if kind is RuntimeError:
        assert num_tried == 3
        assert not model._compiled_call_impl.loaded
        assert "eager from now on" in fell_back[-1]
        precast.release(model)
        again, _ = compiled(model, tmp_path, compiler=Filed())
        with torch.no_grad():
            assert torch.equal(again(x), expected)
        assert again._compiled_call_impl.loaded
    else:
        assert num_tried == 6
    assert len(fell_back) == 1 + (kind is RuntimeError), "told once, though the figures differ"
