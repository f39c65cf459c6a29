"""The model that the benchmarks measure: a llama-style decoder, written out, without transformers.

Attention is an op of a library of its own, as in serving engines, so that it is a split point
and runs natively. It is defined through `torch.library.Library`, which does not import Dynamo
(`torch.library.custom_op` would). Tokens are flattened: one dimension `[tokens]`, dynamic.
No weights are downloaded: they are random, seeded, and made on the device where they live.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - as torch writes it.
from torch import nn

_library = torch.library.Library("precast_bench", "DEF")
_library.define("attention(Tensor query, Tensor key, Tensor value) -> Tensor")


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over [tokens, heads, head_dim]; fewer key and value heads are repeated."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.squeeze(0).transpose(0, 1).contiguous()


def _attention_meta(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


_library.impl("attention", _attention, "CPU")
_library.impl("attention", _attention, "CUDA")
_library.impl("attention", _attention_meta, "Meta")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 688
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 512
    most_tokens: int = 4096

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden // self.heads


TOY = Shape()
# The layers of Llama 3 8B; a small vocabulary, since no piece but the first and last sees it.
EIGHT_B = Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=32000)


class Linear(nn.Linear):
    """A projection without bias, whose weights `build_decoder` fills."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: 8 billion weights are filled once, not twice."""


class Embedding(nn.Embedding):
    """An embedding whose weights `build_decoder` fills."""

    def reset_parameters(self) -> None:
        """Do nothing, as for `Linear`."""


class Norm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] by the positions' angles [tokens, 1, head_dim / 2]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Projections and rotary positions around the foreign op."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        query = rotate(self.q_proj(x).view(tokens, self.heads, self.head_dim), cos, sin)
        key = rotate(self.k_proj(x).view(tokens, self.kv_heads, self.head_dim), cos, sin)
        value = self.v_proj(x).view(tokens, self.kv_heads, self.head_dim)
        mixed = torch.ops.precast_bench.attention(query, key, value)
        return self.o_proj(mixed.view(tokens, self.heads * self.head_dim))


class Mlp(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.intermediate)
        self.up_proj = Linear(shape.hidden, shape.intermediate)
        self.down_proj = Linear(shape.intermediate, shape.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_norm = Norm(shape.hidden)
        self.attention = Attention(shape)
        self.output_norm = Norm(shape.hidden)
        self.mlp = Mlp(shape)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin)
        return x + self.mlp(self.output_norm(x))


class Decoder(nn.Module):
    """Tokens and positions `[tokens]` to logits `[tokens, vocabulary]`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.head = Linear(shape.hidden, shape.vocabulary)
        # Filled by `build_decoder`.
        table = (shape.most_tokens, shape.head_dim // 2)
        self.register_buffer("cos", torch.empty(table), persistent=False)
        self.register_buffer("sin", torch.empty(table), persistent=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        cos = self.cos[positions].unsqueeze(1)
        sin = self.sin[positions].unsqueeze(1)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def build_decoder(
    shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Decoder:
    """Return a decoder for inference with seeded random weights, made where they live."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Decoder(shape)
    finally:
        torch.set_default_dtype(previous)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("embed"):
                weight.normal_(0.0, 1.0, generator=generator)
            elif not name.endswith("norm.weight"):
                # Keeps every layer's output about as large as its input, at any width.
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        half = shape.head_dim // 2
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(shape.most_tokens).float(), frequencies)
        model.cos.copy_(angles.cos())
        model.sin.copy_(angles.sin())
    return model.eval().requires_grad_(False)


def decoder_inputs(
    shape: Shape, num_tokens: int, *, device: str = "cpu", seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `tokens` and `positions`, each `[num_tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, shape.vocabulary, (num_tokens,), generator=generator)
    return tokens.to(device), torch.arange(num_tokens).to(device)
