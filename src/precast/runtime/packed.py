"""Parameters as views of one packed tensor, so that one product can take them together.

Memory stays what it was: the packed tensor takes the place of the parameters' own. The parameters
are the same objects with the same values; writing into them writes into the packed tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from precast.torch_private import storage_use_count

#: How long one operator may take on a CPU.
_GRACE_S = 2.0


class CannotPack(Exception):  # noqa: N818 - a finding that is answered, not an error that is shown.
    """A parameter may not become a view of another tensor; says why."""


def pack(parameters: Sequence[Any]) -> Any:
    """Return a tensor of all parameters stacked, whose memory they share from now on.

    Where they lie one behind the other already, nothing is copied.

    Raises:
        CannotPack: One of them may not be moved.
    """
    import torch

    adjacent = _adjacent(parameters)
    if adjacent is not None:
        return adjacent
    if parameters[0].is_cuda:
        with torch.cuda.device(parameters[0].device):
            if torch.cuda.is_current_stream_capturing():
                raise CannotPack("a CUDA graph is being captured")
    for parameter in parameters:
        problem = why_not(parameter)
        if problem is not None:
            raise CannotPack(problem)
    # Not an inference tensor: parameters may be trained or moved later.
    with torch.inference_mode(False), torch.no_grad():
        try:
            packed = torch.cat([parameter.detach() for parameter in parameters])
        except torch.OutOfMemoryError as error:
            raise CannotPack("no memory is left to move them") from error
        start = 0
        former = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = packed[start : start + len(parameter)]
            start += len(parameter)
    _note_views(packed, parameters)
    _let_go(former)
    return packed


def _let_go(former: list[Any]) -> None:
    """Free memory that parameters had, when no thread can be reading it any more.

    An operator that is running reads the memory that its weight had when it began, and does not
    keep it. On a GPU it was launched by then, and is waited for; on a CPU it is given time.
    """
    if former[0].device.type == "cpu":
        timer = threading.Timer(_GRACE_S, former.clear)
        timer.daemon = True
        timer.start()
        return
    import torch

    torch.accelerator.synchronize(former[0].device)
    former.clear()


def _adjacent(parameters: Sequence[Any]) -> Any:
    """Return one tensor over parameters that lie one behind the other; None where they do not."""
    import torch

    first = parameters[0]
    at = first.data_ptr()
    for parameter in parameters:
        if (
            parameter.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or parameter.data_ptr() != at
            or not parameter.is_contiguous()
            or parameter.is_inference()
            or parameter.dtype is not first.dtype
        ):
            return None
        at += parameter.numel() * parameter.element_size()
    with torch.inference_mode(False), torch.no_grad():
        shape = (sum(map(len, parameters)), *first.shape[1:])
        # Not a view of one of them: a view keeps what it is a view of alive.
        packed = torch.empty(0, dtype=first.dtype, device=first.device)
        packed.set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())
    _note_views(packed, parameters)
    return packed


def _note_views(packed: Any, parameters: Sequence[Any]) -> None:
    """Remember, at the memory itself, which tensors over it are known to us."""
    storage = packed.untyped_storage()
    known = [ref for ref in getattr(storage, "precast_views", ()) if ref() is not None]
    storage.precast_views = [*known, *map(weakref.ref, (packed, *parameters))]


def _num_known_views(storage: Any) -> int:
    """Count the live tensors over a packed tensor's memory that are known to us; 0: it is none."""
    where = storage.data_ptr()
    views = [ref() for ref in getattr(storage, "precast_views", ())]
    return len({id(v) for v in views if v is not None and v.untyped_storage().data_ptr() == where})


def why_not(parameter: Any) -> str | None:
    """Return why a parameter must stay where it is; None: nobody would notice."""
    import torch

    if type(parameter) not in (torch.nn.Parameter, torch.Tensor):
        return f"it is a {type(parameter).__name__}"
    if parameter.is_inference() or not parameter.is_leaf:
        return "it was made by a computation, or under inference_mode"
    if not parameter.is_contiguous() or parameter.numel() == 0 or parameter.is_meta:
        return "it is not dense"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "it has gradient hooks"
    storage = parameter.untyped_storage()
    # One that was packed before may be moved again, if nobody but us looks at that memory.
    num_views = _num_known_views(storage) or 1
    if num_views == 1 and storage.nbytes() != parameter.numel() * parameter.element_size():
        return "its memory holds more than itself"
    if parameter.device.type == "cpu" and parameter.is_shared():
        return "other processes share its memory"
    if storage_use_count(parameter) > _USED_ONCE() + num_views - 1:
        return "another tensor shares its memory"
    return None


def may_pack(parameters: Sequence[Any]) -> bool:
    """Whether `pack` would take these parameters; of a single one, whether it may with others."""
    if len(parameters) == 1:
        # What is packed already shares its memory: with the right others it may stay so.
        is_view = _num_known_views(parameters[0].untyped_storage()) > 0
        return is_view or why_not(parameters[0]) is None
    return _adjacent(parameters) is not None or all(why_not(p) is None for p in parameters)


def _USED_ONCE() -> int:  # noqa: N802
    """How often the memory of a tensor counts as used that nobody shares."""
    import torch

    return storage_use_count(torch.empty(1))
