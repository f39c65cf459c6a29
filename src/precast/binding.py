"""An assembly's contract, held against a model: bound to its weights, or refused in words.

Three moments, three costs: `bind` checks everything that depends on the model once, at load
(milliseconds); `Binding.is_current` asks at every call whether anything that was checked may
have changed since (microseconds, loops in C); the call's own arguments are checked by generated
code (`capture/call_check.py`). What is checked was recorded as data (`contract.py`).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from operator import getitem, is_
from typing import Any

from precast.contract import (
    Contract,
    Unrecordable,
    ambient_state,
    decode,
    digest_code,
    encode,
    file_digest,
    find_code,
    hooks_of,
    is_fixed,
    tensor_spec,
)
from precast.errors import Reason

#: Ends a reason for not binding: what is done about it.
CAPTURED_AGAIN = "; the model is captured again"


class Binding:
    """One contract checked against one model: the weights, and a cheap "is it still so?".

    `weights` are the tensors in the contract's order. Immutable: a change of the model is
    answered with a new binding, so that threads inside a call keep a consistent one.
    """

    __slots__ = (
        "_data_ptr",
        "_held_values",
        "_holders",
        "_hook_dicts",
        "_hook_truth",
        "_is_hooked",
        "_keys",
        "_pointers",
        "_sized",
        "_sizes",
        "_state_guard",
        "weights",
    )

    def __init__(
        self,
        *,
        weights: list[Any],
        places: Sequence[tuple[Any, Any, Any]],
        sized: Sequence[Any],
        hook_dicts: list[Any],
        state_guard: Callable[[], bool],
        data_ptr: Callable[[Any], int],
    ) -> None:
        self.weights = weights
        self._data_ptr = data_ptr
        self._pointers = list(map(data_ptr, weights))
        # Many paths lead through one place: each is asked once.
        unique = {(id(holder), key): (holder, key, value) for holder, key, value in places}
        self._holders = [holder for holder, _, _ in unique.values()]
        self._keys = [key for _, key, _ in unique.values()]
        # The very objects: compared by identity, which no other object can take on while they live.
        self._held_values = [value for _, _, value in unique.values()]
        self._sized = list({id(container): container for container in sized}.values())
        self._sizes = list(map(len, self._sized))
        self._hook_dicts = hook_dicts
        self._hook_truth = list(map(bool, hook_dicts))
        self._is_hooked = any(self._hook_truth)
        self._state_guard = state_guard

    def note_moved(self) -> None:
        """Take the weights' memory as it is now: whoever bound them has moved them."""
        self._pointers = list(map(self._data_ptr, self.weights))

    def is_current(self) -> bool:
        """Whether nothing that was checked at load has been touched since.

        False is no verdict: the contract must then be checked again in full.
        """
        try:
            # Asking for what a function has none of takes longer than to ask whether it has any.
            return (
                self._state_guard()
                and all(map(is_, map(getitem, self._holders, self._keys), self._held_values))
                and (not self.weights or list(map(self._data_ptr, self.weights)) == self._pointers)
                and (not self._sized or list(map(len, self._sized)) == self._sizes)
                and (
                    list(map(bool, self._hook_dicts)) == self._hook_truth
                    if self._is_hooked
                    else not any(self._hook_dicts)
                )
            )
        except (LookupError, TypeError, AttributeError, RuntimeError):
            return False


def bind(
    contract: Contract,
    function: types.FunctionType,
    owner: Any,
    *,
    gpu: int | None = None,
    state: Mapping[str, Any] | None = None,
) -> Binding | Reason:
    """Check a contract against the model as it is now.

    Args:
        contract: What must hold.
        function: The function that was captured (`type(model).forward`, unbound).
        owner: The model that the function is a method of, or None for a plain function.
        gpu: The number of the GPU that the code is opened for.
        state: `ambient_state()` if the caller has it already.

    Returns:
        The binding, or the reason why the assembly is not for this model.
    """
    try:
        return _bind(contract, function, owner, gpu, ambient_state() if state is None else state)
    except Mismatch as mismatch:
        return Reason(
            "outside-contract",
            f"{mismatch}{CAPTURED_AGAIN}",
            "Nothing to do: the new capture has an assembly of its own",
        )


def what_differs(reason: Reason) -> str:
    """Return what a reason for not binding says, without what is done about it."""
    return reason.message.removesuffix(CAPTURED_AGAIN)


class Mismatch(Exception):  # noqa: N818 - a finding that is answered, not an error that is shown.
    """Something that the contract asks for does not hold; the text says what."""


def state_guard() -> Callable[[], bool]:
    """Return a fast check that the process's state is what it is now.

    Whether gradients are recorded does not count: who serves a call decides that.
    """
    import torch
    from torch._C._dynamo import guards  # In the C library: Dynamo is not imported.
    from torch.autograd import forward_ad

    is_grad_enabled = torch.is_grad_enabled
    before = is_grad_enabled()
    checks = []
    try:
        for is_enabled in (False, True):
            torch._C._set_grad_enabled(is_enabled)
            checks.append(guards.GlobalStateGuard().check)
    finally:
        torch._C._set_grad_enabled(before)
    # What that guard leaves out, and `ambient_state` has.
    num_functions = torch._C._len_torch_function_stack
    num_dispatches = torch._C._len_torch_dispatch_stack
    flash, memory_efficient, plain, mkldnn = (
        torch._C._get_flash_sdp_enabled,
        torch._C._get_mem_efficient_sdp_enabled,
        torch._C._get_math_sdp_enabled,
        torch._C._get_mkldnn_enabled,
    )
    functions_before, dispatches_before = num_functions(), num_dispatches()
    flash_before, efficient_before = flash(), memory_efficient()
    plain_before, mkldnn_before = plain(), mkldnn()

    def check() -> bool:
        return (
            checks[is_grad_enabled()]()
            and flash() is flash_before
            and memory_efficient() is efficient_before
            and plain() is plain_before
            and mkldnn() is mkldnn_before
            and num_functions() == functions_before
            and num_dispatches() == dispatches_before
            and forward_ad._current_level < 0  # Compiled code has no tangents.
        )

    return check


class _Attributes:
    """An object's attributes as items, for those that lie in no dictionary: slots, cells."""

    __slots__ = ("_owner",)

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner, name)


class _Contains:
    """Whether a set holds a key, as an item: its size alone does not tell."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Any) -> None:
        self._keys = keys

    def __getitem__(self, key: Any) -> bool:
        return key in self._keys


def _bind(
    contract: Contract,
    function: types.FunctionType,
    owner: Any,
    gpu: int | None,
    state: Mapping[str, Any],
) -> Binding:
    import torch

    if dict(state) != contract.state:
        changed = [
            f"{name} is {state.get(name)!r}, was {value!r}"
            for name, value in contract.state.items()
            if state.get(name) != value
        ]
        raise Mismatch("; ".join(changed) or "the process's state has other fields")
    places: list[tuple[Any, Any, Any]] = []
    for path, digest in contract.code:
        code = find_code(path, function, places)
        if code is None or digest_code(code) != digest:
            raise Mismatch(f"the code of {path} {'is gone' if code is None else 'was edited'}")
    for name, digest in contract.files:
        if file_digest(name) != digest:
            raise Mismatch(f"the source file of {name} has changed")

    values = _evaluate(contract, function, owner, places)
    for name in ("__defaults__", "__kwdefaults__"):
        if getattr(function, name):  # The call check and the entry code have them too.
            places.append((_Attributes(function), name, getattr(function, name)))
    sized: list[Any] = []
    if isinstance(owner, torch.nn.Module):
        # Another `forward`, of the class or of the object alone, is another model.
        _attribute(owner, "forward", places)
        places.append((_Attributes(owner), "__class__", type(owner)))
        sized.append(owner.__dict__)
        for kind in dict.fromkeys(map(type, owner.modules())):
            if is_fixed(kind.__module__):
                _require_own_forward(kind, places)
    for index, kind, payload in contract.checks:
        if not _holds(kind, payload, values[index], values, sized, gpu):
            raise Mismatch(_describe(contract, index, kind, payload, values[index]))
        if kind == "has_key" and type(values[index]) is set:
            places.append((_Contains(values[index]), payload[0], payload[1]))
    weights = [values[index] for index in contract.weights]
    # Most weights have a check of their own, which held: they are not asked twice.
    checked = {index: payload for index, kind, payload in contract.checks if kind == "tensor"}
    for index, tensor, spec in zip(contract.weights, weights, contract.specs, strict=True):
        if checked.get(index) == spec and isinstance(tensor, torch.Tensor):
            continue
        if not isinstance(tensor, torch.Tensor) or tensor_spec(tensor, gpu) != spec:
            found = tensor_spec(tensor, gpu) if isinstance(tensor, torch.Tensor) else type(tensor)
            raise Mismatch(f"{contract.node_name(index)} is {found}, was {spec}")

    hook_dicts: list[Any] = []
    if isinstance(owner, torch.nn.Module):
        hook_dicts = _hook_dicts(owner, contract.hooks, places, sized)
    return Binding(
        weights=weights,
        places=places,
        sized=sized,
        hook_dicts=hook_dicts,
        state_guard=state_guard(),
        data_ptr=torch.Tensor.data_ptr,
    )


def _require_own_forward(kind: type, places: list[tuple[Any, Any, Any]]) -> None:
    """Refuse a class of torch whose `forward` somebody replaced: it counts as settled."""
    for base in kind.__mro__:
        found = base.__dict__.get("forward")
        if found is not None:
            if not is_fixed(getattr(found, "__module__", None) or ""):
                raise Mismatch(f"{kind.__module__}.{kind.__qualname__}.forward was replaced")
            places.append((base.__dict__, "forward", found))
            return


def _hook_dicts(
    owner: Any,
    allowed: Mapping[str, Any],
    places: list[tuple[Any, Any, Any]],
    sized: list[Any],
) -> list[Any]:
    import torch.nn.modules.module as module_module

    found: list[Any] = [
        module_module._global_forward_hooks,
        module_module._global_forward_pre_hooks,
    ]
    if any(found):
        raise Mismatch("a global forward hook is registered")
    for name, module in owner.named_modules():
        # The model's own hooks are run around the compiled call, see `runtime/dispatch`.
        if name:
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            found.extend(hooks)
            if any(hooks) != (name in allowed):
                raise Mismatch(f"the hooks of {name} have changed")
            if any(hooks):
                _watch_hooks(name, module, allowed[name], places, sized)
    return found


def _watch_hooks(
    name: str,
    module: Any,
    expected: Any,
    places: list[tuple[Any, Any, Any]],
    sized: list[Any],
) -> None:
    try:
        is_same = hooks_of(module) == expected
    except Unrecordable:
        is_same = False
    if not is_same:
        raise Mismatch(f"the hooks of {name} have changed")
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        sized.append(hooks)
        for key, hook in hooks.items():
            places.append((hooks, key, hook))
            for part in ("__code__", "__defaults__", "__kwdefaults__"):
                places.append((_Attributes(hook), part, getattr(hook, part)))


def _evaluate(
    contract: Contract,
    function: types.FunctionType,
    owner: Any,
    places: list[tuple[Any, Any, Any]],
) -> list[Any]:
    """Read every place of the contract, and note where each was found for `is_current`."""
    code = function.__code__
    bound_locals: dict[str, Any] = {}
    if code.co_argcount and owner is not None:
        bound_locals[code.co_varnames[0]] = owner
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            bound_locals[name] = cell.cell_contents
        except ValueError as error:
            raise Mismatch(f"the closure's {name} is empty") from error
        places.append((_Attributes(cell), "cell_contents", bound_locals[name]))
    values: list[Any] = []
    for index, (parent, step, key) in enumerate(contract.nodes):
        try:
            if parent == -1:
                value = bound_locals[key]
            elif parent == -2:
                value = _global(contract, function, key, places)
            elif parent == -3:
                value = decode(["type", key])
            else:
                base = values[parent]
                if step == "a":
                    value = _attribute(base, key, places)
                elif step == "i":
                    item = tuple(key) if type(key) is list else key
                    value = base[item]
                    # What makes each item anew cannot be watched by identity.
                    if type(base) is dict or type(base) is list or base[item] is value:
                        places.append((base, item, value))
                elif step == "t":
                    value = type(base)
                elif step == "g":
                    value = object.__getattribute__(base, key)
                    own = object.__getattribute__(base, "__dict__")
                    if key in own:
                        places.append((own, key, value))
                elif step == "k":
                    value = [*base][key]
                elif step == "v":
                    value = [*dict.values(base)][key]
                else:
                    value = len(base)
        except (LookupError, AttributeError, TypeError, ImportError) as error:
            raise Mismatch(f"{contract.node_name(index)} is not there ({error})") from error
        values.append(value)
    return values


# Slots, and what Python itself keeps in an object: a cell's contents, a function's defaults.
_FIELD_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _attribute(base: Any, name: str, places: list[tuple[Any, Any, Any]]) -> Any:
    own = getattr(base, "__dict__", None)
    if own is not None and name in own and not isinstance(base, type):
        value = own[name]
        # nn.Module never replaces these three: their contents are places of their own.
        if name not in ("_modules", "_parameters", "_buffers"):
            places.append((own, name, value))
        return value
    value = getattr(base, name)
    for kind in type(base).__mro__ if not isinstance(base, type) else base.__mro__:
        if name in kind.__dict__:
            places.append((kind.__dict__, name, kind.__dict__[name]))
            if type(kind.__dict__[name]) in _FIELD_TYPES and name != "__dict__":
                own_field = _Attributes(base)
                if own_field[name] is value:
                    places.append((own_field, name, value))
            break
    return value


def _global(
    contract: Contract,
    function: types.FunctionType,
    name: str,
    places: list[tuple[Any, Any, Any]],
) -> Any:
    module_name = contract.imports.get(name)
    if module_name is not None:
        module = sys.modules.get(module_name)
        if module is None:
            from importlib import import_module

            module = import_module(module_name)
        return module
    value = function.__globals__[name]
    places.append((function.__globals__, name, value))
    return value


def _holds(
    kind: str, payload: Any, value: Any, values: list[Any], sized: list[Any], gpu: int | None
) -> bool:
    match kind:
        case "value":
            try:
                return bool(encode(value) == payload)
            except Unrecordable:
                return False
        case "type":
            found = type(value)
            return bool(f"{found.__module__}:{found.__qualname__}" == payload)
        case "len":
            sized.append(value)
            return bool(len(value) == payload)
        case "keys":
            sized.append(value)
            return bool([encode(key) for key in value] == payload)
        case "has_key":
            sized.append(value)
            return (payload[0] in value) is payload[1]
        case "has_attr":
            return hasattr(value, payload[0]) is payload[1]
        case "absent":
            own = getattr(value, "__dict__", {})
            sized.append(own)
            return all(name not in own for name in payload)
        case "same":
            return value is values[payload]
        case "tensor":
            return hasattr(value, "stride") and tensor_spec(value, gpu) == payload
    raise Mismatch(f"a check of an unknown kind {kind!r}")


def _describe(contract: Contract, index: int, kind: str, payload: Any, value: Any) -> str:
    name = contract.node_name(index)
    found = repr(value)
    if len(found) > 80:
        found = f"{found[:77]}..."
    match kind:
        case "absent":
            own = [attribute for attribute in payload if attribute in value.__dict__]
            return f"{name} has an attribute {own[0]!r} of its own"
        case "has_key" | "has_attr":
            return f"{name} {'lost' if payload[1] else 'got'} {payload[0]!r}"
        case "same":
            return f"{name} is no longer {contract.node_name(payload)}"
    return f"{name} is {found}, was {payload}"
