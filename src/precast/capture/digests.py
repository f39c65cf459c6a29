"""Digests of the Python code that a capture depends on, each with a path that finds it again.

That is what Dynamo inlined, and the functions of others that a graph calls by name. What torch's
and Python's own builds settle is left out: both builds are in the key.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from precast.contract import Unrecordable, digest_code, file_digest, has_fixed_code, unwrap


def code_digests(
    traced: Sequence[types.CodeType], function: types.FunctionType, owner: Any
) -> tuple[list[list[str]], list[list[str]]]:
    """Return ([path, digest] of every function that was inlined, [module, digest] of files).

    A function that no path leads to (made in another function's body, say) counts through
    the code that contains it, else through its module's source file.
    """
    wanted = own_code(traced, function)
    paths = _paths(function, owner, {module for module in wanted.values() if module})
    found: dict[str, str] = {}
    files: dict[str, str] = {}
    for code, module in wanted.items():
        known = paths.get(code, [])
        if not known and module is None:
            path = _generated_path(code)
            known = [] if path is None else [(path, code)]
        if known:
            found.update((path, digest_code(root)) for path, root in known)
        elif module is not None and file_digest(module):
            files[module] = file_digest(module)
        elif code.co_filename.startswith("<") and _is_made_by_library(code):
            continue
        else:
            raise Unrecordable(f"the code of {code.co_name} in {code.co_filename} has no name")
    return sorted([path, digest] for path, digest in found.items()), sorted(
        [module, digest] for module, digest in files.items()
    )


def own_code(
    traced: Sequence[types.CodeType], function: types.FunctionType
) -> dict[types.CodeType, str | None]:
    """Return what was traced and no build settles, with the modules that it is in."""
    modules = _modules_by_file()
    wanted: dict[types.CodeType, str | None] = {}
    for code in (function.__code__, *traced):
        module = modules.get(code.co_filename)
        is_library = module is not None and has_fixed_code(module)
        if not is_library and not code.co_filename.startswith("<frozen "):
            wanted[code] = module
    return wanted


def native_digests(targets: Iterable[str]) -> list[list[str]]:
    """Return [path, digest] of the Python functions that the execution code calls by name.

    Dynamo does not look inside of what is allowed in a graph, so it traced none of their code.
    """
    from precast.graph.targets import module_of, resolve_target

    found = []
    for name in targets:
        function = resolve_target(name)
        module = module_of(name)
        if isinstance(function, types.FunctionType) and not has_fixed_code(module):
            path = f"{module}:{name.removeprefix(module).lstrip('.')}"
            found.append([path, digest_code(function.__code__)])
    return found


def _generated_path(code: types.CodeType) -> str | None:
    """Find a method that was generated for a class (a dataclass's `__init__`), in any module."""
    for name, module in list(sys.modules.items()):
        if has_fixed_code(name):
            continue
        for kind in list(getattr(module, "__dict__", {}).values()):
            if not isinstance(kind, type):
                continue
            found = kind.__dict__.get(code.co_name)
            if getattr(found, "__code__", None) is code:
                return f"{kind.__module__}:{kind.__qualname__}.{code.co_name}"
    return None


def _is_made_by_library(code: types.CodeType) -> bool:
    """Whether code without a file comes from torch's own code generation."""
    return code.co_filename.startswith("<eval_with_key>")


def _modules_by_file() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str):
            # `__main__` may be known under its own name too: the first one wins.
            found.setdefault(path, name)
    return found


def _paths(
    function: types.FunctionType, owner: Any, modules: set[str]
) -> dict[types.CodeType, list[tuple[str, types.CodeType]]]:
    """Code -> (path, code) of every name that leads to it; else of one that contains it.

    Every name: a function of a module that was put in the place of a class's method must be
    found there again, where the call looks for it, and not only where it was defined.
    """
    found: dict[types.CodeType, list[tuple[str, types.CodeType]]] = {}
    containers: dict[types.CodeType, list[tuple[str, types.CodeType]]] = {}

    def enter(value: Any, path: str, depth: int = 0) -> None:
        if depth > 4:
            return
        code = getattr(value, "__code__", None)
        if isinstance(code, types.CodeType):
            found.setdefault(code, []).append((path, code))
            for inner in _with_nested(code):
                containers.setdefault(inner, [(path, code)])
        for step in _steps_into(value):
            enter(unwrap(value, step), f"{path}/{step}", depth + 1)

    enter(function, "@")
    classes: dict[type, None] = {}
    if owner is not None and hasattr(owner, "modules"):
        for module in owner.modules():
            classes.update(dict.fromkeys(type(module).__mro__))
    for name in sorted(modules):
        for key, value in list(vars(sys.modules[name]).items()):
            if isinstance(value, type):
                if value.__module__ == name:
                    classes.setdefault(value)
            elif getattr(value, "__module__", None) == name or hasattr(value, "__wrapped__"):
                enter(value, f"{name}:{key}")
    for kind in classes:
        if has_fixed_code(kind.__module__) or "<locals>" in kind.__qualname__:
            continue
        for key, value in list(vars(kind).items()):
            enter(value, f"{kind.__module__}:{kind.__qualname__}.{key}")
    return {**containers, **found}


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _steps_into(value: Any) -> Iterator[str]:
    if isinstance(value, property):
        yield "fget"
    elif isinstance(value, staticmethod | classmethod | types.MethodType):
        yield "__func__"
    elif isinstance(value, partial):
        yield "func"
    elif isinstance(value, types.FunctionType):
        if hasattr(value, "__wrapped__"):
            yield "__wrapped__"
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            if isinstance(content, types.FunctionType | types.MethodType | partial):
                yield f"cell:{name}"
