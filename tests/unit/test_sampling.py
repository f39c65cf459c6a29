from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from precast.sampling import difference
from system.models import assert_same, compiled, eager, make_net


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
