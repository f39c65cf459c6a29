"""Names of callables and literals of arguments: what is written resolves to the same thing."""

from __future__ import annotations

import enum
import math
import operator
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from precast.graph.arguments import render_argument, render_call
from precast.graph.targets import module_of, resolve_target, target_name

CALLABLES = {
    "torch.add": torch.add,
    "torch.nn.functional.linear": F.linear,
    "torch.nn.functional.silu": F.silu,
    "torch.nn.functional.scaled_dot_product_attention": F.scaled_dot_product_attention,
    "operator.add": operator.add,
    "operator.and_": operator.and_,
    "math.sqrt": math.sqrt,
    "builtins.getattr": getattr,
    "torch.Tensor.add": torch.Tensor.add,
    "torch.ops.aten.add": torch.ops.aten.add,
    "torch.ops.aten.add.Tensor": torch.ops.aten.add.Tensor,
    "torch.ops.aten.mm.default": torch.ops.aten.mm.default,
    "torch.amp.autocast_mode._enter_autocast": torch.amp.autocast_mode._enter_autocast,
    "torch._C._set_grad_enabled": torch._C._set_grad_enabled,
    "torch.Size": torch.Size,
    "torch.sym_max": torch.sym_max,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_name_resolves_to_the_identical_object(name: str) -> None:
    assert target_name(CALLABLES[name]) == name
    assert resolve_target(name) is CALLABLES[name]


def test_what_cannot_be_found_again_has_no_name() -> None:
    assert target_name(lambda x: x) is None


def test_a_name_that_would_import_a_compiler_is_refused() -> None:
    with pytest.raises(LookupError, match="compiler"):
        resolve_target("torch._dynamo.optimize")


def test_an_unknown_name_is_a_lookup_error() -> None:
    for name in ("torch.no_such_function", "no_such_module.f", "torch.ops.no_such_ns.op"):
        with pytest.raises(LookupError, match="no_such"):
            resolve_target(name)


def test_only_what_torch_does_not_bring_needs_an_import_of_its_own() -> None:
    assert module_of("torch.nn.functional.linear") == "torch"
    assert module_of("torch.ops.aten.add.Tensor") == "torch"
    assert module_of("operator.add") == "operator"


def test_resolving_imports_nothing_heavy() -> None:
    script = (
        "import torch, sys\n"
        "from precast.graph.targets import resolve_target\n"
        f"for name in {list(CALLABLES)!r}: resolve_target(name)\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'sympy', 'triton')\n"
        "assert not [m for m in sys.modules if m.startswith(heavy)]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -1.5,
        float("inf"),
        float("-inf"),
        "it's",
        torch.float32,
        torch.device("cpu"),
        torch.device("cuda"),
        torch.strided,
        torch.channels_last,
        slice(None, 3, None),
        (..., None, slice(1, 2)),
        [1, (2,), {"a": ()}],
        torch.Size([1, 2]),
        range(0, 4, 2),
        1 + 2j,
    ],
    ids=repr,
)
def test_a_literal_evaluates_to_its_value(value: Any) -> None:
    found = eval(render_argument(value, str), {"torch": torch})
    assert found == value
    assert type(found) is type(value)


def test_a_nan_is_a_nan() -> None:
    assert math.isnan(eval(render_argument(math.nan, str)))


def test_nodes_are_rendered_by_name_at_any_depth() -> None:
    node = torch.fx.Graph().placeholder("x")
    assert render_argument(([node], slice(node, None)), lambda n: n.name) == (
        "([x], slice(x, None, None))"
    )


def test_what_only_looks_like_a_literal_is_refused_or_made_a_constant() -> None:
    class Colour(enum.IntEnum):
        RED = 1

    class Pair(NamedTuple):
        a: int

    for value in (Colour.RED, Pair(1), torch.ones(1), {1}):
        with pytest.raises(TypeError, match="no literal"):
            render_argument([value], str)
        assert render_argument([value], str, lambda _: "CONSTANT_0") == "[CONSTANT_0]"


def test_keywords_need_not_be_identifiers() -> None:
    assert render_call("f", (1,), {"a": 2, "from": 3}, repr) == "f(1, a=2, **{'from': 3})"
