"""Writing the function that checks the arguments of one call, condition by condition.

Which conditions there are is said by the guards (`guards.py`) and the inputs of the graph
(`dynamo.py`); here each becomes a line of Python, which `blueprint.check_source` joins.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Sequence
from typing import Any

from precast.capture.places import Path, Scope, readable
from precast.contract import NO_GRADIENTS, Unrecordable, encode

# A negative view is the imaginary part of a conjugate one.
_PARTS_OF_COMPLEX = ("torch.float16", "torch.float32", "torch.float64")
# 20 ns a comparison; `id`, and its place in a set, 70 ns a name.
_MOST_PAIRS = 28


class CallCheckWriter:
    """Writes the function that checks one call: 0 if all holds, else a condition's number.

    The function has the captured function's own parameters, so that Python binds the
    arguments. Constants go in by name; `conditions` says what each number means.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.lines: list[str] = []
        self._names: dict[Path, str] = {}
        self._seen: set[str] = set()
        self.ranks: dict[str, int] = {}  # Of the tensors whose sizes are names.
        self.contiguous: set[str] = set()  # Tensors that are required to be so.
        self.tensors: dict[str, None] = {}  # All that a call gives.
        self.conditions: list[str] = ["everything holds"]
        self.constants: dict[str, Any] = {}
        self._constant_names: dict[str, str] = {}

    def constant(self, data: list[Any]) -> str:
        """Return the name under which a constant is passed; `data` says how to rebuild it."""
        key = repr(data)
        if key not in self._constant_names:
            name = f"c{len(self.constants)}"
            self._constant_names[key] = name
            self.constants[name] = data
        return self._constant_names[key]

    def place(self, path: Path) -> str:
        """Return the name that holds a place's value, reading it on first use."""
        if path in self._names:
            return self._names[path]
        step, key = path[-1]
        if len(path) == 1:
            if key not in self._scope.argument_names:
                raise Unrecordable(f"the local {key!r} is no argument")
            name = str(key)
        else:
            base = self.place(path[:-1])
            name = f"v{len(self._names)}_"
            read = {
                "a": f"{base}.{key}",
                "g": f"object.__getattribute__({base}, {key!r})",
                "i": f"{base}[{key!r}]",
                "k": f"[*{base}][{key}]",
                "v": f"[*dict.values({base})][{key}]",
                "t": f"type({base})",
            }
            self.lines.append(f"{name} = {read.get(step, f'len({base})')}")
        self._names[path] = name
        return name

    def require(self, condition: str, meaning: str) -> None:
        """Add a condition once."""
        if condition in self._seen:
            return
        self._seen.add(condition)
        self.conditions.append(meaning)
        self.lines.append(f"if not ({condition}): return {len(self.conditions) - 1}")

    def require_no_gradients(self) -> None:
        """Require of all tensors so far that a call with them records no gradients."""
        if self.tensors:
            records = " or ".join(f"{name}.requires_grad" for name in self.tensors)
            self.require(f"not (is_grad_enabled() and ({records}))", NO_GRADIENTS)

    def unpack(self, name: str, rank: int, meaning: str) -> None:
        """Read a tensor's sizes into names of their own, once; another rank fails the check."""
        if name in self.ranks:
            return
        self.ranks[name] = rank
        if not rank:
            self.require(f"not {name}.shape", meaning)
            return
        # A local is read ten times faster than an item of `torch.Size`, and `try` costs nothing.
        sizes = "".join(f"{self.size(name, dim)}, " for dim in range(rank)).rstrip()
        self.conditions.append(meaning)
        self.lines += [
            "try:",
            f"    {sizes} = {name}.shape",
            "except ValueError:",
            f"    return {len(self.conditions) - 1}",
        ]

    def size(self, name: str, dim: int) -> str:
        """Return the text that reads one size of a tensor."""
        return f"{name}size{dim}" if name in self.ranks else f"{name}.shape[{dim}]"


def signature_of(code: types.CodeType) -> str:
    """Return a parameter list that binds arguments as a code object does, defaults left out."""
    names = code.co_varnames
    positional = list(names[: code.co_argcount])
    keyword_only = names[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    rest = code.co_argcount + code.co_kwonlyargcount
    if code.co_posonlyargcount:
        positional.insert(code.co_posonlyargcount, "/")
    parts = positional
    if code.co_flags & 0x04:
        parts.append(f"*{names[rest]}")
        rest += 1
    elif keyword_only:
        parts.append("*")
    parts.extend(keyword_only)
    if code.co_flags & 0x08:
        parts.append(f"**{names[rest]}")
    return ", ".join(parts)


def require_tensor(
    writer: CallCheckWriter, path: Path, tensor: Any, sizes: Any, gpu: int | None = None
) -> None:
    """Require that a place holds a plain tensor like the captured one.

    `sizes` is Dynamo's (sizes, strides) of the place: symbolic where dynamic; relations
    among symbols are conditions of their own. None: the tensor's own sizes, all static. `gpu` is
    the number of the GPU that the model is on: the check gets it as `GPU` when it is opened.
    """
    name, meaning = writer.place(path), readable(path)
    writer.tensors[name] = None
    shape, stride = (tuple(tensor.shape), tuple(tensor.stride())) if sizes is None else sizes
    dtype = writer.constant(encode(tensor.dtype))
    device = tensor.device
    on_device = "is_cpu" if device.type == "cpu" else f"is_{device.type}"
    writer.require(f"type({name}) in TENSORS", f"{meaning} is a plain tensor")
    writer.require(f"{name}.dtype is {dtype}", f"{meaning} is {tensor.dtype}")
    # What is still to be applied compiled code does not see: `z.conj()`, and `z.conj().imag`.
    if tensor.is_complex():
        writer.require(
            f"not {name}.is_conj()", f"{meaning} is no conjugate view (as after resolve_conj())"
        )
    if tensor.is_complex() or str(tensor.dtype) in _PARTS_OF_COMPLEX:
        writer.require(
            f"not {name}.is_neg()", f"{meaning} is no negative view (as after resolve_neg())"
        )
    writer.require(f"{name}.{on_device}", f"{meaning} is on {device.type}")
    if device.type == "cuda" and device.index == gpu:
        writer.require(f"{name}.get_device() == GPU", f"{meaning} is on the model's GPU")
    elif device.index is not None:
        writer.require(f"{name}.get_device() == {device.index}", f"{meaning} is on {device}")
    writer.unpack(name, len(shape), f"{meaning} has {len(shape)} dimensions")
    for dim, size in enumerate(shape):
        known = _as_int(size)
        if known is not None:
            writer.require(
                f"{writer.size(name, dim)} == {known}", f"size {dim} of {meaning} is {known}"
            )
    if _is_contiguous(shape, stride):
        writer.contiguous.add(name)
        writer.require(f"{name}.is_contiguous()", f"{meaning} is contiguous")
    else:
        for dim, step in enumerate(stride):
            known = _as_int(step)
            if known is not None and _as_int(shape[dim]) != 1:
                writer.require(
                    f"{name}.stride({dim}) == {known}", f"stride {dim} of {meaning} is {known}"
                )
    if device.type != "cpu":
        # Inductor's GPU kernels assume 16 bytes (torch/_inductor/utils.py, GPU_ALIGN_BYTES).
        writer.require(f"not {name}.data_ptr() % 16", f"{meaning} is aligned to 16 bytes")


def all_different(names: Sequence[str]) -> str:
    """Return a condition: no two of some names are one object."""
    pairs = list(itertools.combinations(names, 2))
    if len(pairs) <= _MOST_PAIRS:
        return " and ".join(f"{one} is not {other}" for one, other in pairs)
    ids = ", ".join(f"id({name})" for name in names)
    return f"len({{{ids}}}) == {len(names)}"


def value_text(value: Any, writer: CallCheckWriter) -> tuple[str, str]:
    """Return (form, text) of a constant for a generated condition."""
    if value is None or value is True or value is False or value is Ellipsis:
        return "is", repr(value)
    if type(value) in (int, str):
        return "==", repr(value)
    data = encode(value)
    if isinstance(data, list) and data[0] in ("dtype", "layout", "memory_format", "type", "enum"):
        return "is", writer.constant(data)
    if isinstance(data, list) and data[0] == "device":
        return "==", writer.constant(data)
    if type(value) is float and value == value:  # noqa: PLR0124 - NaN is not itself.
        return "==", repr(value) if abs(value) != float("inf") else writer.constant(data)
    return "encoded", writer.constant(["json", data])


def _is_contiguous(shape: Sequence[Any], stride: Sequence[Any]) -> bool:
    """Whether strides are those of a contiguous tensor for every size that its symbols may take."""
    expected: Any = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if _as_int(size) != 1 and _expression(step) != expected:
            return False
        expected = expected * _expression(size)
    return True


def _expression(size: Any) -> Any:
    """A size as a number or a sympy expression; comparing two never adds a guard."""
    known = _as_int(size)
    return known if known is not None else size.node.shape_env.simplify(size.node.expr)


def _as_int(size: Any) -> int | None:
    """A size as a number; None where it is symbolic."""
    if isinstance(size, int):
        return size
    try:
        node = size.node
    except AttributeError:
        return int(size)
    expression = node.shape_env.simplify(node.expr)
    return int(expression) if expression.is_number else None
