"""The GPU that a model is on: the current one wherever its code is loaded or runs.

Pieces know the kind of their device and no number, so that one artifact serves every GPU of a kind.
Eager's operators go where their tensors are; compiled code goes to the current device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def gpu_of(
    owner: torch.nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | None:
    """Return the number of the GPU of the first tensor that is on one; None: there is none.

    Args:
        owner: The module that is served; its tensors come first. None: a function is.
        args: Of the call, without the owner.
        kwargs: Of the call.
    """
    if not torch.cuda.is_initialized():
        return None
    return next(
        (
            tensor.get_device()
            for tensor in _tensors((owner, args, dict(kwargs)), set())
            if tensor.is_cuda
        ),
        None,
    )


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    parts: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        if id(value) in seen:
            return
        seen.add(id(value))
        tables = (value._parameters, value._buffers, value._modules)
        parts = (part for table in tables for part in table.values())
    elif isinstance(value, tuple | list):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.values()
    for part in parts:
        yield from _tensors(part, seen)


@contextmanager
def on_gpu(number: int | None) -> Iterator[None]:
    """Make a GPU the current one in this thread; None: leave it as it is."""
    if number is None or torch.cuda.current_device() == number:
        yield
        return
    with torch.cuda.device(number):
        yield


def run_on(number: int | None, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs with a GPU as the current one; None: the function itself."""
    if number is None:
        return run
    current, device = torch.cuda.current_device, torch.cuda.device

    def run_there(*args: Any) -> Any:
        if current() == number:  # As in most programs: a tenth of a microsecond.
            return run(*args)
        with device(number):
            return run(*args)

    return run_there
