"""Execution code: what the generated source promises to those who read it and who run it."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from precast.errors import ArtifactCorruptError, ArtifactIncompatibleError, SplitError
from precast.stitch import (
    SerializableFunction,
    compile_execution_code,
    generate_execution_code,
    generate_execution_code_with_name,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "stitched_decoder.py.txt"


def _call(graph: Graph, name: str, args: tuple[Node, ...], *outputs: str) -> list[Node]:
    call = graph.call_module(name, args)
    return [
        graph.create_node("call_function", operator.getitem, (call, i), name=output)
        for i, output in enumerate(outputs)
    ]


def decoder() -> GraphModule:
    """Two layers with attention between: five calls, two of them native."""
    graph = Graph()
    size = graph.placeholder("s0")
    hidden = graph.placeholder("l_kwargs_hidden_states_")
    weights = [
        graph.placeholder(f"l_self_modules_layers_modules_{i}_parameters_w_") for i in (0, 1)
    ]
    double = graph.call_function(operator.mul, (size, 2))
    modules: dict[str, Any] = {"mask": torch.tensor([1.0, 2.0])}
    mask = graph.get_attr("mask")
    for layer, weight in enumerate(weights):
        piece = Graph()
        x, w = piece.placeholder("x"), piece.placeholder("w")
        piece.output((piece.call_function(torch.mul, (x, w)), piece.call_method("sum", (x,))))
        modules[f"piece_{2 * layer}"] = GraphModule({}, piece)
        q, total = _call(graph, f"piece_{2 * layer}", (hidden, weight), f"q_{layer}", f"t_{layer}")
        native = Graph()
        a, b, m, s = (native.placeholder(name) for name in ("a", "b", "m", "s"))
        y = native.call_function(F.softmax, (a,), {"dim": -1, "dtype": torch.float32})
        native.call_method("add_", (y, m))
        view = native.call_method("reshape", (native.call_function(torch.add, (y, b)), s, -1))
        native.output((native.call_function(operator.getitem, (view, (slice(None), None))),))
        modules[f"native_{2 * layer + 1}"] = GraphModule({}, native)
        args = (q, total, mask, double)
        (hidden,) = _call(graph, f"native_{2 * layer + 1}", args, f"hidden_{layer}")
        hidden = graph.call_method("reshape", (hidden, size, 2))
    graph.output(((hidden, double),))
    return GraphModule(modules, graph)


def pieces_of(module: GraphModule, names: tuple[str | None, ...]) -> list[Any]:
    def boxed(name: str) -> Any:
        return lambda xs: module.get_submodule(name)(*xs)

    return [None if name is None else boxed(name) for name in names]


def inputs() -> list[Any]:
    return [3, torch.rand(3, 2), torch.rand(3, 2), torch.rand(3, 2)]


def test_the_stitched_function_equals_the_graph() -> None:
    module, args = decoder(), inputs()
    code = generate_execution_code(module)
    found = code.compile()(pieces_of(module, code.piece_names), *args)
    torch.testing.assert_close(found, module(*args), rtol=0, atol=0)


def test_the_source_is_the_recorded_one() -> None:
    """
    Stored code is found again by its text: a change of it is a change of FORMAT.
    """
    source = generate_execution_code(decoder()).source.replace(torch.__version__, "<torch>")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(source)
    assert source == GOLDEN.read_text()


def test_list_indices_stay_stable_for_what_is_inlined() -> None:
    code = generate_execution_code(decoder())
    assert code.piece_names == ("piece_0", None, "piece_2", None)
    assert "pieces[1]" not in code.source
    assert "pieces[2]([" in code.source


def test_constants_go_in_by_name_in_a_deterministic_order() -> None:
    one, other = generate_execution_code(decoder()), generate_execution_code(decoder())
    assert one.source == other.source
    assert one.sha256 == other.sha256
    assert list(one.constants) == ["CONSTANT_0"]
    assert "tensor(" not in one.source


def test_a_value_is_deleted_after_its_last_use() -> None:
    """
    While the last piece runs, only what it or the result needs is alive.
    """
    module = decoder()
    code = generate_execution_code(module)
    alive: set[str] = set()

    def spy(xs: list[Any]) -> Any:
        alive.update(sys._getframe(1).f_locals)
        return module.get_submodule("piece_2")(*xs)

    pieces = pieces_of(module, code.piece_names)
    pieces[2] = spy
    code.compile()(pieces, *inputs())
    assert "q_0" not in alive
    assert "t_0" not in alive
    assert {"mul", "reshape"} & alive


def test_every_name_that_the_code_needs_is_imported_in_it() -> None:
    code = generate_execution_code(decoder())
    script = f"namespace = {{}}\nexec({code.source!r}, namespace)\nassert 'torch' in namespace\n"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_traceback_shows_the_generated_line() -> None:
    code = generate_execution_code(decoder())
    try:
        code.compile()([None, None, None, None], *inputs())
    except TypeError:
        shown = traceback.format_exc()
    assert f'File "{code.filename}"' in shown
    assert "q_0, t_0 = pieces[0]([hidden_states, layers_0_w])" in shown


def test_the_function_may_have_another_name() -> None:
    code = generate_execution_code_with_name(decoder(), "run_decoder")
    assert "def run_decoder(pieces, " in code.source
    assert code.compile().__name__ == "run_decoder"


def test_grouped_weights_leave_the_signature() -> None:
    module, args = decoder(), inputs()
    names = [n.name for n in module.graph.find_nodes(op="placeholder")][2:]
    code = generate_execution_code(module, {0: names[:1], 2: names[1:]})
    assert code.takes_weights
    assert code.arguments == ("s0", "l_kwargs_hidden_states_")
    weights = [[args[2]], [], [args[3]], []]
    found = code.compile()(pieces_of(module, code.piece_names), weights, *args[:2])
    torch.testing.assert_close(found, module(*args), rtol=0, atol=0)


def test_a_weight_group_must_end_the_inputs_of_its_piece() -> None:
    with pytest.raises(ValueError, match="piece_0"):
        generate_execution_code(decoder(), {0: ["s0"]})


def test_a_callable_without_a_name_is_refused_by_node() -> None:
    graph = Graph()
    graph.output((graph.create_node("call_function", lambda x: x, (graph.placeholder("x"),)),))
    with pytest.raises(SplitError, match="no name"):
        generate_execution_code(GraphModule({}, graph))


def stored() -> dict[str, Any]:
    function = SerializableFunction(generate_execution_code(decoder()), graph_module=b"graph")
    return dict(json.loads(json.dumps(function.to_json())))


def test_what_is_read_back_runs_alike() -> None:
    module, args = decoder(), inputs()
    function = SerializableFunction.from_json(stored())
    found = function(pieces_of(module, function.execution.piece_names), *args)
    torch.testing.assert_close(found, module(*args), rtol=0, atol=0)
    assert function.graph_module == b"graph"


def test_reading_back_and_running_imports_no_compiler(tmp_path: Path) -> None:
    path = tmp_path / "code.json"
    path.write_text(json.dumps(stored()))
    script = (
        "import json, sys, torch\n"
        "from precast.stitch import SerializableFunction\n"
        f"f = SerializableFunction.from_json(json.load(open({str(path)!r})))\n"
        "f([lambda xs: (xs[0], xs[0]), None] * 2, 3, *[torch.ones(3, 2)] * 3)\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'sympy', 'triton')\n"
        "assert not [m for m in sys.modules if m.startswith(heavy)]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("field", sorted(stored()))
def test_an_incomplete_entry_is_incompatible(field: str) -> None:
    data = stored()
    del data[field]
    with pytest.raises(ArtifactIncompatibleError):
        SerializableFunction.from_json(data)


def test_an_entry_of_another_format_is_incompatible() -> None:
    with pytest.raises(ArtifactIncompatibleError, match="format 0"):
        SerializableFunction.from_json({**stored(), "format": 0})


def test_a_changed_source_is_corrupt() -> None:
    data = stored()
    with pytest.raises(ArtifactCorruptError):
        SerializableFunction.from_json({**data, "source": data["source"] + "# changed"})


def test_an_operator_that_is_gone_makes_the_entry_incompatible() -> None:
    function = SerializableFunction.from_json({**stored(), "targets": ["torch.ops.gone.op"]})
    with pytest.raises(ArtifactIncompatibleError, match="gone"):
        _ = function.function


def test_bytecode_of_another_python_gives_way_to_the_source() -> None:
    code = generate_execution_code(decoder())
    other = b"\0\0\0\0" + code.to_marshal()[4:]
    with pytest.raises(ArtifactIncompatibleError):
        code.from_marshal(other)
    assert SerializableFunction(code, marshalled=other).function is not None


def test_source_and_constants_are_all_it_takes() -> None:
    code = generate_execution_code(decoder())
    assert compile_execution_code(code.source, code.constants, "<test>").__name__ == code.entry
