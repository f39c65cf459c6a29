"""One call of a model captured whole: the graph, its contract, and the code around it.

Dynamo traces; what it found is turned into data: guards (`guards`), the digests of all code
that was inlined (`digests`), the places that graph inputs come from, and the bytecode that
fetches the call's arguments, calls the graph and rebuilds outputs and side effects (`entry_code`).
"""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from precast.capture.call_check import all_different, require_tensor, signature_of
from precast.capture.digests import code_digests, own_code
from precast.capture.dynamic_shapes import mark_dynamic, unmark_dynamic
from precast.capture.entry_code import EntryCode
from precast.capture.gpus import names_a_gpu, uses_the_current_gpu
from precast.capture.guards import GuardRecorder, symbol_ranges
from precast.capture.places import Path, Scope, parse_place, readable, root_of, size_of
from precast.contract import (
    Contract,
    Unrecordable,
    ambient_state,
    digest_code,
    hooks_of,
    is_fixed,
    tensor_spec,
)
from precast.errors import CaptureError, TracedCodeRaisedError
from precast.graph.gpus import single_gpu
from precast.graph.piece import SymbolRange

if TYPE_CHECKING:
    import torch


class Capture:
    """Everything the cold path needs of one captured call."""

    __slots__ = (
        "bytecode",
        "contract",
        "entry",
        "function",
        "gpu",
        "graph_module",
        "is_for_any_gpu",
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
        gpu: int | None,
        is_for_any_gpu: bool,
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
        self.gpu = gpu
        self.is_for_any_gpu = is_for_any_gpu
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
            writer.require(all_different(arguments), "no two tensor arguments are one object")
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
        CaptureError: Dynamo could not make one graph of it; says where in the user's code. Or
            it is on several GPUs.
        Unrecordable: The call's arguments cannot be described as data.
    """
    from precast.torch_private import (
        capture_full_graph,
        placeholder_source,
        raised_while_traced,
    )

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
        raised = raised_while_traced(error)
        if raised is not None:
            problem = f"it raised {raised} while it was traced"
            raise TracedCodeRaisedError(name, problem, location) from error
        raise CaptureError(name, problem, location) from error
    if raw is None:
        return None
    scope = Scope(function, owner is not None, raw.import_sources, raw.globals)
    gpu = single_gpu(raw.graph_module, name)
    recorder = GuardRecorder(scope, gpu)
    weights, specs = _record_inputs(raw, recorder, gpu)
    recorder.record_all(raw.guards, raw.sizes_strides)
    unrecordable: str | None = None
    contract: Contract | None = None
    is_for_any_gpu = False
    entry = EntryCode(
        marshalled="",
        backend_name=raw.backend_id,
        free_names=list(raw.closure_names),
        recipes={},
        arguments=list(raw.arguments),
    )
    try:
        entry.record(raw, function)
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
        if gpu is not None:
            codes = [*own_code(raw.traced_code, function), raw.bytecode]
            check = (recorder.writer.lines, recorder.writer.constants)
            is_for_any_gpu = not names_a_gpu(codes, raw.graph_module, contract, entry, check)
    except Unrecordable as error:
        unrecordable = str(error)
    if gpu is not None and uses_the_current_gpu(raw.graph_module):
        recorder.writer.require("current_gpu() == GPU", "the current GPU is the model's")
    recorder.writer.require_no_gradients()
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
        gpu=gpu,
        is_for_any_gpu=is_for_any_gpu,
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


def _record_inputs(
    raw: Any, recorder: GuardRecorder, gpu: int | None
) -> tuple[list[int], list[list[Any]]]:
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
                recorder.writer, parse_place(source), value, raw.sizes_strides.get(source), gpu
            )
        else:
            weights.append(recorder.table.add(parse_place(source)))
            specs.append(tensor_spec(value, gpu))
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
