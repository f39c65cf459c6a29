"""Whether a capture names a GPU: else what was captured on one is right on any.

`x.device` and `torch.device("cuda", 0)` are the same device in a captured graph, so the code that
was traced is asked where it came from. In doubt it counts as named, which costs a capture on each.
"""

from __future__ import annotations

import dis
import json
import types
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from precast.capture.entry_code import EntryCode
    from precast.contract import Contract


def names_a_gpu(
    codes: Iterable[types.CodeType],
    graph_module: torch.fx.GraphModule,
    contract: Contract,
    entry: EntryCode,
    check: tuple[list[str], dict[str, Any]],
) -> bool:
    """Whether a device that is in a capture may be there by its number.

    Args:
        codes: What was traced, and what runs around the graph.
        graph_module: The graph.
        contract: What must hold for the model.
        entry: The code around the graph.
        check: What must hold for a call, as lines and constants.
    """
    lines, constants = check
    values = [one for one in contract.checks if one[1] != "tensor"]
    written = json.dumps([values, contract.state, constants, entry.recipes, entry.objects])
    return (
        '"cuda' in written
        or any("'cuda" in line for line in lines)
        or any(map(_code_names, codes))
        or any(_is_name(value) for node in graph_module.graph.nodes for value in _devices(node))
    )


def uses_the_current_gpu(graph_module: torch.fx.GraphModule) -> bool:
    """Whether a graph asks for "cuda" without a number: eager goes to the current one."""
    for node in graph_module.graph.nodes:
        if node.op == "call_method" and node.target == "cuda" and len(node.args) == 1:
            return True
        if any(
            value == "cuda" or (getattr(value, "type", None) == "cuda" and value.index is None)
            for value in _devices(node)
        ):
            return True
    return False


def _code_names(code: types.CodeType) -> bool:
    if any(map(_is_text_of_gpu, code.co_consts)):
        return True
    before = None
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if name == "device" and (before == "torch" or instruction.opname == "LOAD_GLOBAL"):
            return True  # `torch.device(...)`: of what, is known at run only.
        before = name
    return False


def _is_text_of_gpu(value: Any) -> bool:
    if isinstance(value, types.CodeType):
        return _code_names(value)
    if isinstance(value, tuple | frozenset):
        return any(map(_is_text_of_gpu, value))
    return isinstance(value, str) and value.startswith("cuda")


def _devices(node: torch.fx.Node) -> Iterator[Any]:
    """What a node says of devices: texts, devices, and numbers where these stand for devices."""
    import torch

    values = [*node.args, *node.kwargs.values()]
    while values:
        value = values.pop()
        if isinstance(value, list | tuple):
            values.extend(value)
        elif isinstance(value, str | torch.device):
            yield value
    places = [node.kwargs.get("device")]
    if node.op == "call_method" and node.target in ("to", "cuda"):
        places.extend(node.args[1:2])
    yield from (value for value in places if type(value) is int)


def _is_name(value: Any) -> bool:
    # A device may be an input's, which `_code_names` tells; a text or a number is none's.
    if type(value) is int:
        return True
    if isinstance(value, str):
        return value.startswith("cuda")
    return value.type == "cuda" and value.index is None
