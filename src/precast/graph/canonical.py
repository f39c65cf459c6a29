"""A piece of an FX graph as canonical text: equal texts mean equal pieces.

Names are normalised (inputs `a0`, values `v0`, sizes `s0`, in order of appearance), sizes
that enter as integers are read from the inputs' shapes, devices lose their index. What
has no such text (a sub-graph, a tensor constant, a size that no input's shape gives) is
refused with `CannotWrite`; the caller then runs it as it is. Reading is `read`'s job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from precast.graph.arguments import render_argument, render_call
from precast.graph.piece import Piece, Size, SymbolRange, TensorSpec
from precast.graph.targets import target_name

TEXT_VERSION = 1


class CannotWrite(Exception):  # noqa: N818 - a finding that is answered, not an error that is shown.
    """The piece has no canonical text; says what stands in the way.

    `nodes` are the names of the calls at fault; none: nobody can say which.
    """

    def __init__(self, problem: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(problem)
        self.nodes = nodes


class WrittenPiece:
    """A piece and how to call it.

    `kept_inputs` are the positions of the sub-graph's inputs that it takes, in order;
    `symbols` says which of the capture's symbols each of its own is.
    """

    __slots__ = ("kept_inputs", "piece", "symbols")

    def __init__(self, piece: Piece, kept_inputs: list[int], symbols: dict[str, str]) -> None:
        self.piece = piece
        self.kept_inputs = kept_inputs
        self.symbols = symbols


def write_piece(
    graph_module: torch.fx.GraphModule,
    ranges: Mapping[str, SymbolRange],
    *,
    mutated: tuple[int, ...] = (),
    autocast: tuple[str, str] | None = None,
) -> WrittenPiece:
    """Return the canonical piece of a sub-graph whose output is a tuple of tensors.

    Args:
        graph_module: Placeholders and outputs carry `meta["example_value"]`.
        ranges: Of the capture's symbols, by the capture's names.
        mutated: Positions of placeholders that the sub-graph writes into.
        autocast: (device type, dtype) that is active around the sub-graph.

    Raises:
        CannotWrite: Something in it has no text.
    """
    return _Writer(graph_module, ranges).write(mutated, autocast)


class _Writer:
    def __init__(
        self, graph_module: torch.fx.GraphModule, ranges: Mapping[str, SymbolRange]
    ) -> None:
        self._graph = graph_module.graph
        self._ranges = ranges
        self._symbols: dict[str, str] = {}  # The capture's name -> ours.
        self._where: dict[str, str] = {}  # Our name -> expression that reads it.
        self._hints: dict[str, int] = {}
        self._names: dict[torch.fx.Node, str] = {}
        self._lines: list[str] = []
        self._read: set[str] = set()  # Symbols that have a statement.
        self._num_values = 0

    def write(self, mutated: tuple[int, ...], autocast: tuple[str, str] | None) -> WrittenPiece:
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        tensors = [
            (i, node)
            for i, node in enumerate(placeholders)
            if isinstance(node.meta.get("example_value"), torch.Tensor)
        ]
        # Sizes that are a dimension of an input get their names first: those can be read.
        for number, (_, node) in enumerate(tensors):
            self._names[node] = f"a{number}"
            for dim, size in enumerate(node.meta["example_value"].shape):
                self._meet(size, f"a{number}.size({dim})")
        inputs = tuple(self._spec(node.meta["example_value"]) for _, node in tensors)
        known = {i for i, _ in tensors}
        for i, node in enumerate(placeholders):
            if i not in known:
                value = node.meta.get("example_value")
                if not isinstance(value, int | torch.SymInt):
                    raise CannotWrite(f"the input {node.name} is a {type(value).__name__}")
        outputs = self._statements(placeholders)
        header = [f"# precast piece {TEXT_VERSION}"]
        if autocast is not None:
            header.append(f"# autocast: {autocast[0]} {autocast[1]}")
        symbols = {}
        for theirs, ours in self._symbols.items():
            symbols[ours] = self._ranges.get(theirs, SymbolRange(low=0, high=None))
            header.append(f"# {ours}: {symbols[ours]}")
        names = ", ".join(f"a{number}" for number in range(len(tensors)))
        body = [f"# a{number}: {spec}" for number, spec in enumerate(inputs)]
        position = {i: number for number, (i, _) in enumerate(tensors)}
        mutated_here = tuple(sorted(position[i] for i in mutated))
        text = "\n".join(
            [*header, f"def piece({names}):", *(f"    {line}" for line in (*body, *self._lines))]
        )
        piece = Piece(
            text=text + "\n",
            inputs=inputs,
            outputs=outputs,
            symbols=symbols,
            mutated=mutated_here,
            autocast=autocast,
            hints=dict(self._hints),
        )
        own = {ours: theirs for theirs, ours in self._symbols.items()}
        return WrittenPiece(piece, [i for i, _ in tensors], own)

    def _statements(self, placeholders: list[torch.fx.Node]) -> tuple[TensorSpec, ...]:
        outputs: tuple[TensorSpec, ...] = ()
        problems: dict[str, str] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                if not problems:
                    outputs = self._return(node.args[0])
                continue
            call = ""
            try:
                call = self._statement(node)
            except CannotWrite as problem:  # What else has no text is to be known at once.
                problems[node.name] = str(problem)
            self._names[node] = f"v{self._num_values}"
            self._num_values += 1
            self._lines.append(f"{self._names[node]} = {call}")
        if problems:
            raise CannotWrite("; ".join(dict.fromkeys(problems.values())), tuple(problems))
        return outputs

    def _statement(self, node: torch.fx.Node) -> str:
        if node.op == "call_function":
            called: Any = node.target
            target = target_name(called)
            if target is None:
                raise CannotWrite(f"{node.name} calls {node.target}, which has no name")
            return self._call(target, node.args, node.kwargs)
        if node.op == "call_method":
            receiver = self._render(node.args[0])
            return self._call(f"{receiver}.{node.target}", node.args[1:], node.kwargs)
        raise CannotWrite(f"{node.name} is a {node.op} of {node.target}")

    def _return(self, values: Any) -> tuple[TensorSpec, ...]:
        specs = []
        for value in values:
            example = value.meta.get("example_value") if isinstance(value, torch.fx.Node) else None
            if not isinstance(example, torch.Tensor):
                raise CannotWrite(f"the output {value} is no tensor")
            specs.append(self._spec(example))
        names = "".join(f"{self._render(value)}, " for value in values).rstrip()
        self._lines.append(f"return ({names})")
        for number, spec in enumerate(specs):
            self._lines.append(f"# out {number}: {spec}")
        return tuple(specs)

    def _call(self, target: str, args: Any, kwargs: Any) -> str:
        try:
            return render_call(target, tuple(args), dict(kwargs), self._render)
        except TypeError as error:
            raise CannotWrite(f"{target}: {error}") from error

    def _render(self, value: Any) -> str:
        return render_argument(value, self._name)

    def _name(self, node: torch.fx.Node) -> str:
        name = self._names.get(node)
        if name is None:  # A placeholder that is a size.
            name = self._size_name(node.meta["example_value"])
            self._names[node] = name
        return name

    # -- sizes ----------------------------------------------------------------

    def _meet(self, size: Any, expression: str) -> None:
        """Note where a symbol can be read, when a dimension is exactly that symbol."""
        symbol = symbol_of(size)
        if symbol is not None and symbol not in self._symbols:
            ours = f"s{len(self._symbols)}"
            self._symbols[symbol] = ours
            self._where[ours] = expression
            hint = _hint_of(size)
            if hint is not None:
                self._hints[ours] = hint

    def _spec(self, tensor: torch.Tensor) -> TensorSpec:
        if type(tensor).__name__ not in ("FakeTensor", "Tensor", "Parameter"):
            raise CannotWrite(f"a tensor is a {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise CannotWrite(f"a tensor's layout is {tensor.layout}")
        return TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(self._size(size) for size in tensor.shape),
            stride=tuple(self._size(size) for size in tensor.stride()),
            device=tensor.device.type,
        )

    def _size(self, size: Any) -> Size:
        expression = _expression_of(size)
        if isinstance(expression, int):
            return expression
        return _python_of(expression, self._symbols)

    def _size_name(self, size: Any) -> str:
        """Return a name, or a literal, for a size inside the text."""
        expression = _expression_of(size)
        if isinstance(expression, int):
            return repr(expression)
        return self._operation(expression)

    def _operation(self, expression: Any) -> str:
        """Write an expression in sizes as statements; return the name of its value."""
        if expression.is_Integer:
            return repr(int(expression))
        if expression.is_Symbol:
            ours = self._symbols.get(str(expression))
            if ours is None:
                raise CannotWrite(f"the size {expression} is no dimension of any input")
            if ours not in self._read:
                self._read.add(ours)
                self._lines.append(f"{ours} = {self._where[ours]}")
            return ours
        operator_name = _OPERATORS.get(type(expression).__name__)
        if operator_name is None:
            raise CannotWrite(f"the size {expression}")
        # sympy keeps the terms of a sum in an order that depends on the symbols' names.
        operands = [self._operation(operand) for operand in _ordered(expression, self._symbols)]
        name = operands[0]
        for operand in operands[1:]:
            value = f"v{self._num_values}"
            self._num_values += 1
            self._lines.append(f"{value} = {operator_name}({name}, {operand})")
            name = value
        return name


_OPERATORS = {
    "Add": "operator.add",
    "Mul": "operator.mul",
    "FloorDiv": "operator.floordiv",
    "Mod": "operator.mod",
    "PythonMod": "operator.mod",
    "CleanDiv": "operator.floordiv",
    "Max": "torch.sym_max",
    "Min": "torch.sym_min",
}


def _expression_of(size: Any) -> Any:
    """A size as an int, or as a sympy expression with what is known put in."""
    if isinstance(size, int):
        return size
    node = size.node
    expression = node.shape_env.simplify(node.expr)
    return int(expression) if expression.is_number else expression


def symbol_of(size: Any) -> str | None:
    """Return the name of the symbol that a size is; None for a number or an expression."""
    expression = _expression_of(size)
    return str(expression) if not isinstance(expression, int) and expression.is_Symbol else None


def _hint_of(size: Any) -> int | None:
    try:
        hint = size.node.hint
    except AttributeError:
        return None
    return int(hint) if hint is not None else None


def _ordered(expression: Any, symbols: Mapping[str, str]) -> list[Any]:
    operands = list(expression.args)
    if type(expression).__name__ in ("Add", "Mul", "Max", "Min"):
        operands.sort(key=lambda operand: _python_of(operand, symbols))
    return operands


def _python_of(expression: Any, symbols: Mapping[str, str]) -> str:
    """Return a sympy expression as Python over our names."""
    if expression.is_Integer:
        return str(int(expression))
    if expression.is_Symbol:
        ours = symbols.get(str(expression))
        if ours is None:
            raise CannotWrite(f"the size {expression} is no dimension of any input")
        return ours
    kind = type(expression).__name__
    operands = sorted(_python_of(operand, symbols) for operand in expression.args)
    match kind:
        case "Add":
            return f"({' + '.join(operands)})"
        case "Mul":
            return f"({'*'.join(operands)})"
        case "Max" | "Min":
            return f"{kind.lower()}({', '.join(operands)})"
        case "Pow" if expression.args[1].is_Integer and expression.args[1] > 0:
            base = _python_of(expression.args[0], symbols)
            return f"({'*'.join([base] * int(expression.args[1]))})"
    if kind in ("FloorDiv", "CleanDiv", "Mod", "PythonMod"):
        left, right = (_python_of(operand, symbols) for operand in expression.args)
        return f"({left} {'//' if kind in ('FloorDiv', 'CleanDiv') else '%'} {right})"
    raise CannotWrite(f"the size {expression}")
