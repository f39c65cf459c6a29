"""Running new code once before calls do, so that none of them waits for what it loads late."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch

from precast.behind import give_way
from precast.graph.inputs import edge_sizes, evaluate_size, random_inputs, zero_inputs

if TYPE_CHECKING:
    from precast.compilers.interface import CompiledCallable
    from precast.graph.piece import Piece

# Of what is made for it: beside a server that needs its memory.
_MOST_ELEMENTS = 1 << 24

_own = threading.local()


def run_once(
    piece: Piece,
    call: CompiledCallable,
    eager_call: CompiledCallable,
    weights: Mapping[int, torch.Tensor],
) -> None:
    """Run a piece's code once.

    Args:
        piece: Writes into none of its inputs.
        call: Its code.
        eager_call: The same in eager.
        weights: The model's, by the position of the input.

    Raises:
        Exception: Whatever the piece raises, eager or compiled.
    """
    with torch.no_grad():
        if piece.device == "cuda":
            _run_on_gpu(piece, call, weights)
            return
        sizes = min(edge_sizes(piece), key=lambda row: sum(row.values()))
        inputs = random_inputs(piece, sizes, 0, dict(weights))
        # Where eager refuses these numbers, compiled code may end the process: torch 2.11 and 2.12
        # divide integers by zero.
        eager_call(inputs)
        call(inputs)


def _run_on_gpu(piece: Piece, call: CompiledCallable, weights: Mapping[int, torch.Tensor]) -> None:
    """Run it with zeros, in steps: while a kernel is opened no other starts, in any thread.

    At usual sizes matrix products and the like are opened already, by eager calls. Eager is not
    asked: a GPU divides by zero, and an index that is out of range ends either.
    """
    _wake()
    rows = edge_sizes(piece, keep_alike=True)
    sizes = next((row for row in rows if _num_elements(piece, row, weights) < _MOST_ELEMENTS), None)
    if sizes is None:
        return
    give_way()
    inputs = zero_inputs(piece, sizes, weights)
    give_way()
    call(inputs)


def _num_elements(
    piece: Piece, sizes: Mapping[str, int], weights: Mapping[int, torch.Tensor]
) -> int:
    """Return how many elements inputs and outputs have, but for the weights."""
    specs = [spec for i, spec in enumerate(piece.inputs) if i not in weights] + [*piece.outputs]
    return sum(prod(int(evaluate_size(size, sizes)) for size in spec.shape) for spec in specs)


def _wake() -> None:
    """Let this thread do on a GPU what each does once: milliseconds, in parts."""
    number = torch.cuda.current_device()
    if number in getattr(_own, "awake", ()):
        return
    _own.awake = {*getattr(_own, "awake", ()), number}
    small = torch.zeros(8, 8).to("cuda")
    give_way()
    torch.cuda.current_blas_handle()
    give_way()
    torch.mm(small, small)
