"""Dynamo's guards as data: those of the model become a `Contract`, those of the call become code.

A guard is about a place, written as an expression over `L` (the function's locals) and `G`
(its globals). Places that the model, a closure or a module holds are checked once at load;
places that a call brings are checked at each call, by a generated function.
What torch's and Python's own builds settle is not checked: both builds are in the key.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from precast import contract
from precast.capture.call_check import CallCheckWriter, require_tensor, value_text
from precast.capture.places import Path, PlaceTable, Scope, parse_place, readable, root_of, steps_of
from precast.contract import Unrecordable, encode, is_fixed
from precast.graph.piece import SymbolRange

# Settled by `contract.ambient_state`, or about gradients, which compiled code never has.
_STATE_GUARDS = frozenset(
    {
        "AUTOGRAD_SAVED_TENSORS_HOOKS",
        "DEFAULT_DEVICE",
        "DETERMINISTIC_ALGORITHMS",
        "DUAL_LEVEL",
        "FSDP_TRAINING_STATE",
        "FUNCTORCH_STACK_MATCH",
        "GLOBAL_STATE",
        "GRAD_MODE",
        "TORCH_FUNCTION_STATE",
        "WEAKREF_ALIVE",
    }
)
_VALUE_GUARDS = frozenset(
    {
        "BOOL_MATCH",
        "BUILTIN_MATCH",
        "CLASS_MATCH",
        "CLOSURE_MATCH",
        "CONSTANT_MATCH",
        "CONSTANT_SUBCLASS_MATCH",
        "EQUALS_MATCH",
        "FUNCTION_MATCH",
        "ID_MATCH",
        "MODULE_MATCH",
        "NONE_MATCH",
        "RANGE_ITERATOR_MATCH",
    }
)
# What relations between sizes may call; `assembly.open_check` gives these names.
_RELATION_NAMES = frozenset({"math", "L", "G", "min", "max", "abs", "int", "float", "bool"})
_MODULE_DICTS = ("_modules", "_parameters", "_buffers", "__dict__")


class GuardRecorder:
    """Takes Dynamo's guards one by one; gives a contract and a call check."""

    def __init__(self, scope: Scope, gpu: int | None = None) -> None:
        """Record nothing yet. `gpu` is the number of the one that the graph works on."""
        self.scope = scope
        self._gpu = gpu
        self.table = PlaceTable()
        self.writer = CallCheckWriter(scope)
        self.checks: list[list[Any]] = []
        self._absent: dict[int, list[str]] = {}
        self._seen: set[str] = set()
        self._classes: dict[Path, type] = {}

    def record_all(self, guards: Sequence[Any], sizes_strides: Mapping[str, Any]) -> None:
        """Record every guard.

        Raises:
            Unrecordable: One cannot be written as data; the model must be traced at each start.
        """
        for guard in guards:
            if guard.guard_type == "TYPE_MATCH":
                self._note_class(guard)
        for guard in guards:
            if guard.guard_type not in _STATE_GUARDS and guard.guard_type != "SHAPE_ENV":
                self._record(guard, sizes_strides)
        # Last: they read sizes of tensors whose type has been checked by now.
        for guard in guards:
            if guard.guard_type == "SHAPE_ENV":
                for condition in guard.orig_guard.code_list or ():
                    self._record_size_condition(condition)
        for index, names in self._absent.items():
            self.checks.append([index, "absent", sorted(set(names))])

    def _record(self, guard: Any, sizes_strides: Mapping[str, Any]) -> None:
        from precast.torch_private import source_name

        name = source_name(guard.orig_guard.originating_source)
        root = root_of(name)
        if root is None or self.scope.is_settled(*root):
            if root is None and name and not _is_import_of_fixed(name):
                raise Unrecordable(f"a {guard.guard_type} guard on {name!r}")
            return
        path = parse_place(name)
        options = _options(guard.orig_guard.create_fn)
        if guard.guard_type == "HASATTR" and "attr" not in options:
            # torch 2.11 guards on the attribute's own place, so its value is the attribute's.
            options = {"attr": path[-1][1], "is_there": guard.has_value}
            path = path[:-1]
        if self.scope.is_bound(*root):
            self._record_bound(guard, path, options)
        elif (of_class := self._class_path(path, guard)) is not None:
            if not is_fixed(of_class[0][1].partition(":")[0]):
                self._record_bound(guard, of_class, options)
        else:
            self._record_call(guard, path, options, sizes_strides.get(name))

    def _note_class(self, guard: Any) -> None:
        from precast.torch_private import source_name

        try:
            path = parse_place(source_name(guard.orig_guard.originating_source))
        except Unrecordable:
            return
        self._classes[path] = type(guard.value)

    def _class_path(self, path: Path, guard: Any) -> Path | None:
        """A place on the class of a call's object, as a place of the class itself.

        The call check holds the object's class to the captured one, so what a class holds is
        checked once at load and not at every call.
        """
        depth = next((i for i, (step, _) in enumerate(path) if step == "t"), None)
        if depth is None:
            return None
        kind = self._classes.get(path[:depth])
        if kind is None:
            raise Unrecordable(f"the class of {readable(path[:depth])}, which is not checked")
        return (("T", f"{kind.__module__}:{kind.__qualname__}"), *path[depth + 1 :])

    # -- of the model ---------------------------------------------------------

    def _record_bound(self, guard: Any, path: Path, options: Mapping[str, Any]) -> None:
        kind, value = guard.guard_type, guard.value
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT":
            return  # `Binding` asks all modules' hooks at every call.
        if kind == "TYPE_MATCH" and path[-1] in [("a", name) for name in _MODULE_DICTS]:
            return
        if kind == "NOT_PRESENT_IN_GENERIC_DICT":
            self._absent.setdefault(self.table.add(path), []).append(options["attr"])
            return
        if kind == "DUPLICATE_INPUT":
            other = self._other_source(options)
            if other is not None:
                self._check(path, "same", self.table.add(other))
            return
        self._check(path, *_as_check(kind, value, options, self._gpu))

    def _check(self, path: Path, kind: str, payload: Any) -> None:
        index = self.table.add(path)
        key = repr((index, kind, payload))
        if key not in self._seen:
            self._seen.add(key)
            self.checks.append([index, kind, payload])

    def _other_source(self, options: Mapping[str, Any]) -> Path | None:
        from precast.torch_private import source_name

        name = source_name(options["source_b"])
        root = root_of(name)
        if root is None or not self.scope.is_bound(*root):
            raise Unrecordable(f"an alias of {name!r} across the model and the call")
        return None if self.scope.is_settled(*root) else parse_place(name)

    # -- of the call ----------------------------------------------------------

    def _record_call(self, guard: Any, path: Path, options: Mapping[str, Any], sizes: Any) -> None:
        kind, value = guard.guard_type, guard.value
        is_variadic = len(path) == 1 and path[0][1] in self.scope.variadic_names
        if kind == "TYPE_MATCH" and is_variadic:
            return  # Python itself makes the tuple and the dict.
        writer = self.writer
        name = writer.place(path)
        meaning = readable(path)
        if kind == "TENSOR_MATCH":
            require_tensor(writer, path, value, sizes, self._gpu)
        elif kind in ("TYPE_MATCH", "DICT_VERSION"):
            constant = writer.constant(encode(type(value)))
            writer.require(f"type({name}) is {constant}", f"{meaning} is a {type(value).__name__}")
        elif kind == "NOT_PRESENT_IN_GENERIC_DICT":
            writer.require(
                f"{options['attr']!r} not in {name}.__dict__",
                f"{meaning} has no {options['attr']} of its own",
            )
        elif kind == "EMPTY_NN_MODULE_HOOKS_DICT":
            writer.require(f"not {name}", f"{meaning} is empty")
        elif kind == "DUPLICATE_INPUT":
            from precast.torch_private import source_name

            other = parse_place(source_name(options["source_b"]))
            if self.scope.is_bound(*other[0]):
                raise Unrecordable(f"{meaning} is also a part of the model")
            writer.require(f"{name} is {writer.place(other)}", f"{meaning} is {readable(other)}")
        else:
            self._require_check(name, meaning, *_as_check(kind, value, options, self._gpu), value)

    def _require_check(self, name: str, meaning: str, check: str, payload: Any, value: Any) -> None:
        writer = self.writer
        if check == "value":
            form, text = value_text(value, writer)
            if form == "encoded":
                writer.require(f"encode({name}) == {text}", f"{meaning} equals {value!r}")
            elif form == "==":
                kind = writer.constant(encode(type(value)))
                writer.require(
                    f"type({name}) is {kind} and {name} == {text}", f"{meaning} == {value!r}"
                )
            else:
                writer.require(f"{name} is {text}", f"{meaning} is {value!r}")
        elif check == "len":
            writer.require(f"len({name}) == {payload}", f"{meaning} has {payload} items")
        elif check == "keys":
            keys = [*value]
            if all(isinstance(key, str | int) for key in keys):
                writer.require(f"[*{name}] == {keys!r}", f"{meaning} has the keys {keys}")
            else:
                text = writer.constant(["json", payload])
                writer.require(
                    f"[encode(key) for key in {name}] == {text}", f"{meaning} has the keys {keys}"
                )
        elif check == "has_key":
            word = "in" if payload[1] else "not in"
            writer.require(f"{payload[0]!r} {word} {name}", f"{payload[0]!r} is {word} {meaning}")
        else:  # has_attr
            word = "" if payload[1] else "not "
            writer.require(
                f"{word}hasattr({name}, {payload[0]!r})",
                f"{meaning} has {'' if payload[1] else 'no '}{payload[0]}",
            )

    def _record_size_condition(self, condition: str) -> None:
        """Record one relation between sizes, as Dynamo's shape environment wrote it."""
        try:
            tree = ast.parse(condition, mode="eval")
        except SyntaxError as error:
            raise Unrecordable(f"the relation {condition!r}") from error
        localise = _Localise(self)
        rewritten = ast.unparse(localise.visit(tree))
        if localise.strided and self.writer.contiguous.issuperset(localise.strided):
            return  # It follows from their being contiguous, as they were when it was written.
        self.writer.require(rewritten, _plain(condition))


def symbol_ranges(shape_env: Any) -> dict[str, SymbolRange]:
    """Return the range of every symbol of a capture that is still free."""
    found: dict[str, SymbolRange] = {}
    for symbol, bounds in shape_env.var_to_range.items():
        if symbol in shape_env.replacements:
            continue
        lower, upper = bounds.lower, bounds.upper
        found[str(symbol)] = SymbolRange(
            low=int(lower) if lower.is_integer and lower.is_finite and lower > 0 else 0,
            high=int(upper) if upper.is_finite and upper < 2**31 else None,
        )
    return found


class _Localise(ast.NodeTransformer):
    """Replaces `L[...]...` of the call by the local names of the call check."""

    def __init__(self, recorder: GuardRecorder) -> None:
        self._recorder = recorder
        self.strided: list[str] = []  # Tensors whose strides were read.

    def visit(self, node: ast.AST) -> Any:
        match node:
            case ast.Subscript(
                value=ast.Call(func=ast.Attribute(value=tensor, attr=("size" | "stride") as what)),
                slice=ast.Constant(value=int(dim)),
            ):
                name = self._place(tensor)
                writer = self._recorder.writer
                if what == "size":
                    return ast.parse(writer.size(name, dim), mode="eval").body
                self.strided.append(name)
                return ast.parse(f"{name}.stride({dim})", mode="eval").body
            case ast.Attribute() | ast.Subscript():
                try:
                    return ast.Name(id=self._place(node), ctx=ast.Load())
                except Unrecordable:
                    return self.generic_visit(node)
            case ast.Name(id=name) if name not in _RELATION_NAMES:
                raise Unrecordable(f"a relation that calls {name}")
        return self.generic_visit(node)

    def _place(self, node: ast.expr) -> str:
        path = steps_of(node, ast.unparse(node))
        if self._recorder.scope.is_bound(*path[0]):
            raise Unrecordable(f"a relation to a size of the model: {ast.unparse(node)}")
        return self._recorder.writer.place(path)


def _is_import_of_fixed(expression: str) -> bool:
    """Whether a place is reached by importing modules that the builds settle, and no other way."""
    found = re.findall(r"__import__\('([\w.]+)'\)", expression)
    return bool(found) and all(map(is_fixed, found)) and not re.search(r"\b[LG]\[", expression)


def _options(create: Any) -> dict[str, Any]:
    """The arguments that Dynamo attached to a guard's constructor."""
    return dict(create.keywords) if isinstance(create, functools.partial) else {}


def _as_check(
    kind: str, value: Any, options: Mapping[str, Any], gpu: int | None
) -> tuple[str, Any]:
    """Return a guard as a check (kind, payload)."""
    if kind in _VALUE_GUARDS:
        return "value", encode(value)
    match kind:
        case "TYPE_MATCH" | "DICT_VERSION":
            return "type", f"{type(value).__module__}:{type(value).__qualname__}"
        case "TENSOR_MATCH":
            return "tensor", contract.tensor_spec(value, gpu)
        case "SEQUENCE_LENGTH":
            return "len", len(value)
        case "DICT_KEYS_MATCH" | "MAPPING_KEYS_CHECK":
            return "keys", [encode(key) for key in value]
        case "EMPTY_NN_MODULE_HOOKS_DICT":
            return "len", 0
        case "DICT_CONTAINS" | "SET_CONTAINS":
            return "has_key", [_plain_key(options["key"]), not options.get("invert", False)]
        case "DICT_NOT_CONTAINS" | "SET_NOT_CONTAINS":
            return "has_key", [_plain_key(options["key"]), False]
        case "HASATTR":
            is_there = options.get("is_there", hasattr(value, options["attr"]))
            return "has_attr", [options["attr"], is_there]
        case "NOT_NONE_MATCH":
            raise Unrecordable("a guard on something not being None")
    raise Unrecordable(f"a {kind} guard")


def _plain_key(key: Any) -> Any:
    if not isinstance(key, str | int | bool | type(None)):
        raise Unrecordable(f"a guard on the key {key!r}")
    return key


def _plain(condition: str) -> str:
    """A relation as a person writes it: without `L[...]`."""
    return (
        condition.replace("L['", "").replace("']", "", 1)
        if condition.count("L['") == 1
        else condition
    )
