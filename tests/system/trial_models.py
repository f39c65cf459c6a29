"""Factories as a user's project has them, for the commands that take MODEL."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from system.models import Net, PairNet, make_net


class Branching(nn.Module):
    """Breaks the graph twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if x.sum() > 0:  # The first break.
            x = x * 2
        if x.min() > 100:  # The second.
            x = x + 1
        return x.relu()


class Tokens(nn.Module):
    """An embedding, a mask and a flag, by keyword as transformers' models take them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, twice: Any = None
    ) -> dict[str, torch.Tensor]:
        x = self.norm(self.embed(input_ids))
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        return {"x": x * 2 if twice else x}


def make() -> nn.Module:
    print("the factory prints")  # noqa: T201 - as the models of users do.
    return make_net()


def make_with_inputs() -> tuple[nn.Module, torch.Tensor]:
    return make_net(), torch.ones(3, 8)


def make_with_calls() -> tuple[nn.Module, list[Any]]:
    return Tokens(), [
        {"input_ids": torch.ones(2, 5, dtype=torch.int64)},
        (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)),
    ]


def make_branching() -> nn.Module:
    torch.manual_seed(0)
    return Branching()


def make_pair() -> nn.Module:
    return PairNet()


def make_tokens() -> nn.Module:
    return Tokens()


def make_nothing() -> int:
    return 3


def fail() -> nn.Module:
    raise ValueError("no weights here")


def make_dying() -> nn.Module:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


net: Net = make_net()
number = 3
