"""What is compared, what counts as a difference, and what a check and a measurement come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast.cli.bench import summarize_calls, summarize_starts
from precast.cli.check import verdict
from precast.compilers.eager import eager_call
from precast.compilers.verify import TensorsDifferError
from precast.errors import ModelError
from precast.trial.check import _compare_leaf, _leaves, check, eager_copy
from precast.trial.model import Call
from precast.trial.outcome import failures, reasons_in
from precast.trial.shapes import parse_shapes, to_json
from precast.trial.warm import warm


def job(name: str, *shapes: str, **more: Any) -> dict[str, Any]:
    return {
        "model": f"system.trial_models:{name}",
        "shapes": [to_json(parse_shapes(text)) for text in shapes],
        "dtype": None,
        "device": None,
        "cache_dir": None,
        "report": None,
        **more,
    }


@pytest.fixture(autouse=True)
def as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_COMPILER", "eager")
    monkeypatch.setenv("PRECAST_PROGRESS", "0")


def off_by(amount: float, from_rows: int) -> Callable[..., Any]:
    """Return a way to run pieces that is wrong for so many rows or more."""

    def run_wrongly(piece: Any) -> Any:
        call = eager_call(piece)

        def wrong(inputs: list[Any]) -> Any:
            outputs = call(inputs)
            return [out + amount if out.shape[0] >= from_rows else out for out in outputs]

        return wrong

    return run_wrongly


def test_a_difference_at_one_size_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precast.piece_result.eager_call", off_by(0.01, from_rows=17))
    told: list[dict[str, Any]] = []
    found = check(job("make", "1..20x8"), told.append)
    wrong = {row["call"] for row in found["calls"] if row["problem"] is not None}
    assert wrong == {"float32[17, 8]", "float32[19, 8]", "float32[20, 8]"}
    assert "the output (float32) is off by 0.0" in told[0]["problem"]
    assert found["has_failures"]
    assert verdict(found).startswith("system.trial_models:make differs from eager in 3 of ")


def test_what_agrees_passes_and_sizes_that_eager_refuses_are_left_out() -> None:
    found = check(job("make", "2x8", "2x9"), lambda row: None)
    assert [row["call"] for row in found["calls"]] == ["float32[2, 8]"]
    assert not found["has_failures"]
    with pytest.raises(ModelError, match=r"the call \(float32\[2, 9\]\) failed"):
        check(job("make", "2x9"), lambda row: None)


def test_arguments_that_a_model_writes_into_are_compared_and_kept() -> None:
    call = Call((torch.zeros(2),), {"cache": SimpleNamespace(keys=[torch.ones(1)], length=3)})
    names = [name for name, _ in _leaves(({"logits": torch.ones(1), "no": None}, call))]
    assert names == [
        "the output['logits']",
        "the output['no']",
        "argument 0",
        "argument cache.keys[0]",
        "argument cache.length",
    ]


def test_plain_values_must_be_equal_and_of_one_type() -> None:
    assert _compare_leaf(float("nan"), float("nan"), None) == (0.0, 0.0)
    for mine, other in ((1, 2), (1, True), (None, torch.ones(1))):
        with pytest.raises(TensorsDifferError):
            _compare_leaf(mine, other, None)


def test_float64_decides_where_both_round() -> None:
    """
    Eager is off by 1 itself: so may compiled code be, and no more than four times that.
    """
    truth = torch.zeros(3, dtype=torch.float64)
    eager = torch.ones(3)
    assert _compare_leaf(-eager, eager, truth) == (2.0, 2.0)
    with pytest.raises(TensorsDifferError):
        _compare_leaf(-eager * 5, eager, truth)
    with pytest.raises(TensorsDifferError):
        _compare_leaf(-eager, eager, None)


def test_the_eager_copy_shares_weights_and_not_buffers() -> None:
    module = nn.BatchNorm1d(3)
    copied = eager_copy(module)
    assert copied.weight is module.weight
    assert copied.running_mean is not module.running_mean


def test_a_slower_piece_is_a_decision_and_a_failed_one_is_not() -> None:
    def reason(code: str) -> dict[str, Any]:
        return {"code": code, "message": f"{code}!", "remedy": "none", "location": None}

    pieces = [
        {"name": name, "compiler": "eager", "reason": reason(code)}
        for name, code in (("a", "not-worth-it"), ("b", "compile-failed"), ("c", "compile-failed"))
    ]
    status = {"model": "Net", "reasons": [], "assemblies": [{"pieces": pieces}], "blocks": []}
    whole = {"model": "Whole", "reasons": [], "assemblies": [], "blocks": [status]}
    reasons = reasons_in(whole)
    assert [(r["code"], r["where"], r["count"]) for r in reasons] == [
        ("not-worth-it", "a", 1),
        ("compile-failed", "b", 2),
    ]
    assert [r["code"] for r in failures(reasons)] == ["compile-failed"]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PRECAST_DISABLE", "1", "PRECAST_DISABLE is set"),
        ("PRECAST_COMPILATION_LEVEL", "none", "nothing is compiled"),
        ("PRECAST_DISABLE_COMPILE_CACHE", "1", "leaves no cache to fill"),
    ],
)
def test_settings_that_leave_nothing_to_do_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ModelError, match=said):
        warm(job("make", "2x8", generate=None, bundle=None), lambda row: None)


def test_settings_of_a_service_do_not_keep_a_build_step_from_compiling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRECAST_MODE", "cache_only")
    found = warm(
        job("make_pair", "2x8", cache_dir=str(tmp_path), generate=None, bundle=None), lambda _: None
    )
    assert found["num_kinds"] == 1
    assert found["cache_dir"] == str(tmp_path)


def test_generating_warms_the_prompt_and_the_steps_after_it(tmp_path: Path) -> None:
    """
    A service that generates as long, with a static cache, finds all of it.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, vocab_size=50, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    order = {
        **job("", "input_ids=1x8,attention_mask=1x8", generate=4, bundle=None),
        "model": str(tmp_path / "llama"),
        "cache_dir": str(tmp_path / "cache"),
    }
    first = warm(order, lambda row: None)
    assert (first["num_kinds"], first["is_warm"], first["reasons"]) == (2, False, [])

    counter = precast.CompilationCounter()
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    precast.compile(model, cache_dir=tmp_path / "cache", revalidate="never", listeners=[counter])
    with counter.expect(num_captures=0, num_assemblies_loaded=2):
        model.generate(
            torch.ones(1, 8, dtype=torch.int64), attention_mask=torch.ones(1, 8, dtype=torch.int64),
            max_new_tokens=4, min_new_tokens=4, do_sample=False,
            cache_implementation="static", disable_compile=True,
        )  # fmt: skip
    precast.release(model)

    with pytest.raises(ModelError, match="has no generate"):
        warm(job("make", "2x8", generate=4, bundle=None), lambda row: None)


def run_of(first_output_s: float, start_s: float = 0.0, *, is_warm: bool = True) -> dict[str, Any]:
    return {
        "start_s": start_s, "first_output_s": first_output_s, "call_s": 0.1,
        "peak_memory_mb": 100.0, "call": "float32[1]", "torch": "2", "device": "CPU", "threads": 2,
        "is_warm": is_warm, "reasons": [], "has_failures": False,
    }  # fmt: skip


def test_starts_come_to_medians_ratios_and_their_noise() -> None:
    runs = {
        "eager": [run_of(1.0), run_of(1.0), run_of(1.5)],
        "precast cold": [run_of(60.0, is_warm=False)],
        "precast warm": [run_of(2.0), run_of(3.0), run_of(2.5)],
    }
    found = summarize_starts("app:make", runs)
    assert found["ways"]["precast warm"]["first_output_s"] == 2.5
    assert found["ways"]["precast warm"]["against_eager"] == 2.5
    assert found["noise"] == 0.5
    assert not found["has_failures"]
    runs["precast warm"][1] = run_of(60.0, is_warm=False)
    assert summarize_starts("app:make", runs)["has_failures"]


def test_calls_come_to_medians_ratios_and_their_noise() -> None:
    def run(ratio: float, spread: float) -> dict[str, Any]:
        ways = {
            "eager": {"median_s": 1.0, "spread": 0.01, "against_eager": 1.0},
            "precast": {"median_s": 1 / ratio, "spread": spread, "against_eager": ratio},
        }
        machine = {"torch": "2", "device": "CPU", "threads": 2, "reasons": []}
        return {"calls": [{"call": "float32[1]", "ways": ways}], "has_failures": False, **machine}

    found = summarize_calls("app:make", [run(2.0, 0.1), run(1.6, 0.3), run(2.4, 0.2)])
    assert found["calls"][0]["ways"]["precast"]["against_eager"] == 2.0
    assert found["noise"] == {"within": 0.2, "between": pytest.approx(0.4)}
