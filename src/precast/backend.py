"""A graph's way from capture to code that runs, through a drawing (`drawing.py`) of its pieces.

`blueprint_of` makes plain data of a captured call, for a model that starts warm later.
`compile_traced` is for a graph that Dynamo keeps guarding: there, every start traces, and
only the pieces come from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precast.binding import bind
from precast.blueprint import Blueprint, narrowed_ranges, slot_table
from precast.drawing import MayPack, cut_and_write, digest_of_text, draw, pack_nothing
from precast.errors import Reason
from precast.events import Emit, FellBack
from precast.graph.gpus import single_gpu
from precast.passes.chosen import ChosenPasses
from precast.runtime.gpu import on_gpu, run_on
from precast.runtime.packed import may_pack

if TYPE_CHECKING:
    import torch

    from precast.capture.dynamo import Capture
    from precast.config import CompilationConfig
    from precast.graph.piece import SymbolRange


def blueprint_of(
    capture: Capture,
    config: CompilationConfig,
    emit: Emit,
    name: str,
    example: list[list[int]],
    passes: ChosenPasses,
    may_pack: MayPack,
) -> Blueprint:
    """Return a captured call as plain data.

    Args:
        capture: Of a call, with a contract.
        config: Of the model.
        emit: Is told what happens.
        name: Of the model.
        example: The shapes of the call's tensors.
        passes: Those for whole graphs are run.
        may_pack: Whether the weights of these names may become views of one tensor.

    Raises:
        SplitError: The graph cannot be cut.
    """
    from precast.capture.digests import native_digests
    from precast.stitch import SerializableFunction

    assert capture.contract is not None
    num_nodes = len(capture.graph_module.graph.nodes)
    drawing = draw(
        capture.graph_module,
        ranges=capture.ranges,
        sources=capture.sources,
        arguments=capture.entry.arguments,
        weights=capture.weights,
        config=config,
        emit=emit,
        name=name,
        passes=passes,
        may_pack=may_pack,
    )
    capture.contract.code.extend(native_digests(drawing.execution.targets))
    position = {name: i for i, name in enumerate([*capture.weights, *drawing.packs])}
    used = [symbol for symbols in drawing.symbols for symbol in symbols.values()]
    return Blueprint(
        check=capture.open_check(sorted(drawing.mutated), used),
        contract=capture.contract.to_json(),
        entry=capture.entry.to_json(),
        example=example,
        execution=SerializableFunction(drawing.execution).to_json(),
        gpu=capture.gpu,
        groups=[[position[name] for name in group] for group in drawing.groups],
        is_for_any_gpu=capture.is_for_any_gpu,
        mutates=bool(drawing.mutated),
        names=drawing.names,
        num_guards=capture.num_guards,
        num_nodes=num_nodes,
        packs=[[position[name] for name in group] for group in drawing.packs.values()],
        passes=drawing.passes,
        pieces=drawing.pieces,
        rest=[position[name] for name in drawing.rest],
        slots=drawing.slots,
        split=drawing.split,
        symbols=drawing.symbols,
        texts=drawing.texts,
    )


def packing_rule(capture: Capture, function: Any, owner: Any, passes: ChosenPasses) -> MayPack:
    """Return what tells whether weights, by name, may become views of one tensor.

    By the model's own weights: where they are hollow, nothing may be packed.
    """
    if not passes.may_pack:
        return pack_nothing
    assert capture.contract is not None
    binding = bind(capture.contract, function, owner, gpu=capture.gpu)
    if isinstance(binding, Reason):
        return pack_nothing  # Whoever binds it next will say so.
    weights = dict(zip(capture.weights, binding.weights, strict=True))
    return lambda names: all(n in weights for n in names) and may_pack([weights[n] for n in names])


def digests_of_texts(
    capture: Capture,
    config: CompilationConfig,
    passes: ChosenPasses,
    packs: Sequence[Sequence[int]],
) -> list[str]:
    """Return the digests of the texts of a capture's pieces, as an assembly keeps them.

    Args:
        capture: Of a call.
        config: Of the model.
        passes: As the assembly's; only those for whole graphs count.
        packs: Of the assembly: these weights are packed again, and no others.

    Raises:
        SplitError: The graph cannot be cut.
    """
    known = [[capture.weights[i] for i in group] for group in packs]
    every = {name for group in known for name in group}
    _, written, _, _ = cut_and_write(
        capture.graph_module,
        ranges=capture.ranges,
        sources=capture.sources,
        arguments=capture.entry.arguments,
        weights=capture.weights,
        config=config,
        emit=lambda _: None,
        name="",
        passes=passes,
        may_pack=lambda names: names in known if len(names) > 1 else names[0] in every,
    )
    return sorted({digest_of_text(found.piece.text) for found in written.values()})


def compile_traced(graph_module: torch.fx.GraphModule, session: Any) -> Callable[..., Any]:
    """Return a callable for a graph that Dynamo guards, its pieces compiled or found."""
    import torch
    from torch.autograd import forward_ad

    from precast.capture.guards import symbol_ranges
    from precast.errors import PrecastError

    names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    example = next(
        (
            size
            for node in graph_module.graph.find_nodes(op="placeholder")
            for size in _sizes(node.meta.get("example_value"))
            if hasattr(size, "node")
        ),
        None,
    )
    ranges = symbol_ranges(example.node.shape_env) if example is not None else {}
    eager = graph_module.forward
    started = time.perf_counter()
    try:
        gpu = single_gpu(graph_module, session.name)
        drawing = draw(
            _copy_graph(graph_module),
            ranges=ranges,
            sources={},
            arguments=names,
            weights=(),
            config=session.config,
            emit=session.emit,
            name=session.name,
            passes=session.passes,
            may_pack=pack_nothing,
        )
        with on_gpu(gpu):
            results = session.manager.compile(drawing.pieces, drawing.names)
    except PrecastError as error:
        if session.config.on_error == "raise":
            raise
        session.emit(FellBack(session.name, None, error.reason))
        return eager
    finally:
        session.manager.close()
    execution = drawing.execution
    execute = run_on(gpu, execution.compile())
    table = slot_table(drawing.slots, results)
    callables = table.callables
    found = [result for result in results if result.from_cache]
    session.emit(
        table.ready(
            session.name,
            time.perf_counter() - started,
            unique_pieces=len(results),
            from_cache=len(found),
            seconds_saved=sum(result.seconds for result in found),
            warm=False,
        )
    )
    extra: tuple[Any, ...] = ([],) if execution.takes_weights else ()
    positions = [names.index(name) for name in execution.arguments]
    limits = _limits(graph_module, narrowed_ranges(drawing.slots, drawing.symbols, results))

    tensors = [
        names.index(node.name)
        for node in graph_module.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("example_value"), torch.Tensor)
    ]

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and any(args[i].requires_grad for i in tensors)
        ):
            return eager(*args)  # Compiled code records no gradients.
        for position, dim, bounds in limits:
            size = args[position] if dim is None else args[position].shape[dim]
            if size not in bounds:
                # Dynamo's guards do not know that this code holds for fewer sizes.
                return eager(*args)
        return execute(callables, *extra, *(args[i] for i in positions))

    return run


def _limits(
    graph_module: torch.fx.GraphModule, narrowed: Mapping[str, SymbolRange]
) -> list[tuple[int, int | None, SymbolRange]]:
    """Where each narrowed symbol can be read: (argument, dimension, range)."""
    from precast.graph.canonical import symbol_of

    limits: list[tuple[int, int | None, SymbolRange]] = []
    found = set()
    for position, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        is_tensor = hasattr(value, "shape")
        for dim, size in enumerate(value.shape if is_tensor else (value,)):
            symbol = symbol_of(size) if hasattr(size, "node") else None
            if symbol is not None and symbol in narrowed and symbol not in found:
                found.add(symbol)
                limits.append((position, dim if is_tensor else None, narrowed[symbol]))
    return limits


def _copy_graph(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    import torch

    graph = torch.fx.Graph()
    env: dict[Any, Any] = {}
    for node in graph_module.graph.nodes:
        copy = graph.node_copy(node, lambda n: env[n])
        copy.meta = dict(node.meta)
        env[node] = copy
    return torch.fx.GraphModule(graph_module, graph)


def _sizes(value: Any) -> Sequence[Any]:
    if hasattr(value, "shape"):
        return tuple(value.shape)
    return (value,)
