from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from precast.sampling import difference
from system.models import Filed, assert_same, compiled, eager, make_net, names


def sampler(model: Any) -> Any:
    return model._compiled_call_impl.loaded[0].bound.entry


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def codes(model: Any) -> list[str]:
    return [reason["code"] for reason in precast.status(model)["reasons"]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_call_in_so_many_is_checked(mode: Any, tmp_path: Path) -> None:
    """Also where weights are merged meanwhile: that is no mistake of compiled code."""
    model, _ = compiled(make_net(), tmp_path, verify="sample", verify_every=3)
    x = torch.ones(3, 8)
    with mode():
        for _ in range(20):
            assert_same(model(x), eager(model, x))
            model.layers[0].up.weight.data.add_(0.1)
            time.sleep(0.005)
        wait_for(lambda: sampler(model).num_checked >= 1)
    assert codes(model) == []


def test_a_wrong_call_is_found_and_the_assembly_thrown_away(tmp_path: Path) -> None:
    """From then on the model runs eager, and no later start finds the assembly."""
    model, _ = compiled(make_net(), tmp_path, verify="sample", verify_every=2)
    x = torch.ones(3, 8)
    with torch.no_grad():
        model(x)
        table = model._compiled_call_impl.loaded[0].slots
        run = table.callables[0]
        table.callables[0] = lambda inputs: [output * 1.01 for output in run(inputs)]
        assert not torch.equal(model(x), eager(model, x))
        wait_for(lambda: (model(x), codes(model))[1] == ["verify-mismatch"])
        assert_same(model(x), eager(model, x))
        assert "off by" in precast.status(model)["reasons"][0]["message"]
        later, _ = compiled(make_net(), tmp_path, mode="cache_only")
        later(x)
    assert codes(later) == ["not-recorded"]


def serve_filed(folder: Path, depth: int = 5, **settings: Any) -> Any:
    model, _ = compiled(
        make_net(depth=depth),
        folder,
        compiler=Filed(),
        on_error="eager",
        verify="sample",
        verify_every=2,
        keep_slower=True,
        **settings,
    )
    return model


def pieces_of(model: Any) -> list[tuple[str, str | None]]:
    return [
        (piece["compiler"], piece["reason"] and piece["reason"]["code"])
        for assembly in precast.status(model)["assemblies"]
        for piece in assembly["pieces"]
    ]


def call_until_refuted(model: Any, x: torch.Tensor) -> None:
    assert not torch.equal(model(x), eager(model, x))
    wait_for(lambda: (model(x), codes(model))[1] == ["verify-mismatch"])
    assert_same(model(x), eager(model, x))


def test_the_piece_at_fault_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by another model that shares it, and has an assembly with it. All else is compiled."""
    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")
    x = torch.ones(3, 8)
    with torch.no_grad():
        other = serve_filed(tmp_path, depth=6)
        other(x)
        model = serve_filed(tmp_path)
        model(x)
        good = {*pieces_of(other), *pieces_of(model)}
        assert good == {("filed", None)}
        table = model._compiled_call_impl.loaded[0].slots
        run = table.callables[1]
        for index, slot in enumerate(table.slots):  # Those that share its code.
            if slot is not None and slot.piece == table.slots[1].piece:
                table.callables[index] = lambda inputs: [output * 1.01 for output in run(inputs)]
        call_until_refuted(model, x)
        [reason] = precast.status(model)["reasons"]
        assert "is at fault" in reason["message"]

        for depth in (5, 6):
            later = serve_filed(tmp_path, depth=depth)
            for _ in range(4):
                assert_same(later(x), eager(later, x))
            found = pieces_of(later)
            assert {("filed", None), ("eager", "verify-mismatch")} == set(found)
            assert codes(later) == []


@pytest.mark.parametrize("mode", ["blocking", "progressive"])
def test_where_no_piece_is_at_fault_such_calls_stay_eager(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece is found again; with the failure forgotten the model is compiled anew."""
    monkeypatch.setenv("PRECAST_WORKER_WARM", "0")
    x = torch.ones(3, 8)
    with torch.no_grad():
        model = serve_filed(tmp_path)
        model(x)
        before = sampler(model)
        entry = before._entry
        before._entry = lambda *args: entry(*args) * 1.01
        call_until_refuted(model, x)
        assert "is at fault" not in precast.status(model)["reasons"][0]["message"]

        later = serve_filed(tmp_path, mode=mode)
        for _ in range(2):
            assert_same(later(x), eager(later, x))
            assert precast.wait(later, 120)
        assert pieces_of(later) == []
        assert codes(later) == ["verify-mismatch"]
        assert "remembered from" in precast.status(later)["reasons"][0]["message"]
        again, events = compiled(
            make_net(depth=5), tmp_path, compiler=Filed(), failure_memory=1e-6, keep_slower=True
        )
        again(x)
    assert "PieceCompiled" in names(events)
    assert "PieceLoaded" not in names(events)[: names(events).index("PieceCompiled")]


def test_calls_that_write_are_left_out(tmp_path: Path) -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1) * 2

    served, _ = compiled(write, tmp_path, verify="sample", verify_every=1)
    x = torch.ones(3)
    with torch.no_grad():
        assert_same(served(x), torch.full((3,), 4.0))
        assert_same(served(x), torch.full((3,), 6.0))
    assert "writes" in precast.status(served)["not_sampled"]


def test_nothing_stands_before_the_call_where_it_is_off(tmp_path: Path) -> None:
    model, _ = compiled(make_net(), tmp_path)
    with torch.no_grad():
        model(torch.ones(3, 8))
    assert type(sampler(model)).__name__ == "function"


@pytest.mark.parametrize(
    ("found", "expected", "problem"),
    [
        (torch.ones(3), torch.ones(3), None),
        (torch.ones(3) + 1e-5, torch.ones(3), None),
        (torch.ones(3) + 1e-2, torch.ones(3), "off by"),
        (torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "integers"),
        ([torch.ones(3), torch.ones(2)], [torch.ones(3)], "2 tensors"),
        ({"a": torch.full((2,), float("nan"))}, {"a": torch.ones(2)}, "NaN"),
        (torch.ones(3), torch.ones(4), "in eager"),
    ],
)
def test_a_difference_is_more_than_rounding(found: Any, expected: Any, problem: str | None) -> None:
    said = difference(found, expected)
    assert said is None if problem is None else said is not None and problem in said
