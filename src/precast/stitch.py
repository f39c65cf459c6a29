"""Execution code: one plain Python function that calls the pieces of a model in order.

It is written from the stitching graph, shown in tracebacks, stored beside its marshalled form, and
run against a list of callables: replacing an entry of that list replaces a piece. Native stretches
are written out as statements. Everything here works on names and text; loading imports only what
the text names.
"""

from __future__ import annotations

import linecache
import marshal
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.util import MAGIC_NUMBER
from typing import TYPE_CHECKING, Any

from precast.errors import ArtifactCorruptError, ArtifactIncompatibleError, SplitError
from precast.graph.targets import module_of, resolve_target, target_name
from precast.values import Value

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

#: Stored code of another format is written anew.
FORMAT = 1
ENTRY = "execution_fn"


class ExecutionCode(Value, kw_only=True):
    """The source of one execution function and what it needs to run.

    `piece_names[i]` is the submodule that `pieces[i]` stands for; None where it is written out in
    the source and the entry stays unused. `arguments` are the stitching graph's placeholders that
    the function takes after `pieces` (and after `weights`, if `takes_weights`), in order.
    `targets` are the names that have to resolve for the code to run.
    """

    source: str
    entry: str
    arguments: tuple[str, ...]
    piece_names: tuple[str | None, ...]
    constants: Mapping[str, Any]
    targets: tuple[str, ...]
    takes_weights: bool
    sha256: str

    @property
    def filename(self) -> str:
        """The name that tracebacks give the code."""
        return f"<precast graph {self.sha256[:12]}>"

    def compile(self) -> Callable[..., Any]:
        """Return the function, compiled from its source."""
        return compile_execution_code(self.source, self.constants, self.filename, self.entry)

    def to_marshal(self) -> bytes:
        """Return the compiled code as bytes that this version of Python alone can read."""
        return MAGIC_NUMBER + marshal.dumps(compile(self.source, self.filename, "exec"))

    def from_marshal(self, data: bytes) -> Callable[..., Any]:
        """Return the function from what `to_marshal` gave; spares compiling the source.

        The bytes are code: the caller has checked where they are from.

        Raises:
            ArtifactIncompatibleError: Another version of Python wrote them.
        """
        if data[: len(MAGIC_NUMBER)] != MAGIC_NUMBER:
            raise ArtifactIncompatibleError(
                self.filename,
                f"Python bytecode {data[: len(MAGIC_NUMBER)].hex()}",
                MAGIC_NUMBER.hex(),
            )
        try:
            code = marshal.loads(data[len(MAGIC_NUMBER) :])
        except (EOFError, ValueError, TypeError) as error:
            raise ArtifactCorruptError(self.filename, "marshalled code", str(error)) from error
        return _bind(code, self.source, self.constants, self.filename, self.entry)


def generate_execution_code(
    split_gm: GraphModule, weight_groups: Mapping[int, Sequence[str]] | None = None
) -> ExecutionCode:
    """Write the execution function of a stitching graph.

    Args:
        split_gm: The module of a `StitchGraph`: placeholders, calls of `piece_<i>` and
            `native_<i>`, and the plain calls between them.
        weight_groups: For each piece the placeholders that end its inputs and are bound once:
            they leave the signature, and the call takes them as `*weights[i]` from a list of
            lists, indexed like `pieces`. None: every placeholder is an argument.

    Raises:
        SplitError: A node calls something that has no name another process could find.
        ValueError: A weight group does not end the inputs of its piece.
    """
    return generate_execution_code_with_name(split_gm, ENTRY, weight_groups)


def generate_execution_code_with_name(
    split_gm: GraphModule, name: str, weight_groups: Mapping[int, Sequence[str]] | None = None
) -> ExecutionCode:
    """Write the execution function of a stitching graph under a name of the caller's choice."""
    return _Writer(split_gm, name, weight_groups).write()


def compile_execution_code(
    source: str, constants: Mapping[str, Any], filename: str, entry: str = ENTRY
) -> Callable[..., Any]:
    """Return the function that some execution code defines; tracebacks show its lines."""
    return _bind(compile(source, filename, "exec"), source, constants, filename, entry)


class SerializableFunction:
    """An execution function that can be stored and read back without a pickle.

    `graph_module` is the stitching graph as bytes, for the fallback that needs a graph. It is
    handed through and never read here.
    """

    def __init__(
        self,
        execution: ExecutionCode,
        *,
        marshalled: bytes | None = None,
        graph_module: bytes | None = None,
    ) -> None:
        self.execution = execution
        self.graph_module = graph_module
        self._marshalled = marshalled
        self._function: Callable[..., Any] | None = None

    @property
    def function(self) -> Callable[..., Any]:
        """The function, made at first use: from its marshalled form if that is of this Python."""
        if self._function is None:
            self._function = self._load()
        return self._function

    def __call__(self, pieces: Sequence[Callable[..., Any] | None], *args: Any) -> Any:
        """Run the model."""
        return self.function(pieces, *args)

    def _load(self) -> Callable[..., Any]:
        for name in self.execution.targets:
            try:
                resolve_target(name)
            except LookupError as error:
                raise ArtifactIncompatibleError(
                    self.execution.filename, name, f"none of that name ({error})"
                ) from error
        if self._marshalled is not None:
            try:
                return self.execution.from_marshal(self._marshalled)
            except ArtifactIncompatibleError:
                pass  # The source says the same.
        return self.execution.compile()

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON data.

        Raises:
            ArtifactIncompatibleError: A constant has no stored form.
        """
        execution = self.execution
        marshalled = self._marshalled or execution.to_marshal()
        return {
            "format": FORMAT,
            "source": execution.source,
            "sha256": execution.sha256,
            "entry": execution.entry,
            "arguments": list(execution.arguments),
            "piece_names": list(execution.piece_names),
            "constants": {
                name: _constant_to_json(value, execution.filename)
                for name, value in execution.constants.items()
            },
            "targets": list(execution.targets),
            "takes_weights": execution.takes_weights,
            "marshalled": b64encode(marshalled).decode(),
            "graph_module": (
                None if self.graph_module is None else b64encode(self.graph_module).decode()
            ),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SerializableFunction:
        """Read what `to_json` wrote.

        Raises:
            ArtifactIncompatibleError: Another format, or incomplete: to be written anew.
            ArtifactCorruptError: The source is not what was written.
        """
        found = data.get("format")
        if found != FORMAT:
            raise ArtifactIncompatibleError("execution code", f"format {found}", f"format {FORMAT}")
        try:
            source = data["source"]
            digest = sha256(source.encode()).hexdigest()
            if digest != data["sha256"]:
                raise ArtifactCorruptError("execution code", data["sha256"], digest)
            execution = ExecutionCode(
                source=source,
                entry=data["entry"],
                arguments=tuple(data["arguments"]),
                piece_names=tuple(data["piece_names"]),
                constants={
                    name: _constant_from_json(value) for name, value in data["constants"].items()
                },
                targets=tuple(data["targets"]),
                takes_weights=data["takes_weights"],
                sha256=digest,
            )
            graph = data["graph_module"]
            return cls(
                execution,
                marshalled=b64decode(data["marshalled"]),
                graph_module=None if graph is None else b64decode(graph),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactIncompatibleError(
                "execution code", f"a complete entry of format {FORMAT}", f"{error!r}"
            ) from error


def _bind(
    code: Any, source: str, constants: Mapping[str, Any], filename: str, entry: str
) -> Callable[..., Any]:
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "precast.execution", **constants}
    try:
        exec(code, namespace)
    except ImportError as error:
        raise ArtifactIncompatibleError(filename, str(error.name), "no such module") from error
    function: Callable[..., Any] = namespace[entry]
    return function


def _constant_to_json(value: Any, filename: str) -> dict[str, Any]:
    import torch

    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        plain = value.detach().cpu().contiguous()
        data = bytes(plain.reshape(-1).view(torch.uint8).tolist()) if plain.numel() else b""
        return {
            "tensor": b64encode(data).decode(),
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "device": value.device.type,
        }
    if callable(value) and (name := target_name(value)) is not None:
        return {"target": name}
    raise ArtifactIncompatibleError(
        filename, f"a constant of type {type(value).__qualname__}", "no stored form for it"
    )


def _constant_from_json(data: Mapping[str, Any]) -> Any:
    if "target" in data:
        try:
            return resolve_target(data["target"])
        except LookupError as error:
            raise ValueError(str(error)) from error
    import torch

    dtype = getattr(torch, data["dtype"].removeprefix("torch."))
    content = bytearray(b64decode(data["tensor"]))
    if not content:
        return torch.empty(data["shape"], dtype=dtype, device=data["device"])
    flat = torch.frombuffer(content, dtype=torch.uint8).clone()
    return flat.view(dtype).reshape(data["shape"]).to(data["device"])


class _Statement:
    """One statement: its text, and the variables that it makes and needs."""

    def __init__(self, text: str, makes: list[str], needs: list[str]) -> None:
        self.text = text
        self.makes = makes
        self.needs = needs


class _Writer:
    """Writes one function. Variables are named after the model's own, as far as they are free."""

    def __init__(
        self, module: GraphModule, entry: str, weight_groups: Mapping[int, Sequence[str]] | None
    ) -> None:
        self._module = module
        self._entry = entry
        self._groups = weight_groups
        self._statements: list[_Statement] = []
        self._variables: dict[Node, str] = {}
        self._taken = {entry, "pieces", "weights"}
        self._imports = {"torch"}
        self._targets: dict[str, None] = {}
        self._constants: dict[str, Any] = {}
        self._constant_names: dict[int, str] = {}
        self._piece_names: dict[int, str | None] = {}

    def write(self) -> ExecutionCode:
        graph = self._module.graph
        placeholders = graph.find_nodes(op="placeholder")
        for node in placeholders:
            self._name(node, self._variables)
        result = ""
        for node in graph.nodes:
            if node.op == "call_module":
                self._write_call(node)
            elif node.op == "get_attr":
                self._variables[node] = self._constant(_attribute(self._module, node.target))
            elif node.op in ("call_function", "call_method"):
                if node not in self._variables:
                    self._write_statement(node, self._variables)
            elif node.op == "output":
                result = self._render(node.args[0], self._variables)
        needed = {name for s in self._statements for name in s.needs}
        needed.update(self._variables[n] for n in graph.output_node().all_input_nodes)
        # A weight that only ends the inputs of pieces is bound with them.
        bound = {name for names in (self._groups or {}).values() for name in names}
        arguments = [n for n in placeholders if n.name not in bound or self._variables[n] in needed]
        source = self._source(arguments, result)
        names = [self._piece_names.get(i) for i in range(max(self._piece_names, default=-1) + 1)]
        return ExecutionCode(
            source=source,
            entry=self._entry,
            arguments=tuple(node.name for node in arguments),
            piece_names=tuple(names),
            constants=self._constants,
            targets=tuple(sorted(self._targets)),
            takes_weights=self._groups is not None,
            sha256=sha256(source.encode()).hexdigest(),
        )

    def _source(self, arguments: list[Node], result: str) -> str:
        import torch

        num_pieces = sum(name is not None for name in self._piece_names.values())
        num_native = len(self._piece_names) - num_pieces
        signature = ["pieces", *(["weights"] if self._groups is not None else [])]
        signature.extend(self._variables[node] for node in arguments)
        lines = [
            f"# Execution code written by Precast, format {FORMAT}, torch {torch.__version__}:",
            f"# {num_pieces} pieces and {num_native} native stretches; {len(arguments)} arguments.",
            *(f"import {name}" for name in sorted(self._imports)),
            *(
                f"# {name}: {type(value).__name__}, handed in with the code."
                for name, value in self._constants.items()
            ),
            "",
            "",
            f"def {self._entry}({', '.join(signature)}):",
            *(f"    {line}" for line in self._body(arguments)),
            f"    return {result}",
        ]
        return "\n".join(lines) + "\n"

    def _body(self, arguments: list[Node]) -> list[str]:
        """Return the statements, each followed by the `del` of what nobody needs any more."""
        output = self._module.graph.output_node()
        returned = {self._variables[node] for node in output.all_input_nodes}
        # Weights and sizes are not worth a `del`: the model holds the ones, the others are ints.
        mortal = {
            self._variables[node]
            for node in arguments
            if not node.meta.get("precast_weight") and not _is_number(node)
        }
        last: dict[str, int] = {}
        for place, statement in enumerate(self._statements):
            for name in (*statement.makes, *statement.needs):
                last[name] = place
            mortal.update(statement.makes)
        lines: list[str] = []
        for place, statement in enumerate(self._statements):
            lines.append(statement.text)
            dead = [
                name
                for name in dict.fromkeys((*statement.needs, *statement.makes))
                if last[name] == place and name in mortal and name not in returned
            ]
            if dead:
                lines.append(f"del {', '.join(dead)}")
        return lines

    def _write_call(self, node: Node) -> None:
        kind, _, index_text = str(node.target).partition("_")
        index = int(index_text)
        if kind == "native":
            self._piece_names[index] = None
            self._write_native(node)
            return
        self._piece_names[index] = str(node.target)
        inputs = list(node.args)
        group = list((self._groups or {}).get(index, ()))
        if group:
            ending = [a.name for a in inputs[len(inputs) - len(group) :]]  # type: ignore[union-attr]
            if ending != group:
                raise ValueError(
                    f"the weight group of {node.target} must end its inputs: expected {ending}, "
                    f"got {group}"
                )
            del inputs[len(inputs) - len(group) :]
        parts = [self._render(argument, self._variables) for argument in inputs]
        needs = [self._variables[a] for a in inputs]  # type: ignore[index]
        if group:
            parts.append(f"*weights[{index}]")
        call = f"pieces[{index}]([{', '.join(parts)}])"
        makes = []
        for pick in sorted(node.users, key=lambda user: user.args[1]):  # type: ignore[arg-type, return-value]
            makes.append(self._name(pick, self._variables))
        text = f"{', '.join(makes)}{',' if len(makes) == 1 else ''} = {call}" if makes else call
        if (value := node.meta.get("example_value")) is not None and len(value) != len(makes):
            raise SplitError(
                "stitching", node.name, f"it returns {len(value)} values, {len(makes)} are used"
            )
        self._statements.append(_Statement(text, makes, needs))

    def _write_native(self, node: Node) -> None:
        """Write the nodes of a native submodule as statements."""
        inner: Any = self._module.get_submodule(str(node.target))
        scope: dict[Node, str] = {}
        arguments = iter(node.args)
        for statement in inner.graph.nodes:
            if statement.op == "placeholder":
                scope[statement] = self._variables[next(arguments)]  # type: ignore[index]
            elif statement.op == "output":
                for pick in node.users:
                    value = statement.args[0][pick.args[1]]
                    self._variables[pick] = scope[value]
            elif statement.op == "get_attr":
                scope[statement] = self._constant(_attribute(inner, statement.target))
            else:
                self._write_statement(statement, scope)

    def _write_statement(self, node: Node, scope: dict[Node, str]) -> None:
        import operator

        from precast.graph.arguments import render_call

        def render(value: Any) -> str:
            return self._render(value, scope)

        needs = [scope[argument] for argument in node.all_input_nodes]
        needs = [name for name in needs if name not in self._constants]
        if node.op == "call_method":
            method = f"{render(node.args[0])}.{node.target}"
            call = render_call(method, node.args[1:], dict(node.kwargs), render)
        elif node.target is operator.getitem:
            call = f"{render(node.args[0])}[{render(node.args[1])}]"
        else:
            call = render_call(self._target(node), node.args, dict(node.kwargs), render)
        # The value of a statement that nobody reads is dropped at once, as in eager code.
        makes = [self._name(node, scope)] if node.users else []
        self._statements.append(_Statement(f"{makes[0]} = {call}" if makes else call, makes, needs))

    def _target(self, node: Node) -> str:
        name = target_name(node.target)  # type: ignore[arg-type]
        if name is None:
            raise SplitError(
                "stitching", node.name, f"{node.target} has no name that finds it again"
            )
        self._imports.add(module_of(name))
        self._targets[name] = None
        return name

    def _render(self, value: Any, scope: dict[Node, str]) -> str:
        from precast.graph.arguments import render_argument

        return render_argument(value, scope.__getitem__, self._constant)

    def _constant(self, value: Any) -> str:
        """Return the name of a constant that has no literal: numbered in order of first use."""
        if id(value) not in self._constant_names:
            name = f"CONSTANT_{len(self._constants)}"
            self._constant_names[id(value)] = name
            self._constants[name] = value
        return self._constant_names[id(value)]

    def _name(self, node: Node, scope: dict[Node, str]) -> str:
        """Give a node's value a variable of its own, that the scope finds it by."""
        from keyword import iskeyword

        plain = node.name
        if node.op == "placeholder":
            for noise in ("l_self_", "l_kwargs_", "l_args_", "modules_", "parameters_", "buffers_"):
                plain = plain.replace(noise, "")
            plain = plain.strip("_") or node.name
            if not plain.isidentifier() or iskeyword(plain):
                plain = f"input_{plain}"
        name, number = plain, 1
        while name in self._taken or name in self._imports or name in ("torch", "operator"):
            name, number = f"{plain}_{number}", number + 1
        self._taken.add(name)
        scope[node] = name
        return name


def _is_number(node: Node) -> bool:
    from torch import SymInt

    return isinstance(node.meta.get("example_value"), (int, float, SymInt))


def _attribute(owner: Any, path: Any) -> Any:
    for part in str(path).split("."):
        owner = getattr(owner, part)
    return owner
