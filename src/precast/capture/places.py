"""Places that guards are about, as steps from a root: what an expression of Dynamo's reads.

A root is a name of `L`, the function's locals, of `G`, its globals, or a class (`T`). A `Scope`
says whose it is; what has to hold at a place is for `guards.py`.
"""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Mapping
from typing import Any

from precast.contract import Unrecordable, is_fixed

Path = tuple[tuple[str, Any], ...]


class Scope:
    """Which roots a guard may have, and whose they are."""

    def __init__(
        self,
        function: types.FunctionType,
        has_owner: bool,
        import_sources: Mapping[str, str],
        live_globals: Mapping[str, Any],
    ) -> None:
        code = function.__code__
        self.owner_name = code.co_varnames[0] if has_owner and code.co_argcount else None
        self.free_names = frozenset(code.co_freevars)
        count = code.co_argcount + code.co_kwonlyargcount
        flags = code.co_flags
        variadic = bool(flags & 0x04) + bool(flags & 0x08)
        self.argument_names = code.co_varnames[: count + variadic]
        self.variadic_names = code.co_varnames[count : count + variadic]
        self.import_sources = import_sources
        self._globals = live_globals

    def is_bound(self, root: str, name: str) -> bool:
        """Whether a place under this root is the model's or a module's, not the call's."""
        return root in ("G", "T") or name == self.owner_name or name in self.free_names

    def is_settled(self, root: str, name: str) -> bool:
        """Whether everything under this root is fixed by the torch and Python builds."""
        if root != "G":
            return False
        if name.startswith("__builtins_dict__"):
            return True
        module = self.import_sources.get(name)
        if module is None:
            value = self._globals.get(name)
            if isinstance(value, types.ModuleType):
                module = value.__name__
            elif type(value) is dict and str(value.get("__name__")).startswith("namedtuple_"):
                return True  # Where `collections.namedtuple` makes a class's methods.
        return module is not None and is_fixed(module)


def parse_place(expression: str) -> Path:
    """Return an expression over `L` and `G` as steps, the first being the root.

    Raises:
        Unrecordable: The expression does more than reading attributes and items.
    """
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise Unrecordable(f"the place {expression!r}") from error
    return steps_of(tree, expression)


def steps_of(tree: ast.expr, expression: str) -> Path:
    """Return the steps of an expression that was parsed already; `expression` is its text."""
    match tree:
        case ast.Subscript(value=ast.Name(id=("L" | "G") as root), slice=ast.Constant(value=name)):
            return ((root, name),)
        case ast.Attribute(value=base, attr=name):
            return (*steps_of(base, expression), ("a", name))
        case ast.Subscript(
            value=ast.Call(
                func=ast.Name(id="list"),
                args=[
                    ast.Call(
                        func=ast.Attribute(value=ast.Name(id="dict"), attr="keys"), args=[base]
                    )
                ],
            ),
            slice=ast.Constant(value=int(number)),
        ):
            return (*steps_of(base, expression), ("k", number))
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="dict"), attr="__getitem__"),
            args=[
                base,
                ast.Subscript(
                    value=ast.Call(func=ast.Name(id="list"), args=[ast.Call(args=[keys_of])]),
                    slice=ast.Constant(value=int(number)),
                ),
            ],
        ) if ast.dump(base) == ast.dump(keys_of):
            return (*steps_of(base, expression), ("v", number))
        case ast.Subscript(
            value=base,
            slice=ast.Subscript(
                value=ast.Call(func=ast.Name(id="list"), args=[ast.Call(args=[keys_of])]),
                slice=ast.Constant(value=int(number)),
            ),
        ) if ast.dump(base) == ast.dump(keys_of):
            return (*steps_of(base, expression), ("v", number))
        case ast.Subscript(value=base, slice=index):
            try:
                key = ast.literal_eval(index)
            except ValueError as error:
                raise Unrecordable(f"the place {expression!r}") from error
            if not isinstance(key, str | int | bool | type(None)):
                raise Unrecordable(f"the place {expression!r}")
            return (*steps_of(base, expression), ("i", key))
        case ast.Call(func=ast.Name(id="type"), args=[base], keywords=[]):
            return (*steps_of(base, expression), ("t", None))
        case ast.Call(func=ast.Name(id="len"), args=[base], keywords=[]):
            return (*steps_of(base, expression), ("n", None))
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="object"), attr="__getattribute__"),
            args=[base, ast.Constant(value=str(name))],
        ):
            # Past the class's own `__getattribute__`, as Dynamo reads what it traced through.
            return (*steps_of(base, expression), ("g", name))
        case ast.Call(func=ast.Name(id="dict"), args=[base], keywords=[]):
            return steps_of(base, expression)  # Dynamo copies a class's dictionary to read it.
    raise Unrecordable(f"the place {expression!r}")


def root_of(expression: str) -> tuple[str, str] | None:
    """Return the root of an expression (`("L", "self")`), None where it has none or several."""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        return None
    roots = {
        (node.value.id, node.slice.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("L", "G")
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    }
    return roots.pop() if len(roots) == 1 else None


def size_of(source: str) -> tuple[str, str, int] | None:
    """Split `X.size()[1]` into (`X`, "size", 1); None where the source is something else."""
    found = re.fullmatch(r"(.*)\.(size|stride)\(\)\[(\d+)\]", source)
    return (found[1], found[2], int(found[3])) if found else None


def readable(path: Path) -> str:
    """Return a place as a person writes it: `past_key_values.layers[0].keys`."""
    text = str(path[0][1])
    for step, key in path[1:]:
        forms = {
            "a": f"{text}.{key}",
            "g": f"{text}.{key}",
            "i": f"{text}[{key!r}]",
            "k": f"list({text})[{key}]",
            "v": f"list({text}.values())[{key}]",
            "t": f"type({text})",
        }
        text = forms.get(step, f"len({text})")
    return text


class PlaceTable:
    """The contract's table of places: every prefix of every path once."""

    def __init__(self) -> None:
        self.nodes: list[list[Any]] = []
        self._index: dict[Path, int] = {}

    def add(self, path: Path) -> int:
        """Return the index of a place, adding it and what leads there."""
        if path in self._index:
            return self._index[path]
        step, key = path[-1]
        if len(path) == 1:
            node = [{"L": -1, "G": -2, "T": -3}[step], "root", key]
        else:
            node = [self.add(path[:-1]), step, key]
        self.nodes.append(node)
        self._index[path] = len(self.nodes) - 1
        return self._index[path]
