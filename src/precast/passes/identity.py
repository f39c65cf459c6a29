"""A digest that changes when code does: of a function or an object, and of what it refers to.

Source counts as its syntax: comments and layout do not. torch, the standard library and Precast
count by name, since keys hold their versions; other installed packages by name and version.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import textwrap
import types
from typing import Any

from precast.contract import Unrecordable, digest_code, encode, has_fixed_code

_DEEPEST = 40


def identity_of(value: Any) -> str | None:
    """Return the digest; None where something has no text: a tensor, a lock, an open file."""
    reader = _Reader()
    try:
        reader.read(value)
    except Unrecordable:
        return None
    return hashlib.sha256("\n".join(reader.parts).encode()).hexdigest()


class _Reader:
    """Collects what a value consists of; each function and class once."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._seen: set[int] = set()
        self._depth = 0

    def read(self, value: Any) -> None:
        self._depth += 1
        try:
            if self._depth > _DEEPEST:
                raise Unrecordable("it refers to too much")
            self._read(value)
        finally:
            self._depth -= 1

    def _read(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.read(value.__func__)
            self.read(value.__self__)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self.parts.append(f"module {value.__name__}")
        elif type(value) in (tuple, list):
            self.parts.append(f"{type(value).__name__} of {len(value)}")
            for item in value:
                self.read(item)
        elif type(value) is dict:
            self.parts.append(f"dict of {len(value)}")
            for key, item in value.items():
                self.read(key)
                self.read(item)
        else:
            self._other(value)

    def _other(self, value: Any) -> None:
        try:
            self.parts.append(json.dumps(encode(value)))
            return
        except Unrecordable:
            if type(value).__module__.partition(".")[0] in ("torch", "builtins", "_thread"):
                raise
        state = getattr(value, "__dict__", None)
        if state is None:
            raise Unrecordable(f"a {type(value).__name__} has no attributes to look at")
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self.read(type(value))
        for name in sorted(state):
            self.parts.append(name)
            self.read(state[name])

    def _class(self, kind: type) -> None:
        if self._is_settled(kind) or id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        self.parts.append(_syntax(kind) or f"class {kind.__qualname__}")
        for base in kind.__bases__:
            self.read(base)
        for name, value in sorted(vars(kind).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, types.FunctionType):
                self.parts.append(name)
                self._function(function)
            elif not name.startswith("__") and isinstance(value, int | float | str | tuple):
                self.parts.append(name)
                self.read(value)

    def _function(self, function: types.FunctionType) -> None:
        if self._is_settled(function) or id(function) in self._seen:
            return
        self._seen.add(id(function))
        self.parts.append(_syntax(function) or digest_code(function.__code__))
        self.read(function.__defaults__)
        self.read(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:  # Empty.
                self.parts.append("empty cell")
        names = _names(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            self.parts.append(name)
            self._global(function.__globals__[name], names)

    def _global(self, value: Any, names: set[str]) -> None:
        if not isinstance(value, types.ModuleType):
            self.read(value)
            return
        self.parts.append(f"module {value.__name__}")
        if not has_fixed_code(value.__name__) and not _is_ours(value.__name__):
            for name in sorted(names & vars(value).keys()):
                self.parts.append(name)
                self.read(vars(value)[name])

    def _is_settled(self, value: Any) -> bool:
        """Note code that keys know by a version, and say so."""
        module = value.__module__ or ""
        if not (has_fixed_code(module) or _is_ours(module)):
            version = _installed_version(module)
            if version is None:
                return False
            module = f"{version} {module}"
        self.parts.append(f"{module}:{value.__qualname__}")
        return True


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "precast"


def _installed_version(module: str) -> str | None:
    """Return the version of an installed package that says it; None for a user's own code."""
    root = sys.modules.get(module.partition(".")[0])
    version = getattr(root, "__version__", None)
    if version is None or "site-packages" not in str(getattr(root, "__file__", "")):
        return None
    return str(version)


def _syntax(value: Any) -> str | None:
    try:
        return ast.dump(ast.parse(textwrap.dedent(inspect.getsource(value))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None  # A lambda inside of a call, or code that no file holds.


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
