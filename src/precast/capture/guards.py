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
import types
from collections.abc import Mapping, Sequence
from typing import Any

from precast import contract
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
    return _steps(tree, expression)


def _steps(tree: ast.expr, expression: str) -> Path:
    match tree:
        case ast.Subscript(value=ast.Name(id=("L" | "G") as root), slice=ast.Constant(value=name)):
            return ((root, name),)
        case ast.Attribute(value=base, attr=name):
            return (*_steps(base, expression), ("a", name))
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
            return (*_steps(base, expression), ("k", number))
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
            return (*_steps(base, expression), ("v", number))
        case ast.Subscript(
            value=base,
            slice=ast.Subscript(
                value=ast.Call(func=ast.Name(id="list"), args=[ast.Call(args=[keys_of])]),
                slice=ast.Constant(value=int(number)),
            ),
        ) if ast.dump(base) == ast.dump(keys_of):
            return (*_steps(base, expression), ("v", number))
        case ast.Subscript(value=base, slice=index):
            try:
                key = ast.literal_eval(index)
            except ValueError as error:
                raise Unrecordable(f"the place {expression!r}") from error
            if not isinstance(key, str | int | bool | type(None)):
                raise Unrecordable(f"the place {expression!r}")
            return (*_steps(base, expression), ("i", key))
        case ast.Call(func=ast.Name(id="type"), args=[base], keywords=[]):
            return (*_steps(base, expression), ("t", None))
        case ast.Call(func=ast.Name(id="len"), args=[base], keywords=[]):
            return (*_steps(base, expression), ("n", None))
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="object"), attr="__getattribute__"),
            args=[base, ast.Constant(value=str(name))],
        ):
            # Past the class's own `__getattribute__`, as Dynamo reads what it traced through.
            return (*_steps(base, expression), ("g", name))
        case ast.Call(func=ast.Name(id="dict"), args=[base], keywords=[]):
            return _steps(base, expression)  # Dynamo copies a class's dictionary to read it.
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


def _is_import_of_fixed(expression: str) -> bool:
    """Whether a place is reached by importing modules that the builds settle, and no other way."""
    found = re.findall(r"__import__\('([\w.]+)'\)", expression)
    return bool(found) and all(map(is_fixed, found)) and not re.search(r"\b[LG]\[", expression)


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


class CallCheckWriter:
    """Writes the function that checks one call: 0 if all holds, else a condition's number.

    The function has the captured function's own parameters, so that Python binds the
    arguments. Constants go in by name; `conditions` says what each number means.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.lines: list[str] = []
        self._names: dict[Path, str] = {}
        self._seen: set[str] = set()
        self.ranks: dict[str, int] = {}  # Of the tensors whose sizes are names.
        self.contiguous: set[str] = set()  # Tensors that are required to be so.
        self.conditions: list[str] = ["everything holds"]
        self.constants: dict[str, Any] = {}
        self._constant_names: dict[str, str] = {}

    def constant(self, data: list[Any]) -> str:
        """Return the name under which a constant is passed; `data` says how to rebuild it."""
        key = repr(data)
        if key not in self._constant_names:
            name = f"c{len(self.constants)}"
            self._constant_names[key] = name
            self.constants[name] = data
        return self._constant_names[key]

    def place(self, path: Path) -> str:
        """Return the name that holds a place's value, reading it on first use."""
        if path in self._names:
            return self._names[path]
        step, key = path[-1]
        if len(path) == 1:
            if key not in self._scope.argument_names:
                raise Unrecordable(f"the local {key!r} is no argument")
            name = str(key)
        else:
            base = self.place(path[:-1])
            name = f"v{len(self._names)}_"
            read = {
                "a": f"{base}.{key}",
                "g": f"object.__getattribute__({base}, {key!r})",
                "i": f"{base}[{key!r}]",
                "k": f"[*{base}][{key}]",
                "v": f"[*dict.values({base})][{key}]",
                "t": f"type({base})",
            }
            self.lines.append(f"{name} = {read.get(step, f'len({base})')}")
        self._names[path] = name
        return name

    def require(self, condition: str, meaning: str) -> None:
        """Add a condition once."""
        if condition in self._seen:
            return
        self._seen.add(condition)
        self.conditions.append(meaning)
        self.lines.append(f"if not ({condition}): return {len(self.conditions) - 1}")

    def unpack(self, name: str, rank: int, meaning: str) -> None:
        """Read a tensor's sizes into names of their own, once; another rank fails the check."""
        if name in self.ranks:
            return
        self.ranks[name] = rank
        if not rank:
            self.require(f"not {name}.shape", meaning)
            return
        # A local is read ten times faster than an item of `torch.Size`, and `try` costs nothing.
        sizes = "".join(f"{self.size(name, dim)}, " for dim in range(rank)).rstrip()
        self.conditions.append(meaning)
        self.lines += [
            "try:",
            f"    {sizes} = {name}.shape",
            "except ValueError:",
            f"    return {len(self.conditions) - 1}",
        ]

    def size(self, name: str, dim: int) -> str:
        """Return the text that reads one size of a tensor."""
        return f"{name}size{dim}" if name in self.ranks else f"{name}.shape[{dim}]"


def signature_of(code: types.CodeType) -> str:
    """Return a parameter list that binds arguments as a code object does, defaults left out."""
    names = code.co_varnames
    positional = list(names[: code.co_argcount])
    keyword_only = names[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    rest = code.co_argcount + code.co_kwonlyargcount
    if code.co_posonlyargcount:
        positional.insert(code.co_posonlyargcount, "/")
    parts = positional
    if code.co_flags & 0x04:
        parts.append(f"*{names[rest]}")
        rest += 1
    elif keyword_only:
        parts.append("*")
    parts.extend(keyword_only)
    if code.co_flags & 0x08:
        parts.append(f"**{names[rest]}")
    return ", ".join(parts)


def _value_text(value: Any, writer: CallCheckWriter) -> tuple[str, str]:
    """Return (form, text) of a constant for a generated condition."""
    if value is None or value is True or value is False or value is Ellipsis:
        return "is", repr(value)
    if type(value) in (int, str):
        return "==", repr(value)
    data = encode(value)
    if isinstance(data, list) and data[0] in ("dtype", "layout", "memory_format", "type", "enum"):
        return "is", writer.constant(data)
    if isinstance(data, list) and data[0] == "device":
        return "==", writer.constant(data)
    if type(value) is float and value == value:  # noqa: PLR0124 - NaN is not itself.
        return "==", repr(value) if abs(value) != float("inf") else writer.constant(data)
    return "encoded", writer.constant(["json", data])


class GuardRecorder:
    """Takes Dynamo's guards one by one; gives a contract and a call check."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
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
        self._check(path, *_as_check(kind, value, options))

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
            require_tensor(writer, path, value, sizes)
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
            self._require_check(name, meaning, *_as_check(kind, value, options), value)

    def _require_check(self, name: str, meaning: str, check: str, payload: Any, value: Any) -> None:
        writer = self.writer
        if check == "value":
            form, text = _value_text(value, writer)
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
        path = _steps(node, ast.unparse(node))
        if self._recorder.scope.is_bound(*path[0]):
            raise Unrecordable(f"a relation to a size of the model: {ast.unparse(node)}")
        return self._recorder.writer.place(path)


def _options(create: Any) -> dict[str, Any]:
    """The arguments that Dynamo attached to a guard's constructor."""
    return dict(create.keywords) if isinstance(create, functools.partial) else {}


def _as_check(kind: str, value: Any, options: Mapping[str, Any]) -> tuple[str, Any]:
    """Return a guard as a check (kind, payload)."""
    if kind in _VALUE_GUARDS:
        return "value", encode(value)
    match kind:
        case "TYPE_MATCH" | "DICT_VERSION":
            return "type", f"{type(value).__module__}:{type(value).__qualname__}"
        case "TENSOR_MATCH":
            return "tensor", contract.tensor_spec(value)
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


def _plain(condition: str) -> str:
    """A relation as a person writes it: without `L[...]`."""
    return (
        condition.replace("L['", "").replace("']", "", 1)
        if condition.count("L['") == 1
        else condition
    )


def require_tensor(writer: CallCheckWriter, path: Path, tensor: Any, sizes: Any) -> None:
    """Require that a place holds a plain tensor like the captured one.

    `sizes` is Dynamo's (sizes, strides) of the place: symbolic where dynamic; relations
    among symbols are conditions of their own. None: the tensor's own sizes, all static.
    """
    name, meaning = writer.place(path), readable(path)
    shape, stride = (tuple(tensor.shape), tuple(tensor.stride())) if sizes is None else sizes
    dtype = writer.constant(encode(tensor.dtype))
    device = tensor.device
    on_device = "is_cpu" if device.type == "cpu" else f"is_{device.type}"
    writer.require(f"type({name}) in TENSORS", f"{meaning} is a plain tensor")
    writer.require(f"{name}.dtype is {dtype}", f"{meaning} is {tensor.dtype}")
    writer.require(f"{name}.{on_device}", f"{meaning} is on {device.type}")
    if device.index is not None:
        writer.require(f"{name}.get_device() == {device.index}", f"{meaning} is on {device}")
    writer.unpack(name, len(shape), f"{meaning} has {len(shape)} dimensions")
    for dim, size in enumerate(shape):
        known = _as_int(size)
        if known is not None:
            writer.require(
                f"{writer.size(name, dim)} == {known}", f"size {dim} of {meaning} is {known}"
            )
    if _is_contiguous(shape, stride):
        writer.contiguous.add(name)
        writer.require(f"{name}.is_contiguous()", f"{meaning} is contiguous")
    else:
        for dim, step in enumerate(stride):
            known = _as_int(step)
            if known is not None and _as_int(shape[dim]) != 1:
                writer.require(
                    f"{name}.stride({dim}) == {known}", f"stride {dim} of {meaning} is {known}"
                )
    if device.type != "cpu":
        # Inductor's GPU kernels assume 16 bytes (torch/_inductor/utils.py, GPU_ALIGN_BYTES).
        writer.require(f"not {name}.data_ptr() % 16", f"{meaning} is aligned to 16 bytes")


def _is_contiguous(shape: Sequence[Any], stride: Sequence[Any]) -> bool:
    """Whether strides are those of a contiguous tensor for every size that its symbols may take."""
    expected: Any = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if _as_int(size) != 1 and _expression(step) != expected:
            return False
        expected = expected * _expression(size)
    return True


def _expression(size: Any) -> Any:
    """A size as a number or a sympy expression; comparing two never adds a guard."""
    known = _as_int(size)
    return known if known is not None else size.node.shape_env.simplify(size.node.expr)


def _as_int(size: Any) -> int | None:
    """A size as a number; None where it is symbolic."""
    if isinstance(size, int):
        return size
    try:
        node = size.node
    except AttributeError:
        return int(size)
    expression = node.shape_env.simplify(node.expr)
    return int(expression) if expression.is_number else None


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
