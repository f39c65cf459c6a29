"""A captured graph made ready for cutting, in place, with its meaning kept.

Tracing leaves behind what only tracing needed (gradient switches, checks that guards already make,
telemetry), and values that must not cross a cut (`torch.Size`, tuples). Both go here, so that
cutting deals with tensors and single numbers only.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from precast.split.nodes import (
    argument_of,
    enters_context,
    exits_context,
    is_aggregate,
    is_call,
    is_eval_dropout,
    is_known,
    is_pick,
    is_removable,
    is_size,
    is_sizes,
    short_name,
    unbacked_symbols,
    value_of,
)

_DROPPED = frozenset(
    {
        "_set_grad_enabled",
        "set_grad_enabled",
        "_log_api_usage_once",
        "_enter_inference_mode",
        "_exit_inference_mode",
    }
)
_CHECKS = frozenset(
    [
        "_check",
        "_check_is_size",
        "_check_value",
        "_check_index",
        "_assert",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_check_type",
    ]
)


def clean_graph(graph_module: GraphModule, autocast_devices: Collection[str] = ()) -> GraphModule:
    """Remove what a compiled graph does not need and untangle tuples and sizes; in place.

    Afterwards: sizes are literals, placeholders, or arithmetic on them wherever the trace shows
    how; nothing but `getitem` reads a tuple of tensors; nothing unused is left.

    Args:
        graph_module: As Dynamo gave it, with `example_value` in the nodes' meta.
        autocast_devices: Device types for which autocast is on around the graph. Where it is off,
            a region that switches it off changes nothing and goes.
    """
    _drop_needless_calls(graph_module)
    _drop_disabled_autocast(graph_module, autocast_devices)
    _resolve_sizes(graph_module)
    _pick_from_tuples(graph_module)
    _drop_eval_dropout(graph_module)
    _drop_proven_checks(graph_module)
    _drop_unused(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _drop_needless_calls(graph_module: GraphModule) -> None:
    # Pieces run without gradients, and their outputs are no inference tensors in either mode.
    for node in reversed(list(graph_module.graph.nodes)):
        is_dropped = node.op == "call_function" and short_name(node) in _DROPPED
        if is_dropped and is_known(node) and not node.users:
            graph_module.graph.erase_node(node)


def _drop_disabled_autocast(graph_module: GraphModule, autocast_devices: Collection[str]) -> None:
    open_regions: list[tuple[Node, str, bool, bool]] = []  # (enter, device, is on, was on)
    needless: list[Node] = []
    for node in graph_module.graph.nodes:
        name = short_name(node) if node.op == "call_function" else ""
        if name == "_enter_autocast":
            device = str(argument_of(node, "device_type", 0))
            before = device in autocast_devices
            for _, other, is_on, _ in open_regions:
                before = is_on if other == device else before
            is_on = argument_of(node, "enabled", 2, True) is not False
            open_regions.append((node, device, is_on, before))
        elif name == "_exit_autocast":
            match = [region for region in open_regions if region[0] is node.args[0]]
            for region in match:
                open_regions.remove(region)
                if not region[2] and not region[3]:
                    needless.extend((node, region[0]))
    for node in needless:
        if not node.users:
            graph_module.graph.erase_node(node)


def _resolve_sizes(graph_module: GraphModule) -> None:
    """Put a literal, a placeholder or arithmetic in the place of every size read from a tensor."""
    graph = graph_module.graph
    placeholders = _symbol_placeholders(graph_module)
    for node in list(graph.nodes):
        if not is_size(node):
            continue
        value = value_of(node)
        if is_sizes(value):
            _spread_size(graph_module, node, value, placeholders)
            continue
        found = _as_number(value, placeholders)
        if found is None and any(isinstance(value_of(a), torch.Tensor) for a in _roots(node)):
            with graph.inserting_before(node):
                found = _as_arithmetic(graph, value, placeholders, node)
        if found is not None:
            _substitute(node, found)


def _symbol_placeholders(graph_module: GraphModule) -> dict[Any, Node]:
    found: dict[Any, Node] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            if getattr(expression, "is_Symbol", False):
                found.setdefault(expression, node)
    return found


def _as_number(value: Any, placeholders: dict[Any, Node]) -> Any:
    """Return a literal or a placeholder that has this value; None if there is none."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, torch.SymInt):
        constant = value.node.maybe_as_int()
        return constant if constant is not None else placeholders.get(value.node.expr)
    if isinstance(value, torch.SymBool):
        return value.node.maybe_as_bool() if hasattr(value.node, "maybe_as_bool") else None
    return None


def _as_arithmetic(graph: Any, value: Any, placeholders: dict[Any, Node], like: Node) -> Any:
    """Write a size as sums and products of placeholders; None if it takes more than that."""
    if not isinstance(value, torch.SymInt) or unbacked_symbols(value):
        return None
    expression = value.node.expr
    if not _is_sum_of_products(expression, placeholders):
        return None
    shape_env = value.node.shape_env
    result = _emit(graph, expression, placeholders, like, shape_env)
    if isinstance(result, Node):
        result.meta["example_value"] = value
    return result


def _is_sum_of_products(expression: Any, placeholders: dict[Any, Node]) -> bool:
    if expression.is_Integer:
        return True
    if expression.is_Symbol:
        return expression in placeholders
    if not (expression.is_Add or expression.is_Mul):
        return False
    return all(_is_sum_of_products(part, placeholders) for part in expression.args)


def _emit(graph: Any, expression: Any, placeholders: dict[Any, Node], like: Node, env: Any) -> Any:
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return placeholders[expression]
    target = operator.add if expression.is_Add else operator.mul
    parts = [_emit(graph, part, placeholders, like, env) for part in expression.args]
    result = parts[0]
    for part in parts[1:]:
        operands = [value_of(p) if isinstance(p, Node) else p for p in (result, part)]
        result = graph.call_function(target, (result, part))
        result.meta.update({k: v for k, v in like.meta.items() if k != "example_value"})
        result.meta["example_value"] = target(*operands)
    return result


def _roots(node: Node) -> list[Node]:
    """Return the nodes that are no sizes, from which a size is computed."""
    found: list[Node] = []
    for argument in node.all_input_nodes:
        found.extend(_roots(argument) if is_size(argument) else [argument])
    return found


def _spread_size(
    graph_module: GraphModule, node: Node, value: Any, placeholders: dict[Any, Node]
) -> None:
    """Replace a whole `x.size()` by its parts, where it is an argument as a whole."""
    if short_name(node) == "getitem" and not isinstance(node.args[1], slice):
        return  # Nested sizes do not occur; leave what is not understood.
    users = [user for user in node.users if not _reads_from(user, node)]
    if not users:
        return
    parts = [_as_number(part, placeholders) for part in value]
    at = node
    for position, part in enumerate(parts):
        if part is None:
            with graph_module.graph.inserting_after(at):
                at = graph_module.graph.call_function(operator.getitem, (node, position))
            at.meta.update(node.meta)
            at.meta["example_value"] = value[position]
            parts[position] = at
    for user in users:
        _substitute(node, tuple(parts), [user])


def _reads_from(user: Node, node: Node) -> bool:
    """Tell whether `user` is a method or an element of the size, which a tuple cannot stand for."""
    if user.op == "call_method" or user.target is getattr:
        return user.args[0] is node
    return user.target is operator.getitem and user.args[0] is node


def _pick_from_tuples(graph_module: GraphModule) -> None:
    """Leave only `getitem` with a number as a reader of tuples of tensors."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not is_call(node) or not is_aggregate(value_of(node)):
            continue
        parts: dict[tuple[int, ...], Node] = {}
        for user in list(node.users):
            if user.target is operator.getitem and user.args[0] is node:
                index = user.args[1]
                if isinstance(index, int):
                    if index < 0:  # One spelling, so that equal pieces are equal.
                        user.args = (node, index + len(value_of(node)))
                elif isinstance(index, slice):
                    chosen = range(len(value_of(node)))[index]
                    spread = tuple(_pick(graph_module, node, (i,), parts) for i in chosen)
                    _replace_slice(user, spread)
                continue
            if is_pick(user):
                continue
            _substitute(node, _spread(graph_module, node, (), parts), [user])


def _replace_slice(node: Node, parts: Any) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and user.args[0] is node:
            index: Any = user.args[1]
            if isinstance(index, int):
                _substitute(user, parts[index])
            else:
                _replace_slice(user, parts[index])
        else:
            _substitute(node, parts, [user])


def _spread(
    graph_module: GraphModule, node: Node, path: tuple[int, ...], parts: dict[Any, Node]
) -> Any:
    """Return a node's tuple as a tuple of picks, nested as the value is."""
    value = value_of(node)
    for index in path:
        value = value[index]
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        return _pick(graph_module, node, path, parts)
    kind = list if isinstance(value, list) else tuple
    return kind(_spread(graph_module, node, (*path, index), parts) for index in range(len(value)))


def _pick(
    graph_module: GraphModule, node: Node, path: tuple[int, ...], parts: dict[Any, Node]
) -> Any:
    if not path:
        return node
    if path not in parts:
        source = _pick(graph_module, node, path[:-1], parts)
        value = value_of(source)[path[-1]]
        if value is None:
            return None
        # After the last pick made, so that they stand in order.
        at = max([source, *(p for p in parts.values())], key=_position_key(graph_module))
        with graph_module.graph.inserting_after(at):
            pick = graph_module.graph.call_function(operator.getitem, (source, path[-1]))
        pick.meta.update(source.meta)
        pick.meta["example_value"] = value
        parts[path] = pick
    return parts[path]


def _position_key(graph_module: GraphModule) -> Any:
    position = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    return position.__getitem__


def _drop_eval_dropout(graph_module: GraphModule) -> None:
    # In eager mode the result *is* the input, although the trace shows a copy.
    for node in list(graph_module.graph.nodes):
        if is_eval_dropout(node):
            source: Any = node.args[0]
            source.meta.setdefault("precast_same_storage", []).append(value_of(node))
            source.meta["precast_same_storage"] += node.meta.get("precast_same_storage", [])
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)


def _drop_proven_checks(graph_module: GraphModule) -> None:
    """Remove checks on sizes that come with the inputs: capture made guards of them."""
    for node in reversed(list(graph_module.graph.nodes)):
        if not is_call(node) or short_name(node) not in _CHECKS or node.users or not is_known(node):
            continue
        if all(
            not isinstance(value_of(argument), torch.Tensor)
            and (argument.op == "placeholder" or is_size(argument))
            and not unbacked_symbols(value_of(argument))
            for argument in node.all_input_nodes
        ):
            graph_module.graph.erase_node(node)


def _drop_unused(graph_module: GraphModule) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if (
            not node.users
            and is_removable(node)
            and not (enters_context(node) or exits_context(node))
        ):
            graph_module.graph.erase_node(node)


def _substitute(node: Node, replacement: Any, users: list[Node] | None = None) -> None:
    """Put a literal, a node or a tuple of them in the place of a node's value."""

    def swap(argument: Any) -> Any:
        return replacement if argument is node else argument

    for user in list(node.users) if users is None else users:
        user.args = map_aggregate(user.args, swap)
        user.kwargs = map_aggregate(user.kwargs, swap)
