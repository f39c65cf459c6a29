"""One process of the cold fleet that `cache.py` measures; it imports what a server needs alone.

    python benchmarks/cold_start.py DIRECTORY disk,redis://... --layers 4

Says "ready" once the model is made, and starts it when it reads a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import torch
from decoder import Shape, build_decoder, decoder_inputs

import precast


def main() -> None:
    """Start the decoder in this process, which must be new, once the parent says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of the disk tier")
    parser.add_argument("chain", help="of tiers, as the setting `cache_url` takes it")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    # One thread each, as where several processes share a machine: with more than there are cores,
    # OpenMP's threads wait for each other by turning in circles, and that is CPU time too.
    torch.set_num_threads(1)
    shape = Shape(layers=options.layers)
    model = build_decoder(shape, device="cpu", dtype=torch.float32)
    inputs = decoder_inputs(shape, 17, device="cpu")
    found: list[Any] = []
    precast.compile(
        model,
        cache_dir=options.folder,
        cache_url=options.chain,
        allow_unsigned=True,
        progress=False,
        revalidate="never",
        listeners=[found.append],
    )
    print("ready", flush=True)
    sys.stdin.readline()
    with torch.inference_mode():
        model(*inputs)
    precast.wait(model)
    precast.release(model)
    times = os.times()
    names = [type(event).__name__ for event in found]
    answer = {
        "compiled": names.count("PieceCompiled"),
        "unique": sum(e.unique_pieces for e in found if type(e).__name__ == "PlanMade"),
        "cpu_s": times.user + times.system + times.children_user + times.children_system,
        "imports": [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
