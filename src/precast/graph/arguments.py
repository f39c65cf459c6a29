"""An argument of a graph node as Python source: the literals, and the names of other nodes.

What has no literal is refused or handed to the caller's table of constants: a `repr` is for
people, and need not give the value back.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, isnan
from typing import Any


def render_argument(
    value: Any,
    name_of_node: Callable[[Any], str],
    constant: Callable[[Any], str] | None = None,
) -> str:
    """Return source that evaluates to `value`, given `torch` in its namespace.

    Args:
        value: A literal, a node, or a tuple, list, dict, slice or `torch.Size` of those.
        name_of_node: Gives the variable that holds a node's value.
        constant: Gives a name for a value without a literal; without it such a value is refused.

    Raises:
        TypeError: The value has no literal and there is no `constant`; names its type.
    """
    import torch

    def render(value: Any) -> str:
        return render_argument(value, name_of_node, constant)

    # Exact types: an enum is an int, and a named tuple a tuple, that a literal would lose.
    kind = type(value)
    if isinstance(value, torch.fx.Node):
        return name_of_node(value)
    if value is None or kind in (bool, int, str, bytes):
        return repr(value)
    if value is ...:
        return "..."
    if kind is float:
        return repr(value) if isfinite(value) else _special_float(value)
    if kind is complex:
        return f"complex({render(value.real)}, {render(value.imag)})"
    if kind is torch.Size:
        return f"torch.Size([{', '.join(map(render, value))}])"
    if kind is tuple:
        return f"({', '.join(map(render, value))}{',' if len(value) == 1 else ''})"
    if kind is list or (isinstance(value, list) and _is_of_fx(kind)):
        return f"[{', '.join(map(render, value))}]"
    if kind is dict or (isinstance(value, dict) and _is_of_fx(kind)):
        items = (f"{render(key)}: {render(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if kind is slice:
        return f"slice({render(value.start)}, {render(value.stop)}, {render(value.step)})"
    if kind is range:
        return f"range({value.start}, {value.stop}, {value.step})"
    if kind in (torch.dtype, torch.layout, torch.memory_format):
        return str(value)
    if kind is torch.device:
        # A GPU without its number: the current one, which is the model's wherever its code runs.
        has_number = value.index is not None and value.type != "cuda"
        return f"torch.device({value.type!r}{f', {value.index}' if has_number else ''})"
    if constant is not None:
        return constant(value)
    raise TypeError(f"a value of type {kind.__module__}.{kind.__qualname__} has no literal")


def render_call(
    target: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    render: Callable[[Any], str],
) -> str:
    """Return the source of a call of `target`, with keywords that need not be identifiers."""
    from keyword import iskeyword

    parts = [render(arg) for arg in args]
    odd = {}
    for name, value in kwargs.items():
        if name.isidentifier() and not iskeyword(name):
            parts.append(f"{name}={render(value)}")
        else:
            odd[name] = value
    if odd:
        parts.append("**{" + ", ".join(f"{k!r}: {render(v)}" for k, v in odd.items()) + "}")
    return f"{target}({', '.join(parts)})"


def _special_float(value: float) -> str:
    return 'float("nan")' if isnan(value) else f'float("{value}")'


def _is_of_fx(kind: type) -> bool:
    # FX wraps lists and dicts so that they cannot be changed in place.
    return kind.__module__.startswith("torch.fx.") or kind.__name__ in (
        "immutable_list",
        "immutable_dict",
    )
