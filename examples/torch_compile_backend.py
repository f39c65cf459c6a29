"""The ecosystem's own door: `torch.compile(model, backend="precast")`.

    python examples/torch_compile_backend.py      run it twice: the second run compiles nothing

torch traces the model at every start, as it always does; the pieces come from Precast's cache, and
were checked against eager before they got there. `precast.compile(model)` saves the tracing too.
"""

from __future__ import annotations

import time

import torch
from torch import nn

import precast


def make_model() -> tuple[nn.Module, torch.Tensor]:
    """Return a model and an input for it."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(128, 10)).eval(), torch.randn(16, 128)


def main() -> None:
    model, inputs = make_model()
    counter = precast.CompilationCounter()
    compiled = torch.compile(model, backend="precast", options={"listeners": (counter,)})
    with torch.inference_mode():
        expected = model(inputs)
        started = time.perf_counter()
        output = compiled(inputs)
        seconds = time.perf_counter() - started
    print(f"largest difference from eager: {(output - expected).abs().max():.1e}")
    if counter.num_compiled:
        print(f"cold: the first call took {seconds:.2f} s, {counter.num_compiled} pieces compiled. "
              "Run it again: they are then in the cache.")  # fmt: skip
    else:
        print(f"warm: the first call took {seconds:.2f} s; all pieces came from the cache")


if __name__ == "__main__":
    main()
