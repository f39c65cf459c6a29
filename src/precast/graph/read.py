"""From a piece's text back to something that runs: an FX graph, a function.

The text is parsed, never traced, so what comes out has exactly the statements that went in. Only
the restricted language of `canonical` is understood; anything else is refused with its line.
Nothing here compiles, and nothing imports Dynamo or Inductor.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from precast.graph.piece import Piece
from precast.graph.targets import resolve_target

if TYPE_CHECKING:
    import torch

# What may be called inside of arguments: calls that make constants, by their names in the text.
_CONSTRUCTORS = ("complex", "float", "range", "slice", "torch.Size", "torch.device")

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
