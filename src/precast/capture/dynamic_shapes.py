"""Which sizes of a call's tensors may vary, told to Dynamo by marks on the tensors.

The marks are for one capture and taken off again: the tensors are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from precast.capture.fingerprint import tensors_in

# Sizes of these many dimensions are left as they are, but for the first: a picture's or a
# convolution's sizes enter a model's control flow, and code for any size is slower there.
_MOST_DYNAMIC_DIMS = 3


def mark_dynamic(
    function: Callable[..., Any],
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
) -> list[Any]:
    """Mark sizes of the call's tensors as dynamic for the next capture; return what was marked.

    By default every size of every tensor that the call passes in plain containers may
    vary, except those above `_MOST_DYNAMIC_DIMS` dimensions, of which the first only; what
    the model's own code settles becomes static again while tracing.
    """
    marked: list[Any] = []
    if dynamic_shapes is None:
        for tensor in tensors_in((args, kwargs)):
            dims = range(tensor.dim() if tensor.dim() <= _MOST_DYNAMIC_DIMS else 1)
            for dim in dims:
                # 0 and 1 are special to models (`is_causal = length > 1`): code of their own.
                if tensor.shape[dim] > 1:
                    _mark(tensor, dim, None)
            marked.append(tensor)
        return marked
    import inspect

    full = args if owner is None else (owner, *args)
    bound = inspect.signature(function, follow_wrapped=False).bind(*full, **kwargs)
    named = dict(bound.arguments)
    if owner is not None:
        named.pop(next(iter(named)))
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    wishes = dynamic_shapes
    if isinstance(wishes, tuple | list):
        wishes = dict(zip(named, wishes, strict=False))
    for name, wish in wishes.items():
        _mark_tree(named.get(name), wish, marked)
    return marked


def _mark_tree(value: Any, wish: Any, marked: list[Any]) -> None:
    if wish is None or value is None:
        return
    if isinstance(value, torch.Tensor):
        entries = wish.items() if isinstance(wish, Mapping) else enumerate(wish)
        for dim, size in entries:
            if size is not None and not isinstance(size, int):
                _mark(value, dim, size)
        marked.append(value)
    elif isinstance(value, Mapping):
        for key, item in wish.items():
            _mark_tree(value.get(key), item, marked)
    elif isinstance(value, tuple | list):
        for item, part in zip(value, wish, strict=False):
            _mark_tree(item, part, marked)


def _mark(tensor: Any, dim: int, size: Any) -> None:
    import torch._dynamo as dynamo

    name = type(size).__name__
    low, high = getattr(size, "min", None), getattr(size, "max", None)
    if size is None or name == "_DimHint" or (low is None and high is None):
        if "STATIC" not in str(getattr(size, "type", "")):
            dynamo.maybe_mark_dynamic(tensor, dim)
    else:
        high = None if high is not None and high > 2**31 else high
        dynamo.mark_dynamic(tensor, dim, min=low or None, max=high)


def unmark_dynamic(tensor: Any) -> None:
    """Take Dynamo's marks off a user's tensor again."""
    for name in [name for name in vars(tensor) if name.startswith(("_dynamo_", "_has_dynamo"))]:
        delattr(tensor, name)
