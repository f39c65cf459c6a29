"""Sizes and inputs to trace or try a piece with, as its specs say."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from precast.graph.piece import Piece, Size, SymbolRange, TensorSpec
from precast.graph.read import PieceTextError, dtype_of

if TYPE_CHECKING:
    import torch

#: Sizes tried where a range allows them: 1 and 2 are where shape code goes wrong, 3 and 17 fit no
#: vector width and no block size; 17 stands in for a high end that is far away.
_TRIED_SIZES = (1, 2, 3)
_LARGE_SIZE = 17
_LARGEST_TRIED_SIZE = 4096
_MOST_ASSIGNMENTS = 6
_DEFAULT_HINTS = (13, 11, 19, 23, 29, 31, 37, 41, 43, 47)  # Distinct, and no multiples of others.


def symbol_hints(piece: Piece) -> dict[str, int]:
    """Return a typical size for each symbol: the piece's own hints, else distinct made-up ones."""
    hints: dict[str, int] = {}
    spare = iter(_DEFAULT_HINTS)
    for name, allowed in piece.symbols.items():
        hint = piece.hints.get(name)
        # 0 and 1 as a hint would let shape code decide by them.
        if hint is None or hint < 2 or hint not in allowed or hint in hints.values():
            candidates = (size for size in spare if size in allowed and size not in hints.values())
            hint = next(candidates, None)
        hints[name] = hint if hint is not None else _free_size(allowed, hints)
    return hints


def edge_sizes(piece: Piece, *, keep_alike: bool = False) -> list[dict[str, int]]:
    """Return a handful of assignments of sizes to symbols at which a compiled piece is tried.

    Each lies within the ranges and keeps every input's shape and stride free of negative numbers;
    0 is left to `zero_sizes`.

    Args:
        piece: Whose symbols.
        keep_alike: Give equal sizes to symbols that were equal when the piece was captured: two
            may have to be, although only the model's code says so.
    """
    hints = symbol_hints(piece)
    if not piece.symbols:
        return [{}]
    small = {
        name: [size for size in _TRIED_SIZES if size in allowed] or [max(allowed.low, 1)]
        for name, allowed in piece.symbols.items()
    }
    found = [hints]
    for i in range(len(_TRIED_SIZES)):
        # Rotated from symbol to symbol, so that two symbols are equal in one assignment only.
        row = {
            name: options[(i + shift) % len(options)]
            for shift, (name, options) in enumerate(small.items())
        }
        found.append(row)
    lows = {name: max(allowed.low, 1) for name, allowed in piece.symbols.items()}
    highs = {
        name: allowed.high
        if allowed.high is not None and allowed.high <= _LARGEST_TRIED_SIZE
        else (_LARGE_SIZE if _LARGE_SIZE in allowed else hints[name])
        for name, allowed in piece.symbols.items()
    }
    found[1:1] = [lows, highs]
    if keep_alike:
        found = [_alike(piece, sizes) for sizes in found]
    unique = [sizes for i, sizes in enumerate(found) if sizes not in found[:i]]
    return [sizes for sizes in unique if _is_consistent(piece, sizes)][:_MOST_ASSIGNMENTS]


def zero_sizes(piece: Piece, *, keep_alike: bool = False) -> list[dict[str, int]]:
    """Return one assignment for each symbol that may be 0, others at their hints; then all 0."""
    hints = symbol_hints(piece)
    names = [name for name, allowed in piece.symbols.items() if 0 in allowed]
    rows = [{**hints, name: 0} for name in names]
    if len(names) > 1:  # Symbols may stand for one length without the piece's saying so.
        rows.append({**hints, **dict.fromkeys(names, 0)})
    if keep_alike:
        rows = [_alike(piece, sizes, least=True) for sizes in rows]
        rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return [sizes for sizes in rows if _is_consistent(piece, sizes)]


def fake_inputs(piece: Piece) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return a FakeTensorMode, the piece's inputs in it, and a SymInt for each symbol.

    Sizes 0 and 1 are not special: trace with `backed_size_oblivious` on, as
    `torch_private.tracing_sizes_obliviously` does.
    """
    import torch

    from precast.torch_private import make_fake_mode

    ranges = {name: (r.low, r.high) for name, r in piece.symbols.items()}
    mode, symbols = make_fake_mode(ranges, symbol_hints(piece))
    inputs = []
    with mode:
        for spec in piece.inputs:
            shape = tuple(evaluate_size(size, symbols) for size in spec.shape)
            stride = tuple(evaluate_size(size, symbols) for size in spec.stride)
            inputs.append(
                torch.empty_strided(shape, stride, dtype=dtype_of(spec.dtype), device=spec.device)
            )
    return mode, inputs, symbols


def random_inputs(
    piece: Piece,
    sizes: Mapping[str, int],
    seed: int,
    known: dict[int, torch.Tensor] | None = None,
    integers_below: int = 2,
) -> list[torch.Tensor]:
    """Return inputs as the specs say at the given sizes: same shapes, strides, dtypes, device.

    Floats are normal with deviation 0.5, integers 0 or 1 (so that most are a valid index),
    booleans fair. Made where they live: a layer's weights are hundreds of millions of numbers.

    Args:
        piece: Whose inputs.
        sizes: A size for each symbol.
        seed: Of the numbers.
        known: Inputs of fixed shape by position, taken from and put there; so that weights are
            made once for many sizes. They must not be written into.
        integers_below: What integers are less than: of an index into one row only 0 is valid, and
            a GPU does not survive another.
    """
    import torch

    generators: dict[str, torch.Generator] = {}
    inputs = []
    for position, spec in enumerate(piece.inputs):
        if known is not None and position in known:
            inputs.append(known[position])
            continue
        if spec.device not in generators:
            generators[spec.device] = torch.Generator(spec.device).manual_seed(seed)
        inputs.append(_random_tensor(spec, sizes, generators[spec.device], integers_below))
        if known is not None and all(isinstance(n, int) for n in (*spec.shape, *spec.stride)):
            known[position] = inputs[-1]
    return inputs


def zero_inputs(
    piece: Piece, sizes: Mapping[str, int], known: Mapping[int, torch.Tensor]
) -> list[torch.Tensor]:
    """Return inputs full of zeros, those by position in `known` as they are.

    Zero is a valid index into whatever has a row. Copied to where they live: the first of torch's
    own kernels that fills a GPU's memory takes milliseconds to load, in which no other starts.
    """
    import torch

    inputs = []
    for position, spec in enumerate(piece.inputs):
        tensor = known.get(position)
        if tensor is None:
            shape, stride, num_elements = _layout(spec, sizes)
            storage = torch.zeros(num_elements, dtype=dtype_of(spec.dtype))
            tensor = storage.to(spec.device).as_strided(shape, stride)
        inputs.append(tensor)
    return inputs


def reads_indices(piece: Piece) -> bool:
    """Whether a piece may look up one size in another, so that only some sizes go together."""
    return "arange" in piece.text or any("int" in spec.dtype for spec in piece.inputs)


def evaluate_size(size: Size, symbols: Mapping[str, Any]) -> Any:
    """Return a size: a number as it is, an expression with the symbols' values put in.

    Values may be numbers or SymInts.
    """
    if isinstance(size, int):
        return size
    return _evaluate(ast.parse(size, mode="eval").body, symbols, size)


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _evaluate(node: ast.expr, symbols: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name) if name in symbols:
            return symbols[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, symbols, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](
                _evaluate(left, symbols, text), _evaluate(right, symbols, text)
            )
        case ast.Call(func=ast.Name(id=name), args=args) if name.lower() in ("max", "min"):
            values = [_evaluate(argument, symbols, text) for argument in args]
            if all(isinstance(value, int) for value in values):
                return max(values) if name.lower() == "max" else min(values)
            import torch

            return (torch.sym_max if name.lower() == "max" else torch.sym_min)(*values)
    raise PieceTextError(f"size {text!r} is not an expression in {', '.join(symbols) or 'nothing'}")


def _alike(piece: Piece, sizes: Mapping[str, int], *, least: bool = False) -> dict[str, int]:
    """Return sizes in which symbols of one hint have one size, wherever all of them may have it."""
    groups: dict[int, list[str]] = {}
    for name in piece.symbols:
        if name in piece.hints:
            groups.setdefault(piece.hints[name], []).append(name)
    row = dict(sizes)
    for names in groups.values():
        size = min(sizes[name] for name in names) if least else sizes[names[0]]
        if all(size in piece.symbols[name] for name in names):
            row.update(dict.fromkeys(names, size))
    return row


def _free_size(allowed: SymbolRange, taken: Mapping[str, int]) -> int:
    low = max(allowed.low, 2)
    for size in range(low, low + len(taken) + 1):
        if size in allowed and size not in taken.values():
            return size
    return allowed.low if allowed.high is None else allowed.high


def _is_consistent(piece: Piece, sizes: Mapping[str, int]) -> bool:
    return all(
        evaluate_size(size, sizes) >= 0
        for spec in (*piece.inputs, *piece.outputs)
        for size in (*spec.shape, *spec.stride)
    )


def _layout(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[list[int], list[int], int]:
    """Return a tensor's shape, its strides, and how many elements its memory has."""
    shape = [int(evaluate_size(size, sizes)) for size in spec.shape]
    stride = [int(evaluate_size(size, sizes)) for size in spec.stride]
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return shape, stride, 0 if 0 in shape else last + 1


def _random_tensor(
    spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator, integers_below: int
) -> torch.Tensor:
    import torch

    shape, stride, num_elements = _layout(spec, sizes)
    dtype = dtype_of(spec.dtype)
    where: dict[str, Any] = {"generator": generator, "device": spec.device}
    if dtype.is_complex:
        storage = torch.randn(num_elements, dtype=torch.complex64, **where) * 0.5
    elif dtype.is_floating_point:
        storage = torch.randn(num_elements, **where).mul_(0.5)
    else:
        high = 2 if dtype == torch.bool else integers_below
        storage = torch.randint(0, high, (num_elements,), **where)
    return storage.to(dtype).as_strided(shape, stride)
