"""Which capture this is, as one digest: one that failed is not repeated while it is the same.

Taken without tracing, so it cannot know what tracing would read. It errs on one side: what it sees
and tracing does not, a comment in a file say, has a capture tried again. What it does not see (a
function that no module names, what lies deeper in an object than one step) may have a mended model
stay eager until the failure is forgotten, which its message says.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from precast.contract import digest_code, file_digest, has_fixed_code

_SIMPLE = (type(None), bool, int, float, str)
_LARGEST_SETTING = 1 << 40  # What is larger is a hash or an address, and another one each time.
_MOST_MODULES = 2000  # Far more than any model has; to read them is quick.


def attempt_key(
    key: str,
    function: types.FunctionType,
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    """Return the digest of a model's code and settings, and of the plain values of a call.

    Args:
        key: Of the assembly that it is to become: the structure of model and call.
        function: The function to capture, unbound.
        owner: The module that it is a method of; None for a function.
        args: The call's, without the owner.
        kwargs: The call's.
    """
    digest = hashlib.sha256(f"{key} {digest_code(function.__code__)}\n".encode())
    modules = {function.__module__}
    for name, module in _named_modules(owner):
        modules.update(kind.__module__ for kind in type(module).__mro__)
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        digest.update(f"{name}:{_settings(own, 1)}\n".encode())
    digest.update(f"{_settings(args, 2)}{_settings(kwargs, 2)}\n".encode())
    for module_name in sorted(_with_used(modules)):
        digest.update(f"{module_name}:{file_digest(module_name)}\n".encode())
    return digest.hexdigest()


def _named_modules(owner: Any) -> Iterable[tuple[str, Any]]:
    if owner is None:
        return ()
    return owner.named_modules() if hasattr(owner, "named_modules") else [("", owner)]


def _settings(value: Any, depth: int) -> str:
    """Return the plain values in an object as text, and of others their types."""
    kind = type(value)
    if kind in _SIMPLE and not (kind is int and abs(value) > _LARGEST_SETTING):
        return repr(value)
    inner = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else value
    if depth >= 0 and isinstance(inner, dict):
        texts = sorted(f"{key!r}={_settings(item, depth - 1)}" for key, item in inner.items())
        return f"{kind.__qualname__}({', '.join(texts)})"
    if depth >= 0 and kind in (tuple, list):
        return f"{kind.__qualname__}({', '.join(_settings(item, depth - 1) for item in value)})"
    return f"{kind.__module__}.{kind.__qualname__}"


def _with_used(names: set[str]) -> set[str]:
    """Return modules and all whose code they use by name, except what is not edited in place.

    That is what the builds settle, and installed packages other than the model's own.
    """
    roots = {name.partition(".")[0] for name in names}
    found: set[str] = set()
    waiting = list(names)
    while waiting and len(found) < _MOST_MODULES:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in found or module is None or has_fixed_code(name):
            continue
        path = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] not in roots and "-packages" in path:
            continue
        found.add(name)
        waiting.extend(_used_by(module))
    return found


def _used_by(module: types.ModuleType) -> Iterator[str]:
    for value in list(vars(module).values()):
        if isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, types.FunctionType | type):
            yield value.__module__ or ""
