"""A callable's name, such that the name gives back the very same object in another process.

`target_name` and `resolve_target` are inverses. Neither imports anything heavy: a warm start
resolves names, and a name that would bring in Dynamo, Inductor, sympy or Triton is refused when it
is written, not when it is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from keyword import iskeyword
from typing import Any

# Tried in this order, so that one function has one name however the model reached it.
_NAMESPACES = (
    "torch",
    "torch.nn.functional",
    "torch._C._nn",
    "operator",
    "math",
    "builtins",
    "torch.Tensor",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch._C._linalg",
    "torch._C._fft",
    "torch._C._special",
    "torch.amp.autocast_mode",
    "torch._C",
)
_HEAVY = ("torch._dynamo", "torch._inductor", "torch.fx.experimental", "sympy", "triton")


def target_name(target: Callable[..., Any]) -> str | None:
    """Return the dotted name that resolves to exactly this callable; None if there is none.

    An operator of `torch.ops` is named with its overload (`torch.ops.aten.add.Tensor`).
    """
    for name in _candidates(target):
        if is_heavy(name) or not all(_is_name(part) for part in name.split(".")):
            continue
        try:
            if resolve_target(name) is target:
                return name
        except LookupError:
            continue
    return None


def resolve_target(name: str) -> Any:
    """Return the object that a dotted name stands for.

    Raises:
        LookupError: Nothing here has that name: the library that defines it is another version,
            or (for `torch.ops`) has not been imported yet.
    """
    if is_heavy(name):
        raise LookupError(f"{name!r} would import a compiler; no stored code may name it")
    module_name, rest = _split_module(name)
    value: Any = sys.modules[module_name]
    for part in rest:
        try:
            value = getattr(value, part)
        except (AttributeError, RuntimeError, ImportError) as error:
            raise LookupError(f"{name!r} cannot be found: {error}") from error
    return value


def module_of(name: str) -> str:
    """Return the part of a target's name that has to be imported for it to resolve."""
    if name == "torch" or name.startswith("torch."):
        module_name, _ = _split_module(name)
        # What `import torch` brings is reached as an attribute.
        return "torch" if _is_attribute_of_torch(module_name) else module_name
    return _split_module(name)[0]


def is_heavy(name: str) -> bool:
    """Tell whether resolving this name would import a compiler or a tracer."""
    return any(name == root or name.startswith(root + ".") for root in _HEAVY)


def _candidates(target: Any) -> list[str]:
    kind = type(target).__name__
    if kind in ("OpOverload", "OpOverloadPacket"):
        qualified = str(getattr(target, "_qualified_op_name", "")) or target._schema.name
        namespace, _, operator = qualified.partition("::")
        if kind == "OpOverload":
            operator = target._schema.name.partition("::")[2]
            return [f"torch.ops.{namespace}.{operator}.{target._overloadname}"]
        return [f"torch.ops.{namespace}.{operator}"]
    short = getattr(target, "__name__", None)
    if not isinstance(short, str):
        return []
    names = [f"{namespace}.{short}" for namespace in _NAMESPACES]
    module = getattr(target, "__module__", None)
    qualified_name = getattr(target, "__qualname__", None)
    if isinstance(module, str) and isinstance(qualified_name, str):
        if module in ("_operator", "_functools"):
            module = module[1:]
        names.append(f"{module}.{qualified_name}")
        # A function's home is its clearest name, unless torch has given it a public alias.
        if not module.startswith("torch") and module not in _NAMESPACES:
            names.insert(0, names.pop())
    return names


def _split_module(name: str) -> tuple[str, list[str]]:
    """Return the longest prefix that is a module, imported, and the attributes after it.

    A loaded module wins over an import, and an attribute over a submodule of its name, so that
    walking `torch.ops.aten` never searches the disk.
    """
    parts = name.split(".")
    module_name = parts[0]
    module: Any = _import(module_name, name)
    for position in range(1, len(parts)):
        longer = f"{module_name}.{parts[position]}"
        inner = sys.modules.get(longer)
        if inner is None:
            if parts[position] in vars(module) or not hasattr(module, "__path__"):
                return module_name, parts[position:]
            if hasattr(module, parts[position]):
                return module_name, parts[position:]
            inner = _import(longer, name)
        elif vars(module).get(parts[position], inner) is not inner:
            return module_name, parts[position:]  # A function that hides its module.
        module_name, module = longer, inner
    return module_name, []


def _import(module_name: str, name: str) -> Any:
    try:
        return sys.modules.get(module_name) or import_module(module_name)
    except ImportError as error:
        raise LookupError(f"{name!r} cannot be found: {error}") from error


def _is_attribute_of_torch(module_name: str) -> bool:
    value: Any = sys.modules.get("torch")
    for part in module_name.split(".")[1:]:
        value = vars(value).get(part) if value is not None else None
    return value is not None


def _is_name(part: str) -> bool:
    return part.isidentifier() and not iskeyword(part)
