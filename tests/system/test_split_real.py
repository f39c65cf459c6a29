"""Real models cut by what their operators cost: the pieces give what the model gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import precast
from precast.events import Event, PlanMade
from precast.split.by_memory import SplitByMemory

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
IDS = torch.arange(2 * 7).reshape(2, 7) % 100
WEIGHTS_OF_A_LAYER = 4 * (4 * 32 * 32 + 3 * 32 * 64)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, use_cache=False)).eval()


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(
    "rule",
    [SplitByMemory(budget_bytes=WEIGHTS_OF_A_LAYER), precast.SplitByCompute(num_pieces=5)],
    ids=["memory", "compute"],
)
def test_a_transformer_in_pieces_is_the_transformer(name: str, rule: Any) -> None:
    model = make(name)
    events: list[Event] = []
    precast.compile(
        model,
        compiler="eager",
        split=rule,
        progress=False,
        revalidate="never",
        listeners=[events.append],
    )
    with torch.no_grad():
        for ids in (IDS, IDS[:, :3].contiguous()):
            found = model(input_ids=ids).last_hidden_state
            expected = model.forward(input_ids=ids).last_hidden_state
            assert torch.equal(found, expected)

    [plan] = [event for event in events if isinstance(event, PlanMade)]
    assert precast.status(model)["reasons"] == []
    if isinstance(rule, SplitByMemory):
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        assert math.ceil(weights / rule.budget_bytes) <= plan.pieces <= 8
    else:
        assert plan.pieces == rule.num_pieces
