"""What is known of single graph nodes: sizes, views, writes, random numbers, foreign operators.

Facts only; what follows from them for a cut is `plan.py`'s business. Graphs are those of Dynamo:
`node.meta["example_value"]` holds fake tensors that share storage where real ones would.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from precast.graph.targets import target_name

# Operators that every torch has; all others belong to a library that has to be loaded first.
BUILTIN_NAMESPACES = frozenset(
    {"aten", "prims", "prim", "quantized", "quantized_decomposed", "mkldnn", "onednn"}
)
_SCALARS = (int, float, bool, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
_READS_METADATA = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "is_contiguous",
        "__len__",
        "get_device",
        "is_floating_point",
        "is_complex",
        "ndim",
        "shape",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "len",
    ]
)
_RANDOM = frozenset(
    [
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "normal",
        "normal_",
        "bernoulli",
        "bernoulli_",
        "multinomial",
        "poisson",
        "uniform_",
        "exponential_",
        "random_",
        "geometric_",
        "cauchy_",
        "log_normal_",
        "gumbel_softmax",
        "rrelu_with_noise",
        "binomial",
        "_standard_gamma",
        "native_dropout",
        "_fused_dropout",
        "_sample_dirichlet",
        "seed",
        "manual_seed",
        "set_rng_state",
        "get_rng_state",
    ]
)
# Random only if they train, which their `training` (or `train`) argument says.
_RANDOM_IN_TRAINING = frozenset(
    [
        "dropout",
        "dropout_",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_dropout",
        "feature_dropout_",
        "alpha_dropout",
        "alpha_dropout_",
        "feature_alpha_dropout",
        "feature_alpha_dropout_",
        "rrelu",
        "rrelu_",
    ]
)
_DYNAMIC = frozenset(
    [
        "nonzero",
        "nonzero_numpy",
        "unique",
        "unique_consecutive",
        "masked_select",
        "argwhere",
        "item",
        "tolist",
        "bincount",
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "allclose",
    ]
)
# Their fake values are plain tensors: only the names say that real ones are quantized.
_QUANTIZES = frozenset(
    [
        "quantize_per_tensor",
        "quantize_per_tensor_dynamic",
        "quantize_per_channel",
        "_empty_affine_quantized",
        "_empty_per_channel_affine_quantized",
        "_make_per_tensor_quantized_tensor",
        "_make_per_channel_quantized_tensor",
    ]
)
_READS_QUANTIZED = frozenset(
    ["dequantize", "int_repr", "q_per_channel_scales", "q_per_channel_zero_points"]
)
_EMPTY = frozenset(["empty", "empty_like", "new_empty", "empty_strided", "empty_permuted"])
# In place, but they change what the tensor is, which no cut can carry over.
_RESHAPES_IN_PLACE = frozenset(
    [
        "resize_",
        "resize_as_",
        "set_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "squeeze_",
        "unsqueeze_",
        "as_strided_",
    ]
)
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
_IN_PLACE_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE.split())
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE.split())


def value_of(node: Node) -> Any:
    """Return the fake value that capture recorded for a node; None if it has none."""
    return node.meta.get("example_value")


def short_name(node: Node) -> str:
    """Return the last part of what a node calls: `linear`, `add_`, `getitem`."""
    target: Any = node.target
    if isinstance(target, str):
        return target.rpartition(".")[2]
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.partition("::")[2])
    return str(getattr(target, "__name__", type(target).__name__))


def names_of(node: Node) -> set[str]:
    """Return every name a person may call this node's operator by, with dots for colons."""
    short = short_name(node)
    if node.op == "call_method":
        return {short, f"aten.{short}", f"torch.Tensor.{short}"}
    target: Any = node.target
    full = target_name(target)
    names = {short, full or short}
    if full and full.startswith("torch.ops."):
        names.add(full.removeprefix("torch.ops."))
        names.add(".".join(full.split(".")[2:4]))  # Without the overload.
        names.add("torch.ops." + ".".join(full.split(".")[2:4]))
    elif full and full.startswith(("torch.", "operator.")):
        names.add(f"aten.{short}")
        names.add(f"torch.ops.aten.{short}")
    return names


def is_call(node: Node) -> bool:
    """Tell whether a node does anything, as opposed to inputs, constants and the output."""
    return node.op in ("call_function", "call_method", "call_module")


def is_tensor(node: Node) -> bool:
    """Tell whether a node's value is one tensor."""
    return isinstance(value_of(node), torch.Tensor)


def is_aggregate(value: Any) -> bool:
    """Tell whether a value is a tuple or list that holds tensors, at any depth."""
    return isinstance(value, (tuple, list)) and any(
        isinstance(item, torch.Tensor) or is_aggregate(item) for item in value
    )


def is_number(value: Any) -> bool:
    """Tell whether a value is a plain or symbolic number."""
    return isinstance(value, _SCALARS)


def is_sizes(value: Any) -> bool:
    """Tell whether a value is a tuple or list of plain numbers, such as `x.size()`."""
    return isinstance(value, (tuple, list)) and all(isinstance(item, _SCALARS) for item in value)


def is_size(node: Node) -> bool:
    """Tell whether a node computes numbers from sizes alone and never reads a tensor's data.

    Such nodes are cheap and repeatable; they belong to no piece.
    """
    if not is_call(node):
        return False
    value = value_of(node)
    if not (isinstance(value, _SCALARS) or is_sizes(value)) or not is_known(node):
        return False
    if is_random(node) or short_name(node) in _DYNAMIC:
        return False
    if short_name(node) in _READS_METADATA or _reads_metadata(node):
        return True
    return all(_is_number(argument) for argument in node.all_input_nodes)


def _is_number(node: Node) -> bool:
    if is_call(node):
        return is_size(node)
    value = value_of(node)
    return isinstance(value, _SCALARS) or (is_sizes(value) and bool(value))


def _reads_metadata(node: Node) -> bool:
    return node.target is getattr and len(node.args) == 2 and str(node.args[1]) in _READS_METADATA


def is_pick(node: Node) -> bool:
    """Tell whether a node takes one value out of another node's tuple or list of tensors."""
    if node.target not in (operator.getitem, getattr) or not isinstance(node.args[0], Node):
        return False
    return is_aggregate(value_of(node.args[0]))


def is_known(node: Node) -> bool:
    """Tell whether a node calls torch, an operator or a builtin, and no other library."""
    if node.op == "call_method":
        return True
    target: Any = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return namespace_of(target) in BUILTIN_NAMESPACES
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    name = target_name(target)
    if name is not None:
        return name.split(".")[0] in ("torch", "operator", "math", "builtins")
    return str(getattr(target, "__module__", None) or "").split(".")[0] == "torch"


def namespace_of(target: Any) -> str:
    """Return the library an operator of `torch.ops` belongs to."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.namespace)
    return str(target._qualified_op_name).partition("::")[0]


def is_foreign_operator(node: Node) -> bool:
    """Tell whether a node calls an operator that some other library registered."""
    return isinstance(
        node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    ) and not is_known(node)


def inner_graphs(node: Node) -> list[str]:
    """Return the names of sub-graphs that a node is given, as higher-order operators are."""
    owner = node.graph.owning_module
    found = []
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and owner is not None:
            value: Any = owner
            for part in str(argument.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, torch.nn.Module):
                found.append(str(argument.target))
    return found


def is_random(node: Node) -> bool:
    """Tell whether a node draws random numbers."""
    name = short_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            return False
        return name not in _RANDOM_IN_TRAINING or argument_of(node, "train", 2) is not False
    if name in _RANDOM:
        return True
    if name in _RANDOM_IN_TRAINING:
        if is_eval_dropout(node):
            return False
        trains = argument_of(node, "training", _position_of_training(name))
        return trains is not False
    if name == "scaled_dot_product_attention":
        return argument_of(node, "dropout_p", 4, 0.0) not in (0, 0.0)
    if name == "multi_head_attention_forward":
        return argument_of(node, "training", 13, True) is not False
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):  # (..., dropout, train, bidirectional, ...)
        return any(isinstance(arg, float) and arg > 0 for arg in node.args)
    return False


def is_eval_dropout(node: Node) -> bool:
    """Tell whether a node is a dropout outside training: eager hands its input through."""
    target: Any = node.target
    if target is torch.nn.functional.dropout:
        trains = argument_of(node, "training", 2, True)
    elif target is torch.dropout:
        trains = argument_of(node, "train", 2, True)
    else:
        return False
    return trains is False and bool(node.args) and isinstance(node.args[0], Node)


def _position_of_training(name: str) -> int:
    return 3 if name.startswith("rrelu") else 2


def is_data_dependent(node: Node) -> bool:
    """Tell whether the shape or the number that a node gives depends on a tensor's data."""
    if isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.dynamic_output_shape in node.target.tags
        or torch.Tag.data_dependent_output in node.target.tags
    ):
        return True
    name = short_name(node)
    if name in _DYNAMIC:
        return True
    if name == "where" and len(node.args) + len(node.kwargs) == 1:
        return True
    value = value_of(node)
    if isinstance(value, _SCALARS) and not is_pick(node) and not is_size(node):
        return True  # A number read from a tensor, however it is spelled.
    symbols = unbacked_symbols(value)
    if symbols:
        return bool(symbols - {s for arg in node.all_input_nodes for s in _symbols_of(arg)})
    return False


def _symbols_of(node: Node) -> set[Any]:
    return unbacked_symbols(value_of(node))


def meets_lazy_view(node: Node) -> bool:
    """Tell whether a node reads or gives a conjugate or a negative view.

    `z.conj()` only marks that it is to be conjugated, and `z.conj().imag` that it is to be negated;
    compiled code reads the memory beneath.
    """
    return any(_any_tensor(value_of(n), _is_lazy) for n in (node, *node.all_input_nodes))


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_neg() or tensor.is_conj()


def _any_tensor(value: Any, is_so: Callable[[torch.Tensor], bool]) -> bool:
    """Tell whether something is so of a tensor, or of one in a tuple or list at any depth."""
    if isinstance(value, torch.Tensor):
        return is_so(value)
    return isinstance(value, tuple | list) and any(_any_tensor(item, is_so) for item in value)


def unbacked_symbols(value: Any) -> set[Any]:
    """Return the symbols in a fake value that no input's shape gives."""
    if not any(True for _ in _symbolic_parts(value)):
        return set()
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    found: set[Any] = set()
    for part in _symbolic_parts(value):
        found |= set(free_unbacked_symbols(part))
    return found


def _symbolic_parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        yield value
    elif isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield from (s for s in (*value.shape, *value.stride()) if not isinstance(s, int))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _symbolic_parts(item)


def unsupported_nodes(graph: torch.fx.Graph) -> dict[Node, None]:
    """Return the calls that no compiler takes, in order: on quantized, sparse or nested tensors."""
    found: dict[Node, None] = {}
    unusual: set[Node] = set()
    for node in graph.nodes:
        is_made = _any_tensor(value_of(node), _is_unusual) or (is_call(node) and _quantizes(node))
        is_read = not unusual.isdisjoint(node.all_input_nodes)
        if is_call(node) and (is_made or is_read):
            found[node] = None
        if is_made or (is_read and short_name(node) not in _READS_QUANTIZED):
            unusual.add(node)
    return found


def _quantizes(node: Node) -> bool:
    target: Any = node.target
    is_operator = isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return short_name(node) in _QUANTIZES or (is_operator and namespace_of(target) == "quantized")


def _is_unusual(tensor: torch.Tensor) -> bool:
    return tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided


def is_empty_factory(node: Node) -> bool:
    """Tell whether a node only reserves memory."""
    return short_name(node) in _EMPTY


def reshapes_in_place(node: Node) -> bool:
    """Tell whether a node changes a tensor's shape, strides or storage in place."""
    return node.op == "call_method" and short_name(node) in _RESHAPES_IN_PLACE


def enters_context(node: Node) -> bool:
    """Tell whether a node opens a region that must stay whole: autocast, vmap, inference mode."""
    name = short_name(node)
    return node.op == "call_function" and (
        name.startswith("_enter_") or name.endswith("_increment_nesting")
    )


def exits_context(node: Node) -> bool:
    """Tell whether a node closes what `enters_context` opened."""
    name = short_name(node)
    return node.op == "call_function" and (
        name.startswith("_exit_") or name.endswith("_decrement_nesting")
    )


def sets_global_state(node: Node) -> bool:
    """Tell whether a node changes a setting of torch itself."""
    name = short_name(node)
    return (
        node.op == "call_function"
        and name.startswith(("_set_", "set_"))
        and value_of(node) is None
        and is_known(node)
    )


def written_arguments(node: Node) -> list[Node]:
    """Return the nodes whose tensors this node writes into."""
    if not is_call(node):
        return []
    target: Any = node.target
    found: list[Any] = []
    if isinstance(target, torch._ops.OpOverload):
        found = _written_by_schema(node, target)
    elif isinstance(target, torch._ops.OpOverloadPacket):
        for overload in target.overloads():
            found.extend(_written_by_schema(node, getattr(target, overload)))
    else:
        name = short_name(node)
        in_place_method = name.endswith("_") and not name.endswith("__")
        in_place_dunder = name in _IN_PLACE_METHODS
        if (
            target is operator.setitem
            or name in ("__setitem__", "__delitem__")
            or (node.op == "call_method" and in_place_dunder)
            or (in_place_method and is_known(node) and name not in ("and_", "or_", "not_", "is_"))
            or target in _IN_PLACE_OPERATORS
        ):
            found.extend(node.args[:1])
        if "out" in node.kwargs:
            found.append(node.kwargs["out"])
        if argument_of(node, "inplace", None, False) is True:
            found.extend(node.args[:1] or [node.kwargs.get("input")])
        if name == "batch_norm" and _trains(node):
            found.extend(_normalisation_statistics(node))
        if name == "instance_norm" and argument_of(node, "use_input_stats", 5, True) is not False:
            found.extend(_normalisation_statistics(node))
        # Renormalising, these write into their weight.
        if name in ("embedding", "embedding_bag") and argument_of(node, "max_norm", None):
            found.append(argument_of(node, "weight", 1))
    return list(dict.fromkeys(n for n in _nodes_in(found) if not _is_number(n)))


def _trains(node: Node) -> bool:
    # F.batch_norm(input, mean, var, weight, bias, training, ...); torch.batch_norm has weight,
    # bias, mean, var and the same `training`.
    return argument_of(node, "training", 5, False) is not False


def _normalisation_statistics(node: Node) -> list[Any]:
    if node.target is torch.nn.functional.batch_norm or (
        node.target is torch.nn.functional.instance_norm
    ):
        return [argument_of(node, "running_mean", 1), argument_of(node, "running_var", 2)]
    return [argument_of(node, "running_mean", 3), argument_of(node, "running_var", 4)]


def _written_by_schema(node: Node, overload: Any) -> list[Any]:
    found = []
    for position, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.name in node.kwargs:
                found.append(node.kwargs[argument.name])
            elif position < len(node.args) and not argument.kwarg_only:
                found.append(node.args[position])
    return found


def _nodes_in(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _nodes_in(item)


def argument_of(node: Node, name: str, position: int | None, default: Any = None) -> Any:
    """Return an argument by its name or position; without a position, by the signature."""
    if name in node.kwargs:
        return node.kwargs[name]
    if position is None:
        position = _position_in_signature(node.target, name)
    if position is not None and position < len(node.args):
        return node.args[position]
    return default


def _position_in_signature(target: Any, name: str) -> int | None:
    if not isinstance(target, Callable) or inspect.isbuiltin(target):  # type: ignore[arg-type]
        return None
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(name) if name in names else None


def is_removable(node: Node) -> bool:
    """Tell whether a node may go when nobody uses its value."""
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "get_attr":
        return True
    if value_of(node) is None or not is_known(node):
        return False
    return not (
        written_arguments(node)
        or is_random(node)
        or enters_context(node)
        or exits_context(node)
        or sets_global_state(node)
        or "assert" in short_name(node)
        or short_name(node).startswith("_check")
    )
