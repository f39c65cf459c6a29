"""The GPUs that a captured graph works on: compiled code is for one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from precast.errors import CaptureError

if TYPE_CHECKING:
    import torch


def single_gpu(graph_module: torch.fx.GraphModule, name: str) -> int | None:
    """Return the number of the GPU that a graph's tensors are on; None: they are on none.

    Args:
        graph_module: From Dynamo, with an example of each value.
        name: Of the model, for the error.

    Raises:
        CaptureError: They are on several.
    """
    found = {
        tensor.device.index
        for node in graph_module.graph.nodes
        for tensor in _tensors(node.meta.get("example_value"))
        if tensor.device.type == "cuda"
    }
    if len(found) > 1:
        names = ", ".join(f"cuda:{number}" for number in sorted(found))
        raise CaptureError(
            name,
            f"it works on several GPUs ({names}), and compiled code on one: compile those parts of "
            "it that are on one",
        )
    return next(iter(found), None)


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "device") and hasattr(value, "shape"):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
