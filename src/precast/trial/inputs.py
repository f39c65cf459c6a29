"""Inputs for a model's calls: made from shapes, by what transformers' models want, or varied."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from precast.errors import ModelError
from precast.trial.model import Call, LoadedModel
from precast.trial.shapes import (
    ConcreteInput,
    InputSpec,
    edges,
    expand,
    parse_shapes,
)

_BATCH, _TOKENS = "1..4", 128
_MOST_BATCH = 8  # Tried beside an example's own number of rows.


def make_calls(
    loaded: LoadedModel,
    spec_lists: Sequence[Sequence[InputSpec]],
    *,
    is_exhaustive: bool = False,
) -> list[Call]:
    """Return the calls that `--shapes` asks for, else the factory's own, else what is usual.

    Args:
        loaded: The model.
        spec_lists: One for each `--shapes`; empty: none was given.
        is_exhaustive: Try sizes at the edges, for a comparison.

    Raises:
        ModelError: Nothing says what the model takes, or there is no such argument.
    """
    if not spec_lists and loaded.examples:
        calls = list(loaded.examples)
        if is_exhaustive:
            calls += [varied for call in loaded.examples for varied in vary_rows(call)]
        return calls
    texts = "" if spec_lists else default_shapes(loaded)
    if not spec_lists and not texts:
        raise ModelError(
            f"nothing says what {loaded.name} takes",
            "Give --shapes, such as --shapes 1..8x128 (by position) or "
            "--shapes input_ids=1..8x128:int64, or have the factory return (model, inputs)",
            is_usage=True,
        )
    maker = _Maker(loaded)
    rows: dict[tuple[ConcreteInput, ...], None] = {}
    for specs in spec_lists or [parse_shapes(texts)]:
        rows |= dict.fromkeys(expand(specs, is_exhaustive=is_exhaustive))
    return [maker.call(row) for row in rows]


def default_shapes(loaded: LoadedModel) -> str:
    """Return what a model of transformers is usually called with, as `--shapes`; empty: unknown."""
    config = loaded.config
    if config is None:
        return ""
    main = getattr(loaded.module, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", None) or 3
        return f"pixel_values={_BATCH}x{channels}x{height}x{width}"
    if main != "input_ids":
        return ""
    text_config = config.get_text_config()
    most = min(getattr(text_config, "max_position_embeddings", None) or _TOKENS, _TOKENS)
    size = f"{_BATCH}x{max(1, most // 8)}..{most}"
    shapes = f"input_ids={size},attention_mask={size}"
    if getattr(config, "is_encoder_decoder", False):
        shapes += f",decoder_input_ids={_BATCH}x1..{max(2, most // 4)}"
    return shapes


class _Maker:
    """Makes tensors that a model's arguments may be."""

    def __init__(self, loaded: LoadedModel) -> None:
        module = loaded.module
        forward = module.forward if isinstance(module, torch.nn.Module) else module
        self._name = loaded.name
        self._parameters = inspect.signature(forward).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        # At random, but the same each time.
        self._generator = torch.Generator().manual_seed(0)
        tensors = []
        embeddings = []
        if isinstance(module, torch.nn.Module):
            tensors = [*module.parameters(), *module.buffers()]
            embeddings = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        self._float_dtype = floats[0] if floats else torch.get_default_dtype()
        self._below = min((e.num_embeddings for e in embeddings), default=2)
        config = loaded.config
        vocabulary = (
            None if config is None else config.get_text_config().to_dict().get("vocab_size")
        )
        self._vocabulary = vocabulary or self._below

    def call(self, inputs: Sequence[ConcreteInput]) -> Call:
        """Return one call with these inputs."""
        positions = list(self._parameters)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for one in inputs:
            if one.name is None:
                known = positions[len(args)] if len(args) < len(positions) else ""
                args.append(self._value(one, known))
            else:
                self._check_name(one.name)
                kwargs[one.name] = self._value(one, one.name)
        return Call(tuple(args), kwargs)

    def _check_name(self, name: str) -> None:
        if name in self._parameters or self._takes_any:
            return
        from difflib import get_close_matches

        near = get_close_matches(name, self._parameters, n=1)
        raise ModelError(
            f"{self._name} takes no argument {name!r}",
            f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(self._parameters)}",
            is_usage=True,
        )

    def _value(self, one: ConcreteInput, name: str) -> Any:
        if one.shape is None:
            return one.constant
        dtype = self._dtype(one, name)
        if dtype.is_floating_point:
            made = torch.randn(one.shape, generator=self._generator, dtype=torch.float32)
        elif dtype is torch.bool or "mask" in name:
            made = torch.ones(one.shape)
        elif "position" in name and one.shape:
            made = torch.arange(one.shape[-1]).expand(one.shape)
        else:
            below = self._vocabulary if name.endswith("input_ids") else self._below
            made = torch.randint(max(1, below), one.shape, generator=self._generator)
        return made.to(device=self._device, dtype=dtype).contiguous()

    def _dtype(self, one: ConcreteInput, name: str) -> torch.dtype:
        if one.dtype is not None:
            found: torch.dtype = getattr(torch, one.dtype)
            return found
        parameter = self._parameters.get(name)
        annotation = "" if parameter is None else str(parameter.annotation)
        if "BoolTensor" in annotation:
            return torch.bool
        is_count = name.endswith(("ids", "mask", "tokens", "labels", "indices")) or (
            name.startswith("position")
        )
        return torch.int64 if is_count or "LongTensor" in annotation else self._float_dtype


def vary_rows(call: Call) -> list[Call]:
    """Return an example's call with other numbers of rows, those of `edges`.

    Where tensors agree in their first size, it is taken for the number of rows; their rows are
    repeated, or fewer of them taken. A model that wants the number it got fails eager as well.
    """
    tensors = [value for value in (*call.args, *call.kwargs.values()) if _has_rows(value)]
    if not tensors or len({tensor.shape[0] for tensor in tensors}) > 1:
        return []
    present = tensors[0].shape[0]

    def resized(value: Any, rows: int) -> Any:
        if not _has_rows(value):
            return value
        return value[torch.arange(rows, device=value.device) % present]

    return [
        Call(
            tuple(resized(value, rows) for value in call.args),
            {name: resized(value, rows) for name, value in call.kwargs.items()},
        )
        for rows in edges(1, max(present + 1, _MOST_BATCH))
        if rows != present
    ]


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] > 0


def describe_call(call: Call) -> str:
    """Return a call as people write it: `input_ids=int64[1, 128], use_cache=False`."""
    parts = [_describe(value) for value in call.args]
    parts += [f"{name}={_describe(value)}" for name, value in call.kwargs.items()]
    return ", ".join(parts)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if type(value) in (tuple, list):
        inside = ", ".join(map(_describe, value))
        return f"({inside})" if type(value) is tuple else f"[{inside}]"
    return type(value).__name__
