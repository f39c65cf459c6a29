from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from precast.graph.canonical import CannotWrite, WrittenPiece, write_piece
from precast.graph.piece import Piece, SymbolRange
from precast.graph.read import read_piece
from precast.torch_private import make_fake_mode

RANGES = {"batch": SymbolRange(low=2, high=64)}


def graph_of(
    build: Callable[..., Any],
    *shapes: tuple[int | str, ...],
    dtype: torch.dtype = torch.float32,
    names: str = "x",
    symbol: str = "batch",
) -> fx.GraphModule:
    """Trace a function and give each node its example value, on fake tensors."""
    mode, symbols = make_fake_mode({symbol: (2, 64)}, {symbol: 8})
    graph_module = fx.symbolic_trace(build)
    with mode:
        values = [
            torch.empty([symbols[symbol] if size == "batch" else size for size in shape]).to(dtype)
            for shape in shapes
        ]
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        for number, (node, value) in enumerate(zip(placeholders, values, strict=True)):
            node.meta["example_value"] = value
            node.target = node.name = f"{names}{number}"
        env: dict[fx.Node, Any] = dict(zip(placeholders, values, strict=True))
        for node in graph_module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                args = fx.map_arg(node.args, lambda n: env[n])
                kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
                if node.op == "call_method":
                    env[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
                else:
                    env[node] = node.target(*args, **kwargs)
                node.meta["example_value"] = env[node]
    return graph_module


def write(build: Callable[..., Any], *shapes: tuple[int | str, ...], **how: Any) -> WrittenPiece:
    graph_module = graph_of(build, *shapes, **how)
    # The capture's own names of symbols are of no matter: found by order of appearance.
    ranges = {str(s): RANGES["batch"] for s in _free_symbols(graph_module)}
    return write_piece(graph_module, ranges)


def _free_symbols(graph_module: fx.GraphModule) -> list[Any]:
    return [
        size.node.expr
        for node in graph_module.graph.find_nodes(op="placeholder")
        for size in node.meta["example_value"].shape
        if isinstance(size, torch.SymInt)
    ]


def plain(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.add(x, y).relu(),)


BASE = (("batch", 8), ("batch", 8))


def test_names_do_not_matter() -> None:
    """Equal pieces under other names, of nodes and of sizes, have one text."""

    def renamed(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor]:
        total = torch.add(first, second)
        return (total.relu(),)

    one = write(plain, *BASE)
    two = write(renamed, *BASE, names="other", symbol="zz")

    assert one.piece.text == two.piece.text
    assert one.piece == two.piece


@pytest.mark.parametrize(
    ("build", "shapes", "how"),
    [
        (lambda x, y: (torch.add(x, y, alpha=2).relu(),), BASE, {}),
        (lambda x, y: (torch.sub(x, y).relu(),), BASE, {}),
        (lambda x, y: (torch.add(y, x).relu(),), BASE, {}),
        (plain, BASE, {"dtype": torch.float16}),
        (plain, (("batch", 9), ("batch", 9)), {}),
        (plain, ((8, 8), (8, 8)), {}),
        (plain, (("batch", 8), (8,)), {}),
    ],
    ids=["constant", "operator", "order", "dtype", "size", "static", "rank"],
)
def test_what_changes_the_result_changes_the_text(
    build: Callable[..., Any], shapes: Any, how: dict[str, Any]
) -> None:
    assert write(build, *shapes, **how).piece.text != write(plain, *BASE).piece.text


@pytest.mark.parametrize(
    ("one", "other"), [(1.0, 1), (0.0, -0.0), (True, 1), (1e-5, 1e-6)], ids=str
)
def test_constants_that_print_alike_are_told_apart(one: Any, other: Any) -> None:
    def multiply_by(constant: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
        return lambda x: (torch.mul(x, constant),)

    texts = {write(multiply_by(constant), (4,)).piece.text for constant in (one, other)}

    assert len(texts) == 2


def test_ranges_and_autocast_enter_the_text() -> None:
    graph_module = graph_of(plain, *BASE)
    symbol = str(_free_symbols(graph_module)[0])
    narrow = write_piece(graph_module, {symbol: SymbolRange(low=2, high=32)})
    cast = write_piece(graph_module, {symbol: RANGES["batch"]}, autocast=("cpu", "bfloat16"))

    assert len({narrow.piece.text, cast.piece.text, write(plain, *BASE).piece.text}) == 3


def test_the_text_is_the_eager_piece() -> None:
    """Executed as Python it computes what the graph computes, for any size in its range."""
    piece = write(plain, *BASE).piece
    namespace: dict[str, Any] = {"torch": torch}
    exec(piece.text, namespace)
    x, y = torch.randn(5, 8), torch.randn(5, 8)

    assert torch.equal(namespace["piece"](x, y)[0], (x + y).relu())


def test_a_text_is_read_back_to_the_same_text() -> None:
    """Reading a piece and writing what was read is the identity; JSON in between keeps it."""
    piece = write(plain, *BASE).piece
    again = Piece.from_json(piece.to_json())
    assert again == piece

    graph_module = read_piece(again)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(graph_module(x, y)[0], (x + y).relu())


def test_a_size_is_read_from_the_inputs() -> None:
    def flatten(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.reshape(x.size(0) * 4),)

    text = write(flatten, ("batch", 4)).piece.text
    assert "a0.size(0)" in text


def test_what_has_no_text_is_refused() -> None:
    """A sub-module, and an operator that no name leads to."""

    class WithModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.inner(x),)

    graph_module = fx.symbolic_trace(WithModule())
    for node in graph_module.graph.nodes:
        node.meta["example_value"] = torch.empty(2, 4)
    with pytest.raises(CannotWrite, match="call_module"):
        write_piece(graph_module, {})

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2)
    made = graph.call_function(lambda value: value, (x,))
    made.meta["example_value"] = torch.empty(2)
    graph.output((made,))
    with pytest.raises(CannotWrite, match="has no name") as found:
        write_piece(fx.GraphModule(nn.Module(), graph), {})
    assert found.value.nodes == (made.name,)


def test_a_device_loses_its_index() -> None:
    """An artifact serves every GPU of its kind."""
    texts = set()
    for device in ("cuda:0", "cuda:1"):
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = torch.empty(2)
        made = graph.call_function(torch.zeros, (2,), {"device": torch.device(device)})
        made.meta["example_value"] = torch.empty(2)
        graph.output((made,))
        texts.add(write_piece(fx.GraphModule(nn.Module(), graph), {}).piece.text)

    assert len(texts) == 1
