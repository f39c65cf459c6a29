"""Which model and which call this is, found without tracing.

A fingerprint is a name to look assemblies up under, nothing more: it holds the structure
(classes, sub-modules, parameters' dtypes and shapes) and leaves every other fact to the
contract, which decides. Two models of one structure with another epsilon share a
fingerprint and have two assemblies.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def model_fingerprint(function: types.FunctionType, owner: Any) -> str:
    """Return the digest of a model's structure, or of a plain function's name.

    Args:
        function: The captured function, unbound.
        owner: The module it is a method of; None for a function.
    """
    parts = [f"{function.__module__}:{function.__qualname__}"]
    if owner is not None and hasattr(owner, "_modules"):
        _feed_module(owner, "", parts, set())
    elif owner is not None:
        parts.append(_type_name(owner))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _feed_module(module: Any, name: str, parts: list[str], seen: set[int]) -> None:
    if id(module) in seen:
        parts.append(f"{name}=again")
        return
    seen.add(id(module))
    parts.append(f"{name}:{_type_name(module)}")
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None:
                parts.append(f"{key}:{tensor.dtype}{tuple(tensor.shape)}{tensor.device.type}")
    for key, child in module._modules.items():
        if child is not None:
            _feed_module(child, key, parts, seen)


def arguments_in_order(
    function: Any, num_owners: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, int | str, Any]]:
    """Return a call's arguments in one order, however it is written: `f(x)` as `f(x=x)`.

    Args:
        function: That is called.
        num_owners: How many arguments of it come before `args`.
        args: Of the call.
        kwargs: Of the call.

    Returns:
        For each argument its parameter's name ("" for more than there are names), its place (a
        position in `args`, or a keyword), and its value.
    """
    code = getattr(function, "__code__", None)
    names = () if code is None else code.co_varnames[num_owners : code.co_argcount]
    if any(name in kwargs for name in names[: len(args)]):
        names = ()  # Two values for one parameter, or a name of `**kwargs`: as it is written.
    found: list[tuple[str, int | str, Any]] = []
    for number, name in enumerate(names):
        if number < len(args):
            found.append((name, number, args[number]))
        elif name in kwargs:
            found.append((name, name, kwargs[name]))
    found.extend(("", number, args[number]) for number in range(len(names), len(args)))
    found.extend((name, name, kwargs[name]) for name in sorted(kwargs.keys() - set(names)))
    return found


def call_signature(
    function: Any, num_owners: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Return a call's structure: containers, tensors' dtypes and ranks, types of all else.

    Sizes stay out: one assembly covers ranges of them, and its contract knows which. So do
    arguments that are their parameter's default. For their order see `arguments_in_order`.
    """
    defaults = _simple_defaults(function)
    parts: list[str] = []
    for name, _, value in arguments_in_order(function, num_owners, args, kwargs):
        if name in defaults and value is defaults[name]:
            continue
        parts.append(f"{name}=")
        _feed_value(value, parts)
    return " ".join(parts)


def _simple_defaults(function: Any) -> dict[str, Any]:
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    given = function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    found = {**dict(zip(names, given, strict=True)), **(function.__kwdefaults__ or {})}
    simple = (type(None), bool, int, float, str)
    return {name: value for name, value in found.items() if type(value) in simple}


def _feed_value(value: Any, parts: list[str]) -> None:
    kind = type(value)
    if kind in (tuple, list):
        parts.append("(" if kind is tuple else "[")
        for item in value:
            _feed_value(item, parts)
        parts.append(")" if kind is tuple else "]")
    elif kind is dict:
        parts.append("{")
        for key in value:
            parts.append(f"{key!r}:" if isinstance(key, str | int) else f"{_type_name(key)}:")
            _feed_value(value[key], parts)
        parts.append("}")
    elif isinstance(value, torch.Tensor):
        parts.append(f"{value.dtype}/{value.dim()}/{value.device.type}")
    else:
        parts.append(_type_name(value))


def _type_name(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def example_shapes(
    function: Any, num_owners: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[list[int]]:
    """Return the shapes of the tensors that a call passes in plain containers, in order.

    That is the order of `arguments_in_order`.
    """
    arguments = arguments_in_order(function, num_owners, args, kwargs)
    return [list(tensor.shape) for _, _, value in arguments for tensor in tensors_in(value)]


def like_example(
    function: Any,
    num_owners: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Sequence[Sequence[int]],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return a call's arguments with new tensors of the given shapes, of no particular values.

    Nothing of the call is kept alive by them, and they have no memory of their own. None
    where that cannot be: another number of tensors, or strides that are not the plain ones.
    """
    remaining = list(shapes)

    def replace(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape = tuple(remaining.pop(0))
            if shape == tuple(value.shape):
                alike = value.new_empty(()).new_empty_strided(shape, value.stride())
            elif value.is_contiguous():
                alike = value.new_empty(shape)
            else:
                raise ValueError
            if alike.device.type != "meta":
                alike.untyped_storage().resize_(0)
            return alike
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(replace(item) for item in value)
        return value

    new_args, new_kwargs = list(args), dict(kwargs)
    try:
        for _, place, value in arguments_in_order(function, num_owners, args, kwargs):
            if isinstance(place, int):
                new_args[place] = replace(value)
            else:
                new_kwargs[place] = replace(value)
    except (ValueError, IndexError):
        return None
    return None if remaining else (tuple(new_args), new_kwargs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors in plain containers, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif type(value) in (tuple, list):
        for item in value:
            yield from tensors_in(item)
