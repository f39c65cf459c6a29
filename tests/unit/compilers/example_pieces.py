"""Pieces that the tests of compilers and workers share, and the operator that one of them calls."""

from __future__ import annotations

import torch

from precast.graph.piece import Piece, Size, SymbolRange, TensorSpec

_library = torch.library.Library("precast_test", "DEF")
_library.define("twice(Tensor x) -> Tensor")
_library.impl("twice", lambda x: x * 2, "CPU")
_library.impl("twice", torch.empty_like, "Meta")


def spec(
    *shape: Size, dtype: str = "float32", stride: tuple[Size, ...] | None = None
) -> TensorSpec:
    if stride is None:
        steps: list[Size] = [1]
        for size in reversed(shape[1:]):
            last = steps[0]
            product = size * last if isinstance(size, int) and isinstance(last, int) else None
            steps.insert(0, f"({size}*{last})" if product is None else product)
        stride = tuple(steps)
    return TensorSpec(dtype=dtype, shape=shape, stride=stride, device="cpu")


ROWS = {"s0": SymbolRange(low=0, high=None)}

GATED = Piece(
    text="""# precast piece 1
# s0: 0..
def piece(a0, a1, a2, a3):
    s0 = a0.size(0)
    v0 = torch.nn.functional.linear(a0, a1, a2)
    v1 = torch.nn.functional.gelu(v0, approximate='tanh')
    v2 = torch.nn.functional.linear(v1, a3, None)
    v3 = operator.add(v2, a0)
    v4 = v3.view(s0, 4, 16)
    v5 = operator.getitem(v4, (slice(None, None, None), 0))
    return (v3, v5)
""",
    inputs=(spec("s0", 64), spec(256, 64), spec(256), spec(64, 256)),
    outputs=(spec("s0", 64), spec("s0", 16, stride=(64, 1))),
    symbols=ROWS,
)

MUTATING = Piece(
    text="""def piece(a0, a1):
    v0 = operator.mul(a0, 2.0)
    v1 = a1.add_(v0)
    v2 = a1.sum(-1)
    v3 = operator.setitem(a1, (slice(None, None, None), slice(0, 2, None)), 5.0)
    v4 = a0.transpose(0, 1)
    return (v2, v4, a1)
""",
    inputs=(spec("s0", 8), spec("s0", 8)),
    outputs=(spec("s0"), spec(8, "s0", stride=(1, 8)), spec("s0", 8)),
    symbols=ROWS,
    mutated=(1,),
)

FOREIGN = Piece(
    text="""def piece(a0):
    v0 = operator.mul(a0, 2.0)
    v1 = torch.ops.precast_test.twice.default(v0)
    return (v1,)
""",
    inputs=(spec("s0", 8),),
    outputs=(spec("s0", 8),),
    symbols=ROWS,
)

TINY = Piece(
    text="def piece(a0):\n    v0 = operator.add(a0, 1.0)\n    return (v0,)\n",
    inputs=(spec("s0", 4),),
    outputs=(spec("s0", 4),),
    symbols=ROWS,
)
