"""From a piece's text back to something that runs: an FX graph, a function, example inputs.

The text is parsed, never traced, so what comes out has exactly the statements that went in. Only
the restricted language of `canonical` is understood; anything else is refused with its line.
Nothing here compiles, and nothing imports Dynamo or Inductor.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from precast.graph.piece import Piece, Size, SymbolRange, TensorSpec
from precast.graph.targets import resolve_target

if TYPE_CHECKING:
    import torch

# What may be called inside of arguments: calls that make constants, by their names in the text.
_CONSTRUCTORS = ("complex", "float", "range", "slice", "torch.Size", "torch.device")

#: Sizes tried where a range allows them: 1 and 2 are where shape code goes wrong, 3 and 17 fit no
#: vector width and no block size; 17 stands in for a high end that is far away.
_TRIED_SIZES = (1, 2, 3)
_LARGE_SIZE = 17
_LARGEST_TRIED_SIZE = 4096
_MOST_ASSIGNMENTS = 6
_DEFAULT_HINTS = (13, 11, 19, 23, 29, 31, 37, 41, 43, 47)  # Distinct, and no multiples of others.

_numbers = itertools.count(1)


class PieceTextError(ValueError):
    """A piece's text is not in the language that pieces are written in."""


def read_piece(piece: Piece) -> torch.fx.GraphModule:
    """Return the piece as an FX graph: placeholders, `call_function` and `call_method` nodes.

    The output is a tuple. Statements keep their order and none is dropped, whether or not its
    result is used: it may write into an input.

    Raises:
        PieceTextError: A statement is not `name = target(args)`; says which and its line.
    """
    import torch

    graph = torch.fx.Graph()
    reader = _Reader(graph)
    reader.read(_parse(piece.text))
    module = torch.fx.GraphModule(torch.nn.Module(), graph, "piece")
    if len(graph.find_nodes(op="placeholder")) != len(piece.inputs):
        raise PieceTextError(
            f"the text takes {len(graph.find_nodes(op='placeholder'))} inputs, "
            f"{len(piece.inputs)} are specified"
        )
    return module


def eager_function(piece: Piece) -> Callable[..., tuple[Any, ...]]:
    """Return the piece as a plain Python function of its inputs; tracebacks show its text."""
    import torch

    filename = f"<precast piece {next(_numbers)}>"
    namespace = _namespace(piece.text)
    exec(compile(piece.text, filename, "exec"), namespace)
    lines = piece.text.splitlines(keepends=True)
    linecache.cache[filename] = (len(piece.text), None, lines, filename)
    function: Callable[..., tuple[Any, ...]] = namespace["piece"]
    if piece.autocast is None:
        return function
    device_type, dtype = piece.autocast
    kept = function

    def under_autocast(*inputs: Any) -> tuple[Any, ...]:
        with torch.autocast(device_type, dtype=dtype_of(dtype)):
            return kept(*inputs)

    return under_autocast


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name, with or without `torch.` before it."""
    import torch

    dtype = getattr(torch, name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise PieceTextError(f"{name!r} is not a dtype")
    return dtype


def evaluate_size(size: Size, symbols: Mapping[str, Any]) -> Any:
    """Return a size: a number as it is, an expression with the symbols' values put in.

    Values may be numbers or SymInts.
    """
    if isinstance(size, int):
        return size
    return _evaluate(ast.parse(size, mode="eval").body, symbols, size)


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


@contextmanager
def as_captured(piece: Piece) -> Iterator[None]:
    """Trace with open sizes and under the autocast that the piece was captured in.

    Where sizes 0 and 1 are not asked for, torch may decide by that, as it does by default.
    """
    import torch

    from precast.torch_private import tracing_sizes_obliviously

    cast: Any = nullcontext()
    if piece.autocast is not None:
        cast = torch.autocast(piece.autocast[0], dtype=dtype_of(piece.autocast[1]))
    has_small_sizes = any(allowed.low < 2 for allowed in piece.symbols.values())
    with tracing_sizes_obliviously() if has_small_sizes else nullcontext(), cast:
        yield


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


# --- Parsing.


def _parse(text: str) -> ast.FunctionDef:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise PieceTextError(f"line {error.lineno}: {error.msg}") from error
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if len(tree.body) != 1 or not functions or functions[0].name != "piece":
        raise PieceTextError("the text must define `piece` and nothing else")
    return functions[0]


class _Reader:
    """Turns statements into nodes; `names` maps each variable to the node that made it."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.names: dict[str, Any] = {}

    def read(self, function: ast.FunctionDef) -> None:
        for argument in function.args.args:
            self.names[argument.arg] = self.graph.placeholder(argument.arg)
        *statements, last = function.body
        for statement in statements:
            self._read_statement(statement)
        if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Tuple):
            raise _refuse(last, "the last statement must return a tuple")
        self.graph.output(tuple(self._value(item) for item in last.value.elts))

    def _read_statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Pass):
            return
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            self._call(statement.value, None)
            return
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _refuse(statement, "expected `name = target(args)`")
        (target,) = statement.targets
        if not isinstance(target, ast.Name):
            raise _refuse(statement, "the result must go to one name")
        if isinstance(statement.value, ast.Call):
            self.names[target.id] = self._call(statement.value, target.id)
        else:
            self.names[target.id] = self._value(statement.value)

    def _call(self, call: ast.Call, name: str | None) -> Any:
        args = tuple(self._value(argument) for argument in call.args)
        kwargs = {}
        for keyword in call.keywords:
            value = self._value(keyword.value)
            if keyword.arg is not None:
                kwargs[keyword.arg] = value
            elif isinstance(value, dict):  # `**{...}`: names that are no identifiers.
                kwargs.update(value)
            else:
                raise _refuse(call, "only a dict may follow `**`")
        method_of = self._variable_before_dot(call.func)
        if method_of is not None:
            assert isinstance(call.func, ast.Attribute)
            return self.graph.create_node(
                "call_method", call.func.attr, (method_of, *args), kwargs, name
            )
        return self.graph.create_node("call_function", self._dotted(call.func), args, kwargs, name)

    def _variable_before_dot(self, func: ast.expr) -> Any:
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
            return self.names.get(func.value.id)
        return None

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Tuple(elts=items):
                return tuple(self._value(item) for item in items)
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return {
                    self._value(key): self._value(value)
                    for key, value in zip(keys, values, strict=True)
                    if key is not None
                }
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._constant(operand)
            case ast.BinOp(op=ast.Add(), left=left, right=right):  # A complex number.
                return self._constant(left) + self._constant(right)
            case ast.BinOp(op=ast.Sub(), left=left, right=right):
                return self._constant(left) - self._constant(right)
            case ast.Call():
                return self._nested_call(node)
            case ast.Attribute() | ast.Name():
                return self._dotted(node)
        raise _refuse(node, f"{ast.unparse(node)!r} cannot be an argument")

    def _constant(self, node: ast.expr) -> Any:
        value = self._value(node)
        if not isinstance(value, int | float | complex):
            raise _refuse(node, f"{ast.unparse(node)!r} is not a number")
        return value

    def _nested_call(self, call: ast.Call) -> Any:
        """Make `slice(...)`, `float("inf")`, `torch.device('cpu')` inside of arguments."""
        name = ast.unparse(call.func)
        if name not in _CONSTRUCTORS or call.keywords:
            raise _refuse(call, f"{name!r} cannot be called inside of arguments")
        return self._dotted(call.func)(*(self._value(argument) for argument in call.args))

    def _dotted(self, node: ast.expr) -> Any:
        name = ast.unparse(node)
        try:
            return resolve_target(name if "." in name else f"builtins.{name}")
        except LookupError as error:
            raise _refuse(node, str(error)) from error


def _namespace(text: str) -> dict[str, Any]:
    """Return the modules that a text names, imported, by the name before the first dot."""
    function = _parse(text)
    names: set[str] = set()
    assigned = {argument.arg for argument in function.args.args}
    dotted: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            names.add(node.id)
            if isinstance(node.ctx, ast.Store):
                assigned.add(node.id)
        elif isinstance(node, ast.Attribute) and _is_dotted(node):
            dotted.add(ast.unparse(node))
    for name in sorted(dotted):
        if name.partition(".")[0] not in assigned:
            resolve_target(name)
    return {name: sys.modules[name] for name in names if name in sys.modules}


def _is_dotted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _refuse(node: ast.AST, problem: str) -> PieceTextError:
    return PieceTextError(f"line {getattr(node, 'lineno', '?')}: {problem}")


# --- Sizes.

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


# --- Values.


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
