"""A model without its data, for a child process of this one.

Tensors are sent as sizes, dtypes, strides and devices; all else by pickle. The pickle is this
process's own, goes through a pipe and is never stored. A tensor that is read back is *hollow*: it
has no memory, on whatever device it is, so that a capture in the child does not cost the model's
size again.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import types
from typing import Any


class CannotSendError(Exception):
    """The model cannot be sent to another process; says why."""


def dump(value: Any) -> bytes:
    """Return a model and a call of it as bytes for a child.

    Raises:
        CannotSendError: Something in it lives in this process only.
    """
    buffer = io.BytesIO()
    try:
        _SkeletonPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except CannotSendError:
        raise
    except Exception as error:
        raise CannotSendError(f"it cannot be sent: {type(error).__name__}: {error}") from error
    if b"__main__" in buffer.getvalue():
        raise CannotSendError("a class is defined in the main script, which no child may run")
    return buffer.getvalue()


def load(data: bytes) -> Any:
    """Read what the parent dumped: its own bytes, straight from its pipe."""
    return pickle.loads(data)


def hollow(tensor: Any) -> Any:
    """Return a tensor of the same kind without memory: what a capture needs, and no more."""
    return hollow_tensor(
        str(tensor.dtype),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        str(tensor.device),
        tensor.requires_grad,
    )


def hollow_tensor(dtype: str, shape: Any, stride: Any, device: str, requires_grad: bool) -> Any:
    """Return a tensor of the given kind without memory."""
    import torch

    with torch.inference_mode(False):  # An inference tensor could not be marked later.
        tensor = torch.empty_strided(
            shape, stride, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device
        )
        if tensor.device.type != "meta":
            tensor.untyped_storage().resize_(0)  # One at a time: never more than the largest.
        return tensor.requires_grad_(requires_grad)


def hollow_parameter(*spec: Any) -> Any:
    """Return a parameter of the given kind without memory."""
    import torch

    tensor = hollow_tensor(*spec)
    return torch.nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def served_function(module: str, qualname: str) -> Any:
    """Return the function that Precast serves under a name, without what serves it."""
    importlib.import_module(module)
    found = _named(module, qualname)
    return getattr(found, "__wrapped__", found)


def _named(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


class _SkeletonPickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            kind = type(value)
            if kind not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                raise CannotSendError(f"a tensor is a {kind.__name__}, {value.layout}")
            make = hollow_parameter if kind is torch.nn.Parameter else hollow_tensor
            strides = tuple(value.stride())
            spec = (str(value.dtype), tuple(value.shape), strides, str(value.device))
            return make, (*spec, value.requires_grad)
        if isinstance(value, types.FunctionType):
            place = (value.__module__, value.__qualname__)
            found = _named(*place)
            # Its name leads to the wrapper that serves it, which no child needs.
            if found is not value and getattr(found, "__wrapped__", None) is value:
                return served_function, place
        return NotImplemented
