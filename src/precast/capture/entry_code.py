"""The bytecode around a graph as data, so that another process can run it without tracing.

Dynamo writes it for a frame of its own process; here what it reads of that process (globals,
constants that are objects) is told by recipes. `assembly` puts it together again.
"""

from __future__ import annotations

import base64
import dis
import marshal
import types
from collections.abc import Iterator, Sequence
from typing import Any

from precast.contract import Unrecordable, decode, encode


class EntryCode:
    """The code around a graph, as data: fetches arguments, calls the graph, rebuilds outputs.

    `marshalled` is bytecode for one Python version; `objects` are its constants that bytes cannot
    hold, such as dtypes, each with its place; `recipes` says how each global that it reads is
    found; `arguments` are the names of the placeholders that it passes, in order.
    """

    __slots__ = ("arguments", "backend_name", "free_names", "marshalled", "objects", "recipes")

    def __init__(
        self,
        *,
        marshalled: str,
        backend_name: str,
        free_names: list[str],
        recipes: dict[str, Any],
        arguments: list[str],
        objects: Sequence[Any] = (),
    ) -> None:
        self.marshalled = marshalled
        self.objects = list(objects)
        self.backend_name = backend_name
        self.free_names = free_names
        self.recipes = recipes
        self.arguments = arguments

    def record(self, raw: Any, function: types.FunctionType) -> None:
        """Write down the bytecode of a raw capture, and how the globals that it reads are found.

        Raises:
            Unrecordable: Some of it cannot be written as data.
        """
        self.recipes = dict(_recipes(raw, function))
        plain, self.objects = _without_objects(raw.bytecode)
        self.marshalled = base64.b64encode(marshal.dumps(plain)).decode()

    def to_json(self) -> dict[str, Any]:
        """Return the code as JSON data."""
        return {name: getattr(self, name) for name in self.__slots__}


def _without_objects(code: types.CodeType) -> tuple[types.CodeType, list[Any]]:
    """Take the constants that `marshal` cannot hold out of bytecode; return them with their places.

    A place is the constant's number, after those of the code objects around it.

    Raises:
        Unrecordable: One of them cannot be written as data either.
    """
    constants = list(code.co_consts)
    objects: list[Any] = []
    for number, constant in enumerate(constants):
        if isinstance(constant, types.CodeType):
            constants[number], inner = _without_objects(constant)
            objects.extend([[number, *place], data] for place, data in inner)
            continue
        try:
            marshal.dumps(constant)
        except ValueError:
            try:
                data = encode(constant)
                decode(data)
            except LookupError as error:
                raise Unrecordable(f"the code around the graph holds {constant!r}") from error
            objects.append([[number], data])
            constants[number] = None
    return code.replace(co_consts=tuple(constants)), objects


def _names_read(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise Unrecordable(f"the call writes the global {instruction.argval}")
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_read(constant)


def _recipes(raw: Any, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """How each global that the bytecode reads is found again."""
    import builtins

    for name in sorted(set(_names_read(raw.bytecode))):
        if name == raw.backend_id:
            continue
        if name in raw.import_sources:
            yield name, ["module", raw.import_sources[name]]
        elif name in function.__globals__ and function.__globals__[name] is raw.globals.get(name):
            yield name, ["global"]
        elif name.startswith("__builtins_dict__"):
            yield name, ["builtins"]
        elif name in raw.globals:
            yield name, ["value", encode(raw.globals[name])]
        elif not hasattr(builtins, name):
            raise Unrecordable(f"the code around the graph reads {name}")
