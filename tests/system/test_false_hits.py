"""A start must never use what was compiled for another model, another state or another machine.

Each kind of change is tried twice: made before a new start on the same cache, and made to a
running model. The output must be eager's. Then each is tried with the check that catches it taken
out, and must come out wrong: that shows the check, and the test, to be needed.

A "start" is a new model object served anew from the same folder, in this process: everything that
a new process does runs, since a new session has no memory of the last. What differs in a process
as a whole, an edited file and the CPU's instruction set, is tried in new processes.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from precast import api, assemblies, assembly, binding, candidates, contract, serving
from precast.capture import digests, dynamo
from system import models
from system.models import (
    Block,
    Net,
    SubBlock,
    SubNet,
    assert_same,
    compiled,
    eager,
    make_net,
    names,
    other_helper,
    scaled,
)

INPUTS = torch.linspace(-2, 2, 24).reshape(3, 8)


class Replaced:
    """Puts other values in place of attributes and items, and the old ones back."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def attribute(self, holder: Any, name: str, value: Any) -> None:
        context = pytest.MonkeyPatch.context()
        self._stack.enter_context(context).setattr(holder, name, value)

    def enter(self, context: Any) -> None:
        self._stack.enter_context(context)

    def later(self, call: Callable[..., Any], *args: Any) -> None:
        self._stack.callback(call, *args)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def known_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds an assembly of `make_changeable()`; tests take a copy."""
    folder = tmp_path_factory.mktemp("known-net")
    start_cold(make_changeable(), folder, INPUTS)
    return folder


@pytest.fixture
def warm_cache(known_net: Path, tmp_path: Path) -> Path:
    """Return a cache of its own for one test, with an assembly of `make_changeable()`."""
    return Path(shutil.copytree(known_net, tmp_path / "cache"))


@pytest.fixture
def replaced() -> Iterator[Replaced]:
    """Undoes what a test replaced, at its end."""
    found = Replaced()
    try:
        yield found
    finally:
        found.close()


# ---------------------------------------------------------------------------
# What is taken out in turn


def without_values(replaced: Replaced) -> None:
    """Every check of a model's values says yes."""
    replaced.attribute(binding, "_holds", lambda *_: True)


def without_code(replaced: Replaced) -> None:
    """All code has one digest."""
    for module in (binding, contract, digests, dynamo):
        replaced.attribute(module, "digest_code", lambda _: "same")


def without_state(replaced: Replaced) -> None:
    """The process has no state."""
    for module in (binding, dynamo):
        replaced.attribute(module, "ambient_state", dict)


def without_hooks(replaced: Replaced) -> None:
    """No hook is seen."""
    replaced.attribute(binding, "_hook_dicts", lambda *_: [])


def without_specs(replaced: Replaced) -> None:
    """All tensors are alike."""
    for module in (binding, contract, dynamo):
        replaced.attribute(module, "tensor_spec", lambda *_: [])


def without_fingerprint(replaced: Replaced) -> None:
    """All models have one structure."""
    replaced.attribute(serving, "model_fingerprint", lambda *_: "same")


def without_attention(replaced: Replaced) -> None:
    """A running model never looks whether something was touched."""
    replaced.attribute(binding.Binding, "is_current", lambda _: True)


Off = Callable[[Replaced], None]


# ---------------------------------------------------------------------------
# Other models of one class: (first, second, what is taken out)


def _own_method(replaced: Replaced) -> Net:
    """A net whose class has the name and the structure of another one, and another method."""

    def finish(self: Net, x: torch.Tensor) -> torch.Tensor:
        return x - self.shift

    namespace = {"finish": finish, "__module__": models.__name__, "__qualname__": "Net"}
    kind = type("Net", (Net,), namespace)
    replaced.attribute(models, "Net", kind)
    torch.manual_seed(0)
    model = Net().eval()
    model.__class__ = kind
    return model


def _with_sub_block() -> Net:
    model = make_net()
    model.layers[1].__class__ = SubBlock
    return model


def _of(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind().eval()


VARIANTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[Off]]] = {
    "deeper": (make_net, lambda: make_net(depth=3), [without_fingerprint, without_values]),
    "shallower": (
        lambda: make_net(depth=3),
        # Its third layer's weights are not there; that alone would be noticed.
        lambda: _shortened(make_net(depth=3)),
        [without_fingerprint, without_values, without_specs],
    ),
    "wider": (
        make_net,
        lambda: make_net(inner=16),
        [without_fingerprint, without_values, without_specs],
    ),
    "epsilon": (make_net, lambda: make_net(eps=0.5), [without_values]),
    "activation function": (make_net, lambda: make_net(act=torch.sigmoid), [without_values]),
    "activation module": (
        lambda: make_net(act=nn.Sigmoid()),
        lambda: make_net(act=nn.Tanh()),
        [without_fingerprint, without_values],
    ),
    "activation from a closure": (
        lambda: make_net(act=scaled(1.0)),
        lambda: make_net(act=scaled(3.0)),
        [without_values],
    ),
    "dtype": (
        make_net,
        lambda: make_net().double(),
        [without_fingerprint, without_values, without_specs],
    ),
    "subclass of the model": (
        make_net,
        lambda: _of(SubNet),
        [without_fingerprint, without_values],
    ),
    "subclass of a layer": (
        make_net,
        _with_sub_block,
        [without_fingerprint, without_values],
    ),
}


def _shortened(model: Net) -> Net:
    model.layers.run_first = 2  # type: ignore[assignment]
    model.layers.__class__ = FirstLayers
    return model


class FirstLayers(nn.ModuleList):
    """Holds all layers and gives out the first ones."""

    run_first: int

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.run_first])  # type: ignore[arg-type]


def start_cold(model: Any, cache_dir: Path, *inputs: Any) -> None:
    """Fill the cache with an assembly of a model."""
    served, events = compiled(model, cache_dir)
    with torch.no_grad():
        served(*inputs)
    assert "AssemblyPublished" in names(events), events
    api.release(served)


@pytest.mark.parametrize("name", VARIANTS)
def test_another_model_of_the_class(name: str, tmp_path: Path) -> None:
    """What was compiled for one model is not used for another one."""
    first, second, _ = VARIANTS[name]
    start_cold(first(), tmp_path, INPUTS)
    model, events = compiled(second(), tmp_path)
    with torch.no_grad():
        expected = eager(model, INPUTS)
        assert_same(model(INPUTS), expected)
        assert "AssemblyLoaded" not in names(events)
        again, events = compiled(second(), tmp_path)
        assert_same(again(INPUTS), expected)
        assert "AssemblyLoaded" in names(events)  # Both have their place in the cache.
        again, events = compiled(first(), tmp_path)
        assert_same(again(INPUTS), eager(again, INPUTS))
        assert "AssemblyLoaded" in names(events)


@pytest.mark.parametrize("name", VARIANTS)
def test_another_model_would_be_taken_for_it(name: str, tmp_path: Path, replaced: Replaced) -> None:
    """Without the check the output is wrong."""
    first, second, off = VARIANTS[name]
    for turn_off in off:
        turn_off(replaced)
    start_cold(first(), tmp_path, INPUTS)
    model, events = compiled(second(), tmp_path)
    with torch.no_grad():
        if name == "dtype":
            model(INPUTS)
            assert "FellBack" in names(events)  # The text of the pieces refuses other dtypes.
        else:
            assert is_wrong(model, INPUTS)
    assert "AssemblyLoaded" in names(events)


def is_wrong(model: Any, *inputs: Any) -> bool:
    expected = eager(model, *inputs)
    found = model(*inputs)
    return found.dtype != expected.dtype or not torch.equal(found, expected)


# ---------------------------------------------------------------------------
# Changes of one model, or of the process


def _double(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def change_hook(model: Net, replaced: Replaced) -> None:
    model.layers[0].up.register_forward_hook(_double)


def change_pre_hook(model: Net, replaced: Replaced) -> None:
    model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1,))


def change_own_hook(model: Net, replaced: Replaced) -> None:
    model.register_forward_hook(_double)


def change_global_hook(model: Net, replaced: Replaced) -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: output + 1 if isinstance(module, nn.LayerNorm) else None
    )
    replaced.later(handle.remove)


def change_parameter(model: Net, replaced: Replaced) -> None:
    model.layers[0].up.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)


def change_no_bias(model: Net, replaced: Replaced) -> None:
    model.layers[0].up.bias = None


def change_assigned_state(model: Net, replaced: Replaced) -> None:
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def change_dtype(model: Net, replaced: Replaced) -> None:
    model.to(torch.float64)


def change_data(model: Net, replaced: Replaced) -> None:
    model.layers[1].down.weight.data = torch.ones(8, 8)


def change_in_place(model: Net, replaced: Replaced) -> None:
    model.layers[1].down.weight.mul_(2)


def change_buffer(model: Net, replaced: Replaced) -> None:
    model.shift = torch.ones(8)


def change_buffer_dtype(model: Net, replaced: Replaced) -> None:
    model.shift = torch.ones(8, dtype=torch.float64)


def change_module(model: Net, replaced: Replaced) -> None:
    model.layers[1] = Block(8, 8, eps=0.5).eval()


def change_appended_module(model: Net, replaced: Replaced) -> None:
    model.layers.append(Block(8, 8).eval())


def change_deleted_module(model: Net, replaced: Replaced) -> None:
    del model.layers[1]


def change_class_of_layer(model: Net, replaced: Replaced) -> None:
    model.layers[1].__class__ = SubBlock


def change_class_of_model(model: Net, replaced: Replaced) -> None:
    model.__class__ = SubNet


def change_constant(model: Net, replaced: Replaced) -> None:
    model.scale = 3.0


def change_layer_constant(model: Net, replaced: Replaced) -> None:
    model.layers[1].gain = 3.0


def change_epsilon(model: Net, replaced: Replaced) -> None:
    model.layers[1].norm.eps = 0.5


def change_activation(model: Net, replaced: Replaced) -> None:
    model.layers[1].act = torch.sigmoid


def change_list(model: Net, replaced: Replaced) -> None:
    model.gains[1] = 3.0


def change_dict(model: Net, replaced: Replaced) -> None:
    model.options["gain"] = 3.0


def change_ordered_dict(model: Net, replaced: Replaced) -> None:
    model.ordered["gain"] = 3.0


def change_dataclass(model: Net, replaced: Replaced) -> None:
    model.settings.gain = 3.0


def change_slot(model: Net, replaced: Replaced) -> None:
    model.slotted.gain = 3.0


def change_set(model: Net, replaced: Replaced) -> None:
    model.names.remove("a")


def change_set_of_equal_size(model: Net, replaced: Replaced) -> None:
    model.names.remove("a")
    model.names.add("c")


def change_keys_of_equal_number(model: Net, replaced: Replaced) -> None:
    del model.marks["a"]
    model.marks["b"] = 1


def change_training(model: Net, replaced: Replaced) -> None:
    model.train()


def change_training_of_layer(model: Net, replaced: Replaced) -> None:
    model.layers[0].drop.train()


def change_global(model: Net, replaced: Replaced) -> None:
    replaced.attribute(models, "SCALE", 3.0)


def change_global_dict(model: Net, replaced: Replaced) -> None:
    replaced.later(models.FLAGS.update, {"wide": True})
    models.FLAGS["wide"] = False


def change_global_function(model: Net, replaced: Replaced) -> None:
    replaced.attribute(models, "helper", other_helper)


def change_default_of_function(model: Net, replaced: Replaced) -> None:
    replaced.attribute(models.helper, "__defaults__", (3.0,))


def change_code_of_function(model: Net, replaced: Replaced) -> None:
    replaced.attribute(models.helper, "__code__", other_helper.__code__)


def _other_mix(self: Block, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(self.up(x))


def change_method_of_layer(model: Net, replaced: Replaced) -> None:
    replaced.attribute(Block, "mix", _other_mix)


def change_forward_of_layer(model: Net, replaced: Replaced) -> None:
    replaced.attribute(Block, "forward", _other_mix)


def change_method_of_model(model: Net, replaced: Replaced) -> None:
    replaced.attribute(Net, "finish", lambda self, x: x - self.shift)


def change_forward_of_model(model: Net, replaced: Replaced) -> None:
    replaced.attribute(Net, "forward", lambda self, x: x - self.shift)


def change_own_forward(model: Net, replaced: Replaced) -> None:
    layer = model.layers[1]
    layer.forward = types.MethodType(_other_mix, layer)


def change_own_forward_of_model(model: Net, replaced: Replaced) -> None:
    model.forward = types.MethodType(lambda self, x: x - self.shift, model)


def change_own_forward_for_another_attribute(model: Net, replaced: Replaced) -> None:
    layer = model.layers[1]
    del layer.unused
    layer.forward = types.MethodType(_other_mix, layer)


def change_autocast(model: Net, replaced: Replaced) -> None:
    replaced.enter(torch.autocast("cpu", dtype=torch.bfloat16))


def change_precision(model: Net, replaced: Replaced) -> None:
    replaced.later(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("medium")


def change_default_dtype(model: Net, replaced: Replaced) -> None:
    replaced.later(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)


def change_deterministic(model: Net, replaced: Replaced) -> None:
    replaced.later(torch.use_deterministic_algorithms, False)
    torch.use_deterministic_algorithms(True)


def change_mkldnn(model: Net, replaced: Replaced) -> None:
    replaced.enter(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    replaced.enter(torch.backends.mkldnn.flags(enabled=False))


class Negating(TorchDispatchMode):
    """Makes every addition a subtraction, as a mode that changes results would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return -output if func is torch.ops.aten.relu.default else output


class Counting(torch.overrides.TorchFunctionMode):
    """Sees every call of a torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is functional.layer_norm else output


def change_function_mode(model: Net, replaced: Replaced) -> None:
    replaced.enter(Counting())


def change_parametrization(model: Net, replaced: Replaced) -> None:
    nn.utils.parametrize.register_parametrization(model.layers[0].up, "weight", nn.ReLU())


CODE, HOOKS, STATE, VALUES = without_code, without_hooks, without_state, without_values
NO_WEIGHT = "weights are read at each start: nothing can be stale"
BY_TORCH = "noticed by what is read, whatever is checked"

#: By name: the change, and what is taken out to show that the check is needed before a start; where
#: nothing can be, why.
CHANGES: dict[str, tuple[Callable[[Net, Replaced], None], list[Off] | str]] = {
    "hook": (change_hook, [HOOKS]),
    "pre-hook": (change_pre_hook, [HOOKS]),
    "own hook": (change_own_hook, "the model's own hooks run around the compiled call"),
    "global hook": (change_global_hook, "the dispatcher asks for these itself, at each call"),
    "parameter": (change_parameter, NO_WEIGHT),
    "no bias": (change_no_bias, BY_TORCH),
    "state assigned": (change_assigned_state, NO_WEIGHT),
    "dtype": (change_dtype, "the text of the pieces refuses other dtypes; see the variants"),
    "data": (change_data, NO_WEIGHT),
    "in place": (change_in_place, NO_WEIGHT),
    "buffer": (change_buffer, NO_WEIGHT),
    "buffer's dtype": (
        change_buffer_dtype,
        "the code of the pieces as text promotes as eager does",
    ),
    "module": (change_module, [VALUES]),
    "module appended": (change_appended_module, [without_fingerprint, VALUES]),
    "module deleted": (change_deleted_module, BY_TORCH),
    "class of a layer": (change_class_of_layer, [without_fingerprint, VALUES]),
    "class of the model": (change_class_of_model, [without_fingerprint, VALUES]),
    "constant": (change_constant, [VALUES]),
    "layer's constant": (change_layer_constant, [VALUES]),
    "epsilon": (change_epsilon, [VALUES]),
    "activation": (change_activation, [VALUES]),
    "list": (change_list, [VALUES]),
    "dict": (change_dict, [VALUES]),
    "ordered dict": (change_ordered_dict, [VALUES]),
    "dataclass": (change_dataclass, [VALUES]),
    "slot": (change_slot, [VALUES]),
    "set": (change_set, [VALUES]),
    "set of equal size": (change_set_of_equal_size, [VALUES]),
    "keys of equal number": (change_keys_of_equal_number, BY_TORCH),
    "training": (change_training, [VALUES]),
    "training of a layer": (change_training_of_layer, [VALUES]),
    "global": (change_global, [VALUES]),
    "global dict": (change_global_dict, [VALUES]),
    "global function": (change_global_function, [CODE, VALUES]),
    "function's default": (change_default_of_function, [VALUES]),
    "function's code": (change_code_of_function, [CODE, VALUES]),
    "method of a layer": (change_method_of_layer, [CODE, VALUES]),
    "forward of a layer": (change_forward_of_layer, [CODE, VALUES]),
    "method of the model": (change_method_of_model, [CODE, VALUES]),
    "forward of the model": (change_forward_of_model, [CODE, VALUES, without_fingerprint]),
    "own forward": (change_own_forward, [VALUES, CODE]),
    "own forward of the model": (change_own_forward_of_model, [CODE, VALUES, without_fingerprint]),
    "own forward for another attribute": (
        change_own_forward_for_another_attribute,
        [VALUES, CODE],
    ),
    "parametrization": (change_parametrization, BY_TORCH),
    "function mode": (change_function_mode, "pieces as text call no torch function that is seen"),
}

#: Changes of the process: the pieces as text follow them by themselves, so that a wrong hit shows
#: in the events and not in the output.
STATES: dict[str, Callable[[Net, Replaced], None]] = {
    "autocast": change_autocast,
    "precision": change_precision,
    "default dtype": change_default_dtype,
    "deterministic": change_deterministic,
    "mkldnn": change_mkldnn,
}


def make_changeable() -> Net:
    model = make_net()
    model.layers[1].unused = None  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("name", [*CHANGES, *STATES])
def test_changed_before_the_start(name: str, warm_cache: Path, replaced: Replaced) -> None:
    """A start after the change computes what eager computes then."""
    change = CHANGES[name][0] if name in CHANGES else STATES[name]
    model = make_changeable()
    with torch.no_grad():
        change(model, replaced)
        model, events = compiled(model, warm_cache)
        assert_same(model(INPUTS), eager(model, INPUTS))
    if name in STATES:
        assert "AssemblyLoaded" not in names(events)


#: What a running model does not notice, for a check at each call would cost too much. The next
#: start does, and so does a running model when it looks again for another reason.
UNWATCHED = {
    "class of a layer": "`type` of every module at every call",
    "function's code": "`__code__` of every function that was traced, at every call",
    "own forward for another attribute": "the names of every module's attributes, not their number",
}


def _watched(name: str) -> Any:
    marks = [pytest.mark.xfail(reason=UNWATCHED[name])] if name in UNWATCHED else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [*map(_watched, CHANGES), *STATES])
def test_changed_after_the_start(name: str, warm_cache: Path, replaced: Replaced) -> None:
    """A running model notices the change at its next call, and the change back."""
    change = CHANGES[name][0] if name in CHANGES else STATES[name]
    model, events = compiled(make_changeable(), warm_cache)
    with torch.no_grad():
        before = model(INPUTS)
        assert_same(before, eager(model, INPUTS))
        assert "AssemblyLoaded" in names(events)
        change(model, replaced)
        expected = eager(model, INPUTS)
        assert_same(model(INPUTS), expected)
        assert_same(model(INPUTS), expected)
        if name in STATES:
            assert not is_current(model)
        else:
            assert not torch.equal(before, expected)
        replaced.close()
        for _ in range(2):
            assert_same(model(INPUTS), eager(model, INPUTS))


def is_current(model: Any) -> bool:
    """Whether the assembly that was bound first would serve a call now."""
    return bool(model._compiled_call_impl.loaded[0].bound.is_current())


@pytest.mark.parametrize(
    "name", [name for name in CHANGES if not isinstance(CHANGES[name][1], str)]
)
def test_it_would_be_missed_before_the_start(name: str, tmp_path: Path, replaced: Replaced) -> None:
    """Without the check the output is wrong."""
    change, off = CHANGES[name]
    for turn_off in off:
        assert callable(turn_off)
        turn_off(replaced)
    start_cold(make_changeable(), tmp_path, INPUTS)
    model = make_changeable()
    with torch.no_grad():
        change(model, replaced)
        model, events = compiled(model, tmp_path)
        assert is_wrong(model, INPUTS)
    assert "AssemblyLoaded" in names(events)


@pytest.mark.parametrize("name", STATES)
def test_a_state_would_be_missed_before_the_start(
    name: str, tmp_path: Path, replaced: Replaced
) -> None:
    """Without the check the assembly is used. Whether that shows depends on the hardware."""
    without_state(replaced)
    start_cold(make_changeable(), tmp_path, INPUTS)
    model = make_changeable()
    with torch.no_grad():
        STATES[name](model, replaced)
        model, events = compiled(model, tmp_path)
        model(INPUTS)
    assert "AssemblyLoaded" in names(events)


_SEEN_ANYWAY = (
    "own hook",  # The model's own hooks run around the compiled call.
    "in place",  # The weights are the same tensors.
    "function mode",
    "global hook",  # The dispatcher asks for these itself.
    "dtype",  # The text of the pieces refuses other dtypes, and eager answers.
    "data",  # The text reads the parameter, and with it its new data.
)


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in _SEEN_ANYWAY])
def test_it_would_be_missed_after_the_start(
    name: str, warm_cache: Path, replaced: Replaced
) -> None:
    """A model that does not look again at each call computes what it computed before."""
    without_attention(replaced)
    model, _ = compiled(make_changeable(), warm_cache)
    with torch.no_grad():
        model(INPUTS)
        CHANGES[name][0](model, replaced)
        assert is_wrong(model, INPUTS)


def test_a_weight_changed_in_place_stays_bound(tmp_path: Path) -> None:
    """It needs no second look: the code runs on the same tensors."""
    model, events = compiled(make_net(), tmp_path)
    with torch.no_grad():
        model(INPUTS)
        bound = model._compiled_call_impl.loaded[0].bound
        events.clear()
        for parameter in model.parameters():
            parameter.add_(1)
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        assert_same(model(INPUTS), eager(model, INPUTS))
        assert is_current(model)
    assert model._compiled_call_impl.loaded[0].bound is bound
    assert events == []


def test_functional_call(tmp_path: Path) -> None:
    """Weights lent for one call are used for that call and no longer."""
    model, _ = compiled(make_net(), tmp_path)
    lent = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    with torch.no_grad():
        own = model(INPUTS)
        for _ in range(2):
            found = torch.func.functional_call(model, lent, (INPUTS,))
            with models.served_by_nobody(model):
                expected = torch.func.functional_call(model, lent, (INPUTS,))
            assert_same(found, expected)
            assert_same(model(INPUTS), own)


def test_functional_call_would_be_missed(tmp_path: Path, replaced: Replaced) -> None:
    """Without looking again, the lent weights are not used."""
    without_attention(replaced)
    model, _ = compiled(make_net(), tmp_path)
    lent = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    with torch.no_grad():
        own = model(INPUTS)
        assert_same(torch.func.functional_call(model, lent, (INPUTS,)), own)


def test_a_dispatch_mode_sees_every_operator(tmp_path: Path, replaced: Replaced) -> None:
    """Inside a mode that changes what operators do, the model is as eager is there."""
    model, _ = compiled(make_net(), tmp_path)
    with torch.no_grad():
        model(INPUTS)
        replaced.enter(Negating())
        assert_same(model(INPUTS), eager(model, INPUTS))


def test_a_hook_that_takes_another_ones_place(tmp_path: Path) -> None:
    """A layer has a hook before and after, and not the same one."""
    model, _ = compiled(make_net(), tmp_path)
    handle = model.layers[0].up.register_forward_hook(_double)
    with torch.no_grad():
        assert_same(model(INPUTS), eager(model, INPUTS))
        handle.remove()
        model.layers[0].up.register_forward_hook(lambda _, __, output: output - 1)
        assert_same(model(INPUTS), eager(model, INPUTS))


def test_compiled_under_autocast(tmp_path: Path, replaced: Replaced) -> None:
    """Code that was compiled under autocast holds its casts: it is not used without."""
    model, _ = compiled(make_net(), tmp_path)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model(INPUTS), eager(model, INPUTS))
    with torch.no_grad():
        assert_same(model(INPUTS), eager(model, INPUTS))
        model, events = compiled(make_net(), tmp_path)
        assert_same(model(INPUTS), eager(model, INPUTS))
        assert names(events).count("AssemblyLoaded") == 1


def test_autocast_would_be_missed(tmp_path: Path, replaced: Replaced) -> None:
    """Without the check the casts stay."""
    without_state(replaced)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start_cold(make_net(), tmp_path, INPUTS)
    model, _ = compiled(make_net(), tmp_path)
    with torch.no_grad():
        assert is_wrong(model, INPUTS)


# ---------------------------------------------------------------------------
# Functions and closures


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_closure(tmp_path: Path, is_warm: bool) -> None:
    """A value that a function closes over is checked at each start, and watched."""
    if is_warm:
        start_cold(scaled(2.0), tmp_path, INPUTS)
    for factor in (2.0, 3.0):
        function = scaled(factor)
        served, _ = compiled(function, tmp_path)
        with torch.no_grad():
            assert_same(served(INPUTS), function(INPUTS))
            for other in (5.0, 7.0):
                function.change(other)
                assert_same(served(INPUTS), function(INPUTS))


def test_a_closure_would_be_missed(tmp_path: Path, replaced: Replaced) -> None:
    """Without the check of values at a start, and without watching them later."""
    without_values(replaced)
    without_attention(replaced)
    start_cold(scaled(2.0), tmp_path, INPUTS)
    function = scaled(3.0)
    served, _ = compiled(function, tmp_path)
    with torch.no_grad():
        assert_same(served(INPUTS), scaled(2.0)(INPUTS))
        function.change(5.0)
        assert_same(served(INPUTS), scaled(2.0)(INPUTS))


def test_a_closure_of_a_layer(tmp_path: Path) -> None:
    """The same where the function is an attribute of a layer."""
    act = scaled(2.0)
    model, _ = compiled(make_net(act=act), tmp_path)
    with torch.no_grad():
        model(INPUTS)
        act.change(5.0)
        assert_same(model(INPUTS), eager(model, INPUTS))


# ---------------------------------------------------------------------------
# Edited files


_BEFORE = """
import torch
from torch import nn
class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def step(self, x):
        return self.linear(x) * 2
    def forward(self, x):
        return self.step(x) + 1
"""
_EDITS = {
    "a method": ("* 2", "* 3"),
    "forward": ("+ 1", "+ 2"),
    "an operator": ("* 2", "- 2"),
    "a call": ("self.linear(x) * 2", "self.linear(-x) * 2"),
}


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Return a function that writes a module anew and returns a model of it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str) -> Any:
        path = tmp_path / "edited_module.py"
        path.write_text(source)
        os.utime(path, (0, len(source) + hash(source) % 1000))  # Bytecode is cached by the second.
        sys.modules.pop("edited_module", None)
        importlib.invalidate_caches()
        module = importlib.import_module("edited_module")
        torch.manual_seed(0)
        return module.Edited().eval()

    yield make
    sys.modules.pop("edited_module", None)


@pytest.mark.parametrize("edit", _EDITS)
@pytest.mark.parametrize("is_checked", [True, False])
def test_an_edited_file(
    edit: str, is_checked: bool, edited: Any, tmp_path: Path, replaced: Replaced
) -> None:
    """Code that was edited since is not what was compiled; with digests off it would be."""
    if not is_checked:
        without_code(replaced)
    inputs = torch.ones(3, 4)
    start_cold(edited(_BEFORE), tmp_path / "cache", inputs)
    model, _ = compiled(edited(_BEFORE.replace(*_EDITS[edit])), tmp_path / "cache")
    with torch.no_grad():
        assert is_wrong(model, inputs) is not is_checked


def test_code_that_only_moved_is_the_same(edited: Any, tmp_path: Path) -> None:
    """A comment, or a line more above, makes no miss."""
    inputs = torch.ones(3, 4)
    start_cold(edited(_BEFORE), tmp_path / "cache", inputs)
    model, events = compiled(edited(f"# A comment\n\n{_BEFORE}"), tmp_path / "cache")
    with torch.no_grad():
        assert_same(model(inputs), eager(model, inputs))
    assert "AssemblyLoaded" in names(events)


_PROGRAM = """
import sys, torch
from edited_module import Edited
from system.models import compiled, names, assert_same, eager
torch.manual_seed(0)
model, events = compiled(Edited().eval(), sys.argv[1])
with torch.no_grad():
    assert_same(model(torch.ones(3, 4)), eager(model, torch.ones(3, 4)))
print("AssemblyLoaded" in names(events))
"""


def test_an_edited_file_in_a_new_process(tmp_path: Path, run_python: Any) -> None:
    """The same, in processes of their own: warm as long as nothing was edited."""
    source = tmp_path / "edited_module.py"
    source.write_text(_BEFORE)
    found = [run_python(_PROGRAM, tmp_path / "cache"), run_python(_PROGRAM, tmp_path / "cache")]
    source.write_text(_BEFORE.replace("* 2", "* 33"))
    found.append(run_python(_PROGRAM, tmp_path / "cache"))
    assert [line.strip() for line in found] == ["False", "True", "False"]


# ---------------------------------------------------------------------------
# Another CPU


_OTHER_CPU = """
import sys, torch
import precast.graph.key as key
from system.models import compiled, names, make_plain, assert_same, eager
if sys.argv[2] != "checked":
    key.cpu_identity = lambda: sys.argv[2]
model, events = compiled(make_plain(), sys.argv[1], compiler="auto", compilation_level="full",
                         mode="cache_only")
with torch.no_grad():
    found, expected = model(torch.ones(3, 16)), eager(model, torch.ones(3, 16))
if sys.argv[2] == "checked":
    assert_same(found, expected, exact=False)
print("AssemblyLoaded" in names(events), "PieceLoaded" in names(events))
"""


@pytest.mark.compile
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="needs an x86 CPU"
)
def test_another_instruction_set(real_cache: Path, run_python: Any) -> None:
    """
    An artifact for this CPU is not opened where torch uses fewer instructions.

    With the CPU left out of the keys it is. (torch's own cache does that, and returned NaN.)
    """
    from precast.graph.key import cpu_identity

    fewer = {"AVX512": "avx2", "AVX2": "default"}[torch.backends.cpu.get_cpu_capability()]
    same = run_python(_OTHER_CPU, real_cache, "checked")
    other = run_python(_OTHER_CPU, real_cache, "checked", ATEN_CPU_CAPABILITY=fewer)
    unchecked = run_python(_OTHER_CPU, real_cache, cpu_identity(), ATEN_CPU_CAPABILITY=fewer)
    assert [same.split(), other.split(), unchecked.split()] == [
        ["True", "True"],
        ["False", "False"],
        ["True", "True"],
    ]


# ---------------------------------------------------------------------------
# Other calls


def _inputs_of_kinds() -> dict[str, Any]:
    return {
        "more dimensions": torch.ones(2, 3, 8),
        "one dimension": torch.ones(8),
        "float64": torch.ones(3, 8, dtype=torch.float64),
        "integers": torch.ones(3, 8, dtype=torch.int64),
        "transposed": torch.arange(24.0).reshape(8, 3).t(),
        "sliced": torch.arange(96.0).reshape(6, 16)[::2, ::2],
        "expanded": torch.arange(8.0).expand(5, 8),
        "a subclass": torch.arange(24.0).reshape(3, 8).as_subclass(Doubled),
        "a parameter": nn.Parameter(torch.ones(3, 8), requires_grad=False),
    }


class Doubled(torch.Tensor):
    """A tensor whose additions are something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return output * 2 if func is functional.layer_norm else output


@pytest.mark.parametrize("name", _inputs_of_kinds())
def test_another_kind_of_input(name: str, tmp_path: Path) -> None:
    """Code for one kind of input does not serve another one, in this process and a later one."""
    inputs = _inputs_of_kinds()[name]
    start_cold(make_net(), tmp_path, INPUTS)
    for _ in range(2):
        model, _ = compiled(make_net(), tmp_path, on_error="eager")
        with torch.no_grad():
            assert_same(model(INPUTS), eager(model, INPUTS))
            assert_same(model(inputs), eager(model, inputs))
            assert_same(model(INPUTS), eager(model, INPUTS))


def test_another_input_would_be_taken(tmp_path: Path, replaced: Replaced) -> None:
    """Without the call check code for one number of dimensions serves another one, or fails."""
    replaced.attribute(assembly.LoadedAssembly, "why_not", lambda *_: None)
    opened = assembly.open_assembly

    def without_check(*args: Any) -> Any:
        loaded = opened(*args)
        loaded.check = lambda *_, **__: 0
        return loaded

    for module in (candidates, assemblies):
        replaced.attribute(module, "open_assembly", without_check)
    function = torch.nn.functional.pad

    def padded(x: torch.Tensor, by: int) -> torch.Tensor:
        return function(x, (by, by))

    served, _ = compiled(padded, tmp_path)
    with torch.no_grad(), suppress(RuntimeError):
        assert_same(served(INPUTS, 1), padded(INPUTS, 1))
        assert not torch.equal(served(INPUTS, 2), padded(INPUTS, 2))
