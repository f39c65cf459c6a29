"""One call of a model captured whole: the graph, its contract, and the code around it.

Dynamo traces; what it found is turned into data here: guards (`guards`), the digests of
all code that was inlined, the places that graph inputs come from, and the bytecode that
fetches the call's arguments, calls the graph and rebuilds outputs and side effects.
"""

from __future__ import annotations

import base64
import dis
import logging
import marshal
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from precast.capture.call_check import require_tensor, signature_of
from precast.capture.fingerprint import tensors_in
from precast.capture.guards import GuardRecorder, symbol_ranges
from precast.capture.places import Path, Scope, parse_place, readable, root_of
from precast.contract import (
    Contract,
    Unrecordable,
    ambient_state,
    decode,
    digest_code,
    encode,
    file_digest,
    has_fixed_code,
    hooks_of,
    is_fixed,
    tensor_spec,
    unwrap,
)
from precast.errors import CaptureError
from precast.graph.piece import SymbolRange

if TYPE_CHECKING:
    import torch

# Sizes of these many dimensions are left as they are, but for the first: a picture's or a
# convolution's sizes enter a model's control flow, and code for any size is slower there.
_MOST_DYNAMIC_DIMS = 3


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

    def to_json(self) -> dict[str, Any]:
        """Return the code as JSON data."""
        return {name: getattr(self, name) for name in self.__slots__}


class Capture:
    """Everything the cold path needs of one captured call."""

    __slots__ = (
        "bytecode",
        "contract",
        "entry",
        "function",
        "graph_module",
        "live_globals",
        "num_guards",
        "ranges",
        "recorder",
        "sources",
        "symbol_places",
        "unrecordable",
        "weights",
    )

    def __init__(
        self,
        *,
        graph_module: torch.fx.GraphModule,
        ranges: dict[str, SymbolRange],
        weights: list[str],
        bytecode: types.CodeType,
        live_globals: dict[str, Any],
        entry: EntryCode,
        contract: Contract | None,
        recorder: GuardRecorder,
        function: types.FunctionType,
        unrecordable: str | None,
        num_guards: int,
        sources: dict[str, str],
        symbol_places: dict[str, tuple[Path, int]],
    ) -> None:
        self.sources = sources
        self.symbol_places = symbol_places
        self.graph_module = graph_module
        self.ranges = ranges
        self.weights = weights
        self.bytecode = bytecode
        self.live_globals = live_globals
        self.entry = entry
        self.contract = contract
        self.recorder = recorder
        self.function = function
        self.unrecordable = unrecordable
        self.num_guards = num_guards

    def open_check(self, mutated: Sequence[str], symbols: Iterable[str]) -> dict[str, Any]:
        """Return the generated check of a call's arguments as data, for `blueprint` to finish.

        Args:
            mutated: Placeholders that the graph writes into. Code for them was compiled as if
                no other argument shares their memory, so a call where one does is refused.
            symbols: Sizes of the capture that compiled code may take fewer of; under `sizes` is
                how each is read, and what it is.
        """
        writer = self.recorder.writer
        arguments = [
            writer.place(parse_place(self.sources[name]))
            for name in self.entry.arguments
            if size_of(self.sources[name]) is None
        ]
        if len(arguments) > 1:
            # As Dynamo does: one object at two places changes what `x is y` says.
            ids = ", ".join(f"id({argument})" for argument in arguments)
            writer.require(
                f"len({{{ids}}}) == {len(arguments)}", "no two tensor arguments are one object"
            )
        written = [
            writer.place(parse_place(self.sources[name]))
            for name in self.entry.arguments
            if name in mutated
        ]
        if written and len(arguments) > 1:
            writer.require(
                f"are_apart(({', '.join(written)},), ({', '.join(arguments)},))",
                "no argument shares memory with one that is written into",
            )
        sizes = {}
        for symbol in sorted(set(symbols) & self.symbol_places.keys()):
            path, dim = self.symbol_places[symbol]
            sizes[symbol] = [
                writer.size(writer.place(path), dim),
                f"size {dim} of {readable(path)}",
            ]
        return {
            "header": f"def check({signature_of(self.function.__code__)}):",
            "lines": list(writer.lines),
            "conditions": list(writer.conditions),
            "constants": dict(writer.constants),
            "sizes": sizes,
            "filename": f"<precast call check {digest_code(self.bytecode)[:12]}>",
        }


def capture_call(
    function: types.FunctionType,
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_shapes: Any = None,
    name: str = "",
) -> Capture | None:
    """Capture one call; None when it computes nothing with tensors.

    Args:
        function: The function to trace, unbound.
        owner: The module it is a method of (then not in `args`), or None.
        args: The call's positional arguments, without the owner.
        kwargs: The call's keyword arguments.
        dynamic_shapes: As `torch.export` takes it; None: every size that can be.
        name: Of the model, for errors.

    Raises:
        CaptureError: Dynamo could not make one graph of it; says where in the user's code.
        Unrecordable: The call's arguments cannot be described as data.
    """
    from precast.torch_private import capture_full_graph, placeholder_source

    bound = types.MethodType(function, owner) if owner is not None else function
    scope = Scope(function, owner is not None, {}, function.__globals__)

    def select_arguments(sources: list[str]) -> list[int]:
        known = set(sources)
        selected = []
        for position, source in enumerate(sources):
            root = root_of(source)
            if root is None or scope.is_bound(*root):
                continue
            tensor = size_of(source)
            # A size is read from its tensor, where the graph gets that tensor anyway.
            if tensor is None or tensor[0] not in known:
                selected.append(position)
        return selected

    def trace(wish: Any) -> Any:
        marked = mark_dynamic(function, owner, args, kwargs, wish)
        # It would print pages for a call that eager refuses too; the error says it all.
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled, logger.disabled = logger.disabled, True
        try:
            return capture_full_graph(bound, args, kwargs, select_arguments)
        finally:
            logger.disabled = was_disabled
            for tensor in marked:
                unmark_dynamic(tensor)

    try:
        try:
            raw = trace(dynamic_shapes)
        except Exception:
            if dynamic_shapes is not None:
                raise
            raw = trace({})  # A model may be one graph for given sizes only.
    except Exception as error:
        problem, location = _explain(error)
        raise CaptureError(name, problem, location) from error
    if raw is None:
        return None
    scope = Scope(function, owner is not None, raw.import_sources, raw.globals)
    recorder = GuardRecorder(scope)
    weights, specs = _record_inputs(raw, recorder)
    recorder.record_all(raw.guards, raw.sizes_strides)
    unrecordable: str | None = None
    contract: Contract | None = None
    entry = EntryCode(
        marshalled="",
        backend_name=raw.backend_id,
        free_names=list(raw.closure_names),
        recipes={},
        arguments=list(raw.arguments),
    )
    try:
        entry.recipes = dict(_recipes(raw, function))
        plain, entry.objects = _without_objects(raw.bytecode)
        entry.marshalled = base64.b64encode(marshal.dumps(plain)).decode()
        code, files = code_digests(raw.traced_code, function, owner)
        contract = Contract(
            nodes=recorder.table.nodes,
            checks=recorder.checks,
            weights=weights,
            specs=specs,
            code=code,
            files=files,
            imports={
                alias: module
                for alias, module in raw.import_sources.items()
                if not is_fixed(module)
            },
            state=ambient_state(),
            hooks=_hooked(owner),
        )
    except Unrecordable as error:
        unrecordable = str(error)
    return Capture(
        graph_module=raw.graph_module,
        ranges=symbol_ranges(raw.shape_env),
        weights=[node.name for node, kind in _placeholders(raw) if kind == "weight"],
        bytecode=raw.bytecode,
        live_globals=raw.globals,
        entry=entry,
        contract=contract,
        recorder=recorder,
        function=function,
        unrecordable=unrecordable,
        num_guards=len(raw.guards),
        sources={node.name: placeholder_source(node) for node, _ in _placeholders(raw)},
        symbol_places=_symbol_places(raw, scope),
    )


def _placeholders(raw: Any) -> Iterator[tuple[Any, str]]:
    """Every graph input with its kind: "argument", "size" (of an argument) or "weight"."""
    from precast.torch_private import placeholder_source

    arguments = set(raw.arguments)
    for node in raw.graph_module.graph.nodes:
        if node.op == "placeholder":
            if node.name in arguments:
                yield node, "argument"
            elif size_of(placeholder_source(node)) is not None:
                yield node, "size"
            else:
                yield node, "weight"


def _record_inputs(raw: Any, recorder: GuardRecorder) -> tuple[list[int], list[list[Any]]]:
    """Enter every graph input into the contract or the call check."""
    import torch

    from precast.torch_private import placeholder_source

    values = {
        source: guard.value
        for guard in raw.guards
        if guard.guard_type == "TENSOR_MATCH"
        for source in (_source_of(guard),)
    }
    weights: list[int] = []
    specs: list[list[Any]] = []
    for node, kind in _placeholders(raw):
        source = placeholder_source(node)
        if kind == "size" or size_of(source) is not None:
            continue
        value = values.get(source)
        if not isinstance(value, torch.Tensor):
            raise Unrecordable(f"the input {source} is no tensor that tracing checked")
        if kind == "argument":
            require_tensor(
                recorder.writer, parse_place(source), value, raw.sizes_strides.get(source)
            )
        else:
            weights.append(recorder.table.add(parse_place(source)))
            specs.append(tensor_spec(value))
    return weights, specs


def _symbol_places(raw: Any, scope: Scope) -> dict[str, tuple[Path, int]]:
    """Where each symbol of the capture can be read: (the tensor's place, dimension)."""
    from precast.graph.canonical import symbol_of

    found: dict[str, tuple[Path, int]] = {}
    for source, (shape, _) in raw.sizes_strides.items():
        root = root_of(source)
        if root is None or scope.is_bound(*root):
            continue
        for dim, size in enumerate(shape):
            symbol = symbol_of(size)
            if symbol is not None:
                found.setdefault(symbol, (parse_place(source), dim))
    return found


def _source_of(guard: Any) -> str:
    from precast.torch_private import source_name

    return source_name(guard.orig_guard.originating_source)


def size_of(source: str) -> tuple[str, str, int] | None:
    """Split `X.size()[1]` into (`X`, "size", 1); None where the source is something else."""
    found = re.fullmatch(r"(.*)\.(size|stride)\(\)\[(\d+)\]", source)
    return (found[1], found[2], int(found[3])) if found else None


def _hooked(owner: Any) -> dict[str, Any]:
    """Return the sub-modules that have forward hooks, and these: tracing went through them.

    Raises:
        Unrecordable: A hook cannot be written as data.
    """
    import torch

    if not isinstance(owner, torch.nn.Module):
        return {}
    return {
        name: hooks_of(module)
        for name, module in owner.named_modules()
        if name and (module._forward_hooks or module._forward_pre_hooks)
    }


# ---------------------------------------------------------------------------
# The code around the graph


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


# ---------------------------------------------------------------------------
# Digests of the code that was inlined


def code_digests(
    traced: Sequence[types.CodeType], function: types.FunctionType, owner: Any
) -> tuple[list[list[str]], list[list[str]]]:
    """Return ([path, digest] of every function that was inlined, [module, digest] of files).

    A function that no path leads to (made in another function's body, say) counts through
    the code that contains it, else through its module's source file.
    """
    modules = _modules_by_file()
    wanted: dict[types.CodeType, str | None] = {}
    for code in (function.__code__, *traced):
        module = modules.get(code.co_filename)
        is_library = module is not None and has_fixed_code(module)
        if not is_library and not code.co_filename.startswith("<frozen "):
            wanted[code] = module
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


# ---------------------------------------------------------------------------
# Sizes


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
    if hasattr(value, "dim") and hasattr(value, "dtype"):
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


# ---------------------------------------------------------------------------


def _explain(error: BaseException) -> tuple[str, str | None]:
    """What Dynamo said, in one line, and the user's source line if it names one."""
    text = str(error).strip()
    location = None
    for line in text.splitlines():
        frame = re.match(r'File "(.+)", line (\d+)', line.strip())
        if frame is not None and "/torch/" not in frame[1]:
            location = f"{frame[1]}:{frame[2]}"
    real = getattr(error, "real_stack", None)
    if location is None and real:
        location = f"{real[-1].filename}:{real[-1].lineno}"
    first = text.splitlines()[0] if text else type(error).__name__
    return f"{type(error).__name__}: {first}", location
