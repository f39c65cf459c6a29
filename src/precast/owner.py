"""What is asked of a served module: its `forward`, the device it is on, the blocks within it."""

from __future__ import annotations

import re
import types
from typing import Any, cast

import torch


def find_forward(model: torch.nn.Module) -> types.FunctionType | None:
    """Return a module's `forward` unbound; None: it is no method of the module."""
    forward: Any = model.forward
    if isinstance(forward, types.MethodType) and forward.__self__ is model:
        function = forward.__func__
        return function if isinstance(function, types.FunctionType) else None
    return None


def wrap_forward() -> types.FunctionType:
    """Return a method for a module whose `forward` somebody replaced, to offload it, say."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    return cast("types.FunctionType", forward)


def device_of(owner: torch.nn.Module | None, signature: str) -> str:
    """Return the device type whose toolchain counts for a call."""
    kinds = set(re.findall(r"torch\.\w+/\d+/(\w+)", signature))
    # By hand: `parameters()` costs ten times as much, milliseconds in a deep model.
    modules = [] if owner is None else [owner]
    seen = set(modules)
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            kinds.update(x.device.type for x in tensors.values() if x is not None)
        new = [x for x in module._modules.values() if x is not None and x not in seen]
        seen.update(new)
        modules.extend(new)
    return min(kinds - {"cpu"}, default="cpu")


def find_blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the outermost sub-modules worth compiling alone, with their paths.

    Entries of module lists come one by one; modules of `torch.nn` itself are too small.
    """
    found: list[tuple[str, torch.nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            found.extend((f"{name}.{inner}", block) for inner, block in find_blocks(child))
        elif isinstance(child, torch.nn.Sequential) or not type(child).__module__.startswith(
            "torch.nn."
        ):
            found.append((name, child))
    return found
