from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import precast
from precast.errors import ConfigError
from precast.manager import CompilerManager

SETTINGS: dict[str, Any] = {"compiler": "eager", "progress": False, "revalidate": "never"}
OFFSET = 1.0


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.scale = 2.0

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        result = self.inner(x) * self.scale
        return result + result if twice else result


class Broken(nn.Module):
    """Cannot be captured whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()
        self.second = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


@pytest.fixture(autouse=True)
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, module))
    with torch.no_grad():
        yield


def codes(model: Any) -> list[str]:
    return [reason["code"] for reason in precast.status(model)["reasons"]]


X = torch.randn(3, 4)


def test_a_compiled_module_stays_what_it_is() -> None:
    """
    Same object, class, state and results; copies and pickles are plain; release gives eager.
    """
    model = Model()
    expected = model(X)
    compiled = precast.compile(model, **SETTINGS)

    assert compiled is model
    assert torch.equal(model(X), expected)
    status = precast.status(model)
    assert (status["is_warm"], status["reasons"], len(status["assemblies"])) == (False, [], 1)
    for rows in (2, 7, 64):
        x = torch.randn(rows, 4)
        assert torch.equal(model(x), model.forward(x))
    assert len(precast.status(model)["assemblies"]) == 1

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._compiled_call_impl is None
        assert torch.equal(twin(X), expected)

    precast.release(model)
    assert model._compiled_call_impl is None
    assert torch.equal(model(X), expected)


def test_the_second_model_is_warm() -> None:
    first = precast.compile(Model(), **SETTINGS)
    first(X)
    second = Model()
    expected = second(X)
    precast.compile(second, **SETTINGS)

    assert torch.equal(second(X), expected)
    assert precast.status(second)["is_warm"] is True


def change_constant(model: Model) -> None:
    model.scale = 3.0


def replace_weight(model: Model) -> None:
    model.inner.linear.weight = nn.Parameter(torch.randn(4, 4))


def replace_forward(model: Model) -> None:
    model.forward = lambda x: x * 100  # type: ignore[method-assign]


def replace_inner_forward(model: Model) -> None:
    model.inner.forward = lambda x: x - 5  # type: ignore[method-assign]


def hook(model: Model) -> None:
    model.register_forward_hook(lambda _m, _a, result: result + 1)


def test_changes_are_followed_to_there_and_back() -> None:
    """Whatever is done to a model after it was compiled, a call does what eager does."""
    model = precast.compile(Model(), **SETTINGS)
    before = model(X)
    for change in (replace_weight, change_constant, hook, replace_inner_forward, replace_forward):
        changed = change(model)  # type: ignore[func-returns-value]
        assert changed is None
        assert torch.equal(model(X), model._call_impl(X)), change.__name__
        assert not torch.equal(model(X), before), change.__name__
    del model.forward
    del model.inner.forward
    assert torch.equal(model(X), model._call_impl(X))


def test_a_global_hook_is_honoured() -> None:
    model = precast.compile(Model(), **SETTINGS)
    expected = model(X)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _a, result: result + 1 if module is model else None
    )
    try:
        assert torch.equal(model(X), expected + 1)
    finally:
        handle.remove()
    assert torch.equal(model(X), expected)


def test_a_wrong_call_raises_what_eager_raises_and_spoils_nothing() -> None:
    """The user's error comes as it is; the next, right call is compiled whole."""
    model = precast.compile(Model(), **SETTINGS)

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.randn(3, 5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        model(X, nope=1)
    assert torch.equal(model(X, twice=True), model.forward(X, twice=True))
    status = precast.status(model)
    assert (len(status["assemblies"]), status["reasons"], status["blocks"]) == (1, [], [])


def test_a_model_with_a_graph_break_is_compiled_by_block() -> None:
    model = precast.compile(Broken(), **SETTINGS)

    assert torch.equal(model(X), model.forward(X))
    assert codes(model) == ["capture-failed"]
    blocks = precast.status(model)["blocks"]
    assert [len(block["assemblies"]) for block in blocks] == [1, 1]


def test_gradients_are_recorded_as_eager_does() -> None:
    model = precast.compile(Model(), **SETTINGS)
    with torch.enable_grad():
        assert model(X).requires_grad
    assert codes(model) == ["grad-enabled"]
    assert not model(X).requires_grad
    assert len(precast.status(model)["assemblies"]) == 1


@dataclasses.dataclass
class Settings:
    """Named as attributes of tensors are."""

    scale: torch.Tensor
    dim: int = 2
    dtype: str = "float"


def scaled_by(x: torch.Tensor, settings: Settings) -> torch.Tensor:
    return x * settings.scale * settings.dim


def test_gradients_of_what_lies_deep_in_an_argument_are_recorded() -> None:
    served = precast.compile(scaled_by, **SETTINGS)
    settings = Settings(torch.ones(4))
    assert torch.equal(served(X, settings), X * 2)
    settings.scale.requires_grad_()

    with torch.enable_grad():
        assert served(X, settings).requires_grad
    assert codes(served) == ["grad-enabled"]
    assert not served(X, settings).requires_grad
    assert len(precast.status(served)["assemblies"]) == 1


def test_tangents_are_as_eager_gives_them() -> None:
    model = precast.compile(Model(), **SETTINGS)
    model(X)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        found = model(forward_ad.make_dual(X, torch.ones_like(X)))

        assert forward_ad.unpack_dual(found).tangent is not None
    assert codes(model) == ["grad-enabled"]


def negated(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def test_a_negative_view_is_read_with_its_sign() -> None:
    served = precast.compile(negated, **SETTINGS)
    z = torch.randn(3, 4, dtype=torch.complex64)
    served(z.imag)

    assert torch.equal(served(z.conj().imag), negated(z.conj().imag))
    assert codes(served) == ["outside-contract"]
    assert len(precast.status(served)["assemblies"]) == 1


def test_threads_may_call_a_model_for_the_first_time_together() -> None:
    model = Model()
    expected = model(X)
    precast.compile(model, **SETTINGS)
    results: list[bool] = []

    def call() -> None:
        with torch.inference_mode():
            results.extend(torch.equal(model(X), expected) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [True] * 80
    assert len(precast.status(model)["assemblies"]) == 1


def test_a_compiled_model_may_be_a_part_of_another() -> None:
    """Of one that Precast compiles, and of one that torch compiles."""
    outer = Model()
    precast.compile(outer.inner, **SETTINGS)(X)
    expected = outer(X)
    precast.compile(outer, **SETTINGS)

    assert torch.equal(outer(X), expected)
    assert codes(outer) == []
    traced = torch.compile(outer, backend="eager", fullgraph=True)
    assert torch.equal(traced(X), expected)


@dataclasses.dataclass
class Out:
    value: torch.Tensor
    rest: Any = None


def make(factor: int) -> Callable[..., Any]:
    def rich(x: Any, /, y: int = 2, *, k: int = 1, **more: Any) -> Any:
        return Out(x * factor + y * k), [1, (x - OFFSET, "s", None)], {"n": x.shape[0], **more}

    return rich


def test_functions_keep_their_signature_closure_and_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Defaults, keyword-only and further arguments; dataclasses, None, ints, nested containers."""
    plain, compiled = make(5), precast.compile(make(5), **SETTINGS)
    for x in (X, torch.randn(6, 4)):
        for kwargs in ({}, {"k": 4, "z": X}):
            assert repr(compiled(x, **kwargs)) == repr(plain(x, **kwargs))
    assert repr(precast.compile(make(6), **SETTINGS)(X)) == repr(make(6)(X))
    with pytest.raises(TypeError):
        compiled()


@precast.compile(**SETTINGS)
def called(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def test_a_compiled_function_may_call_another() -> None:
    compiled = precast.compile(lambda x: called(x).relu(), **SETTINGS)

    assert torch.equal(compiled(X), (X * 2 + 1).relu())
    assert codes(compiled) == []


def test_one_tensor_for_two_arguments_is_another_call() -> None:
    def write(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a + b if a is not b else a * 3

    compiled = precast.compile(write, **SETTINGS)
    assert torch.equal(compiled(torch.ones(5), X[0, :1]), 2 + X[0, :1].expand(5))
    one = torch.ones(5)
    assert torch.equal(compiled(one, one), torch.full((5,), 6.0))


def test_generators_run_as_they_are() -> None:
    def count(x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield x
        yield x + 1

    compiled = precast.compile(count, **SETTINGS)
    assert torch.equal(torch.stack(list(compiled(X))), torch.stack([X, X + 1]))


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nn\.Module or a plain function"):
        precast.compile(3, **SETTINGS)
    with pytest.raises(ConfigError):
        precast.compile(Model(), no_such_setting=1)
    taken = Model()
    taken.compile(backend="eager")
    with pytest.raises(ConfigError, match="compiled by torch already"):
        precast.compile(taken, **SETTINGS)


def test_disabled_means_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_DISABLE", "1")
    model = precast.compile(Model(), **SETTINGS)

    assert model._compiled_call_impl is None
    assert codes(model) == ["disabled"]
    assert "PRECAST_DISABLE" in precast.status(model)["reasons"][0]["message"]
    assert precast.wait(model)
    precast.release(model)
    monkeypatch.delenv("PRECAST_DISABLE")
    assert "does not serve" in precast.status(model)["reasons"][0]["message"]


def test_a_changed_default_of_a_served_function_is_noticed(tmp_path: Path) -> None:
    """
    Python reads a function's defaults at each call, so compiled code has to as well.
    """

    def scaled(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return x * factor

    call = precast.compile(
        scaled, compiler="eager", cache_dir=tmp_path, progress=False, revalidate="never"
    )
    x = torch.ones(3)
    with torch.no_grad():
        before = call(x)
        scaled.__defaults__ = (3.0,)
        after = call(x)

    assert torch.equal(before, x)
    assert torch.equal(after, 3.0 * x)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="at least 0 seconds"):
        precast.wait(Model(), timeout)


@pytest.mark.parametrize("timeout", [0, 1, 1e12, float("inf"), None])
def test_a_timeout_may_be_as_long_as_one_likes(timeout: float | None) -> None:
    for mode in ("blocking", "progressive"):
        model = precast.compile(Model(), **{**SETTINGS, "mode": mode})
        assert precast.wait(model, timeout)
        precast.release(model)


def test_a_setting_that_is_refused_leaves_a_served_model_served() -> None:
    model = precast.compile(Model(), **SETTINGS)
    dispatcher = model._compiled_call_impl
    with pytest.raises(ConfigError):
        precast.compile(model, mode="nonsense")
    assert model._compiled_call_impl is dispatcher
    precast.compile(model, **SETTINGS)
    assert model._compiled_call_impl is not dispatcher


def test_a_call_is_answered_where_our_own_code_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried again at the next call, unless the user wants failures to be raised."""

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    model = precast.compile(Model(), cache_dir=tmp_path, **SETTINGS)
    strict = precast.compile(Model(), cache_dir=tmp_path, on_error="raise", **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(CompilerManager, "turn", fail)
        for _ in range(5):
            assert torch.equal(model(X), model.forward(X))
        with pytest.raises(OSError, match="Too many"):
            strict(X)
        patch.setattr(CompilerManager, "turn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(X)
    [reason] = precast.status(model)["reasons"]
    assert "OSError: [Errno 24] Too many open files; the call ran eager" in reason["message"]
    assert torch.equal(model(X), model.forward(X))
    assert len(precast.status(model)["assemblies"]) == 1


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_mistake_of_ours_is_not_made_at_each_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def fail(*_: object) -> None:
        tried.append(None)
        raise KeyError("a mistake")

    model = precast.compile(Model(), cache_dir=tmp_path, **SETTINGS)
    monkeypatch.setattr(CompilerManager, "turn", fail)
    for _ in range(6):
        assert torch.equal(model(X), model.forward(X))
    assert len(tried) == 3


def test_a_capture_that_failed_is_remembered_for_a_while(tmp_path: Path) -> None:
    """Its blocks are loaded at once. With another setting of the model it is tried again."""

    def start(failure_memory: float = 3600.0, **attributes: Any) -> tuple[list[str], Any]:
        events: list[str] = []
        model = Broken()
        vars(model).update(attributes)
        precast.compile(
            model,
            cache_dir=tmp_path,
            failure_memory=failure_memory,
            listeners=[lambda event: events.append(type(event).__name__)],
            **SETTINGS,
        )
        assert torch.equal(model(X), model.forward(X))
        status = precast.status(model)
        precast.release(model)
        return events, status

    events, status = start()
    assert (events.count("CaptureFailed"), events.count("CaptureFinished")) == (1, 1)
    [first] = status["reasons"]

    events, status = start()
    assert "FailureRemembered" in events
    assert "CaptureFailed" not in events
    assert "CaptureFinished" not in events
    [reason] = status["reasons"]
    assert {**reason, "message": ""} == {**first, "message": ""}
    assert reason["message"].startswith(first["message"] + "; remembered from")
    assert [len(block["assemblies"]) for block in status["blocks"]] == [1, 1]

    assert "CaptureFailed" in start(failure_memory=1e-6)[0]
    assert "CaptureFailed" in start(is_mended=True)[0]
    assert "CaptureFailed" in start(is_mended=True, failure_memory=0.0)[0]
    assert "CaptureFailed" not in start(is_mended=True)[0]


def test_a_call_at_fault_is_no_failure_of_the_model(tmp_path: Path) -> None:
    """Eager refuses it as well: the next start has nothing to remember."""
    for _ in range(2):
        events: list[str] = []
        model = precast.compile(
            Model(),
            cache_dir=tmp_path,
            listeners=[lambda event, events=events: events.append(type(event).__name__)],
            **SETTINGS,
        )
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(3, 5))
        assert "CaptureFailed" in events
        assert "FailureRemembered" not in events


def test_a_release_in_the_middle_of_a_compile_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    model = precast.compile(
        Model(),
        cache_dir=tmp_path,
        listeners=[lambda event: events.append(type(event).__name__)],
        **SETTINGS,
    )
    compile_pieces = CompilerManager.compile

    def release_first(manager: Any, *args: Any, **kwargs: Any) -> Any:
        precast.release(model)
        return compile_pieces(manager, *args, **kwargs)

    monkeypatch.setattr(CompilerManager, "compile", release_first)
    assert torch.equal(model(X), model.forward(X))
    assert "ModelReleased" in events
    assert not {"AssemblyPublished", "ModelReady"} & set(events)
    assert model._compiled_call_impl is None
