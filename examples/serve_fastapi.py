"""A server that answers from the first request on, and compiles its model behind the requests.

    python examples/serve_fastapi.py --port 8000
    curl localhost:8000/classify --json '{"features": [0.1, 0.2, 0.3, 0.4]}'
    curl localhost:8000/status

Requests run eager at first, and compiled as soon as that is compiled, checked and swapped in:
`/status` says which. Stop the server and start it again: the first request then finds it compiled
within a moment.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from torch import nn

import precast


def make_model() -> nn.Module:
    """Return a classifier of four features; replace it by your own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 10), nn.Softmax(-1)
    ).eval()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.model = precast.compile(make_model(), mode="progressive")
    yield
    precast.release(app.state.model)  # Compile workers end with the server.


app = FastAPI(lifespan=lifespan)


class Features(BaseModel):
    features: list[float] = Field(min_length=4, max_length=4)  # Others are refused with 422.


@app.post("/classify")
def classify(body: Features, request: Request) -> dict[str, Any]:
    """Return the probability of each class; runs in a thread beside those of other requests."""
    with torch.inference_mode():
        probabilities = request.app.state.model(torch.tensor([body.features]))
    return {"probabilities": probabilities[0].tolist()}


@app.get("/status")
def status(request: Request) -> dict[str, Any]:
    """Say whether requests run compiled by now, and what is still being done for that."""
    found = precast.status(request.app.state.model)
    pieces = [piece for assembly in found["assemblies"] for piece in assembly["pieces"]]
    return {
        "is_swapped": found["start_seconds"] is not None,  # All that is compiled has landed.
        "compiled": sum(piece["compiler"] != "eager" for piece in pieces),
        "pieces": len(pieces),
        "doing": found["behind"]["doing"],
        "is_warm": found["is_warm"],
        "ready_after_seconds": found["start_seconds"],
        "reasons": found["reasons"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a model that compiles behind its requests.")
    parser.add_argument("--port", type=int, default=8000)
    uvicorn.run("serve_fastapi:app", host="127.0.0.1", port=parser.parse_args().port)
