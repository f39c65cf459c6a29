"""MODEL: what may be named, what is made of it, and how it is told when that does not work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precast.errors import ModelError
from precast.trial.inputs import default_shapes, describe_call, make_calls, vary_rows
from precast.trial.model import Call, LoadedModel, load_model
from precast.trial.shapes import parse_shapes
from system import trial_models

MODELS = "system.trial_models"


def load(name: str, **settings: Any) -> LoadedModel:
    return load_model(f"{MODELS}:{name}", **settings)


def made(name: str, *texts: str, is_exhaustive: bool = False) -> list[str]:
    loaded = load(name)
    calls = make_calls(loaded, [parse_shapes(t) for t in texts], is_exhaustive=is_exhaustive)
    for call in calls:
        loaded.module(*call.args, **call.kwargs)  # Such as the model can really be called with.
    return [describe_call(call) for call in calls]


def refusal(source: str, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(source, **settings)
    return caught.value


def test_a_factory_is_called_and_its_model_does_not_train() -> None:
    loaded = load("make")
    assert isinstance(loaded.module, nn.Module)
    assert not loaded.module.training
    assert loaded.examples == ()
    assert load("net").module is trial_models.net


def test_example_inputs_may_be_a_tensor_arguments_keywords_or_several_calls() -> None:
    (call,) = load("make_with_inputs").examples
    assert describe_call(call) == "float32[3, 8]"
    by_keyword, by_position = load("make_with_calls").examples
    assert describe_call(by_keyword) == "input_ids=int64[2, 5]"
    assert describe_call(by_position) == "int64[2, 5], int64[2, 5]"


def test_weights_and_examples_get_the_dtype_and_device_asked_for() -> None:
    loaded = load("make_with_inputs", dtype="bfloat16", device="meta")
    assert {(w.dtype, w.device.type) for w in loaded.module.parameters()} == {
        (torch.bfloat16, "meta")
    }
    assert loaded.examples[0].args[0].dtype is torch.bfloat16
    assert load("make_with_calls", dtype="bfloat16").examples[0].kwargs["input_ids"].dtype is (
        torch.int64
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("system.trial_model:make", "Did you mean 'system.trial_models'?"),
        ("system.trial_models.more:make", "system.trial_models is a module, not a package"),
        ("nowhere_at_all:make", "there is no module 'nowhere_at_all'; looked in "),
        (
            "recordings.py:make",
            "there is no module 'recordings.py'. Write recordings without `.py`.",
        ),
        ("system/trial_models.py:make", "without `.py`"),
        (f"{MODELS}:mkae", "has no 'mkae'. Did you mean 'make'?"),
        (f"{MODELS}:number", "is an int, which cannot be called"),
        ("just_a_word", "is neither a directory nor `package.module:factory`"),
        ("/no/such/folder", "is neither a directory nor `package.module:factory`"),
    ],
)
def test_what_is_not_there_is_a_mistake_in_the_command(source: str, said: str) -> None:
    error = refusal(source)
    assert said in error.sentences
    assert error.is_usage


def test_the_current_directory_is_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app_of_a_user").mkdir()
    (tmp_path / "app_of_a_user" / "models.py").write_text("import torch\nmake = torch.nn.Identity")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert isinstance(load_model("app_of_a_user.models:make").module, nn.Identity)
    assert "'app_of_a_user'?" in refusal("app_of_user.models:make").sentences


def test_what_the_users_code_raises_is_told_with_its_line() -> None:
    error = refusal(f"{MODELS}:fail")
    assert not error.is_usage
    line = trial_models.fail.__code__.co_firstlineno + 1
    assert error.problem == (
        f"the factory {MODELS}:fail failed at {trial_models.__file__}:{line}, in fail. "
        "ValueError: no weights here"
    )
    assert "returned an int" in refusal(f"{MODELS}:make_nothing").sentences


def test_a_module_that_cannot_be_imported_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_of_a_user.py").write_text("\nimport no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = refusal("broken_of_a_user:make")
    assert not error.is_usage
    assert "broken_of_a_user.py:2" in error.problem
    assert error.problem.endswith("No module named 'no_such_package_at_all'")


def test_a_device_that_is_not_there_is_told() -> None:
    assert "device 'gpu' cannot be used" in refusal(f"{MODELS}:make", device="gpu").sentences


def test_inputs_are_given_as_python_has_them_by_position_or_by_keyword() -> None:
    assert made("make", "2x8") == ["float32[2, 8]"]
    assert made("make", "x=2x8") == ["x=float32[2, 8]"]
    assert made("make_tokens", "input_ids=1..3x4,attention_mask=1..3x4,twice=true") == [
        f"input_ids=int64[{n}, 4], attention_mask=int64[{n}, 4], twice=True" for n in (3, 2, 1)
    ]
    assert made("make_tokens", "2x4,2x4", "1x4") == ["int64[2, 4], int64[2, 4]", "int64[1, 4]"]


def test_integers_are_indices_that_the_model_has() -> None:
    loaded = load("make_tokens")
    (call,) = make_calls(loaded, [parse_shapes("input_ids=64x64,attention_mask=1x2")])
    assert call.kwargs["input_ids"].max() == 10  # Of eleven rows.
    assert call.kwargs["attention_mask"].tolist() == [[1, 1]]


def test_an_argument_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(ModelError, match="Did you mean 'input_ids'"):
        made("make_tokens", "input_id=1x2")
    with pytest.raises(ModelError, match="nothing says what"):
        made("make")


def test_an_example_is_also_tried_with_other_numbers_of_rows() -> None:
    found = made("make_with_inputs", is_exhaustive=True)
    assert found[0] == "float32[3, 8]"
    assert {"float32[1, 8]", "float32[2, 8]", "float32[8, 8]"} < set(found)
    assert vary_rows(Call((torch.ones(2, 3), torch.ones(4)))) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory as `save_pretrained` writes it, of a small encoder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=50, max_position_embeddings=40,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("saved")
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_directory_of_transformers_knows_its_class_dtype_and_inputs(saved: Path) -> None:
    loaded = load_model(str(saved), dtype="bfloat16")
    assert type(loaded.module).__name__ == "BertModel"
    assert next(loaded.module.parameters()).dtype is torch.bfloat16
    assert default_shapes(loaded) == "input_ids=1..4x5..40,attention_mask=1..4x5..40"
    calls = make_calls(loaded, [])
    assert describe_call(calls[0]) == "input_ids=int64[4, 40], attention_mask=int64[4, 40]"
    assert int(calls[0].kwargs["input_ids"].max()) >= 40  # Of its vocabulary, not its positions.
    loaded.module(**calls[0].kwargs)


def test_a_directory_that_is_no_model_is_refused(saved: Path, tmp_path: Path) -> None:
    assert "has no config.json" in refusal(str(tmp_path)).sentences
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    error = refusal(str(tmp_path))
    assert not error.is_usage
    assert "transformers could not load" in error.problem  # Without weights, and without a hub.
