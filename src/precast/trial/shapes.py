"""What `--shapes` says: the inputs of a model's calls, as text and as plain data.

    4x16                                          one input, given by position
    input_ids=1x128:int64,attention_mask=1x128    two, given by keyword
    input_ids=1..8x128                            from 1 to 8 rows: several calls
    pixel_values=1x3x224x224:bfloat16,return_dict=false

Sizes stand with `x` between them; `scalar` is a tensor without sizes. Equal ranges of one text move
together, so that a mask is as long as its tokens; others vary by themselves. A value of `true`,
`false` or `none` is passed as it is. Imports no torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from precast.errors import ModelError
from precast.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What a dtype may be called, and torch's name of it.
DTYPES = {
    **{
        name: name
        for name in (
            "float64", "float32", "float16", "bfloat16",
            "int64", "int32", "int16", "int8", "uint8", "bool",
        )
    },
    "fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
    "double": "float64", "float": "float32", "half": "float16",
    "long": "int64", "int": "int32",
}  # fmt: skip
_CONSTANTS = {"true": True, "false": False, "none": None}
_MOST_CALLS = 64

Range = tuple[int, int]  # Both ends belong to it.


class InputSpec(Value):
    """One input. `name=None`: by position. `sizes=None`: no tensor but `constant`."""

    name: str | None
    sizes: tuple[Range, ...] | None
    dtype: str | None = None
    constant: bool | None = None


class ConcreteInput(Value):
    """One input of one call: as `InputSpec`, each size a number."""

    name: str | None
    shape: tuple[int, ...] | None
    dtype: str | None = None
    constant: bool | None = None


def parse_shapes(text: str) -> list[InputSpec]:
    """Return the inputs that a text describes.

    Raises:
        ModelError: It cannot be read; says which part.
    """
    specs = [_parse_input(part.strip(), text) for part in text.split(",")]
    names = [spec.name for spec in specs if spec.name is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _unreadable(text, f"{twice[0]!r} is given twice")
    return specs


def parse_dtype(text: str) -> str:
    """Return torch's name of a dtype.

    Raises:
        ModelError: There is none of that name.
    """
    if text.removeprefix("torch.") in DTYPES:
        return DTYPES[text.removeprefix("torch.")]
    from difflib import get_close_matches

    near = get_close_matches(text, DTYPES, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Write one of {', '.join(DTYPES)}"
    raise ModelError(f"there is no dtype {text!r}", hint, is_usage=True)


def _parse_input(part: str, whole: str) -> InputSpec:
    found = re.fullmatch(r"(?:(?P<name>[^=:]*)=)?(?P<sizes>[^=:]*)(?::(?P<dtype>[^=:]*))?", part)
    if found is None:
        raise _unreadable(whole, f"{part!r} is no input")
    name, sizes, dtype = found["name"], found["sizes"].strip().lower(), found["dtype"]
    if name is not None and not name.strip().isidentifier():
        raise _unreadable(whole, f"{name!r} is no name of an argument")
    name = None if name is None else name.strip()
    if sizes in _CONSTANTS and dtype is None:
        return InputSpec(name, None, None, _CONSTANTS[sizes])
    ranges = () if sizes == "scalar" else tuple(_parse_size(x, whole) for x in sizes.split("x"))
    return InputSpec(name, ranges, None if dtype is None else parse_dtype(dtype.strip()))


def _parse_size(text: str, whole: str) -> Range:
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    if found is None:
        raise _unreadable(whole, f"{text!r} is no size")
    low, high = int(found[1]), int(found[2] or found[1])
    if low > high:
        raise _unreadable(whole, f"{text!r} is an empty range")
    return low, high


def _unreadable(text: str, problem: str) -> ModelError:
    return ModelError(
        f"--shapes {text!r} cannot be read: {problem}",
        "Write it as input_ids=1..8x128:int64,attention_mask=1..8x128 "
        "(without a name: by position)",
        is_usage=True,
    )


def ends(low: int, high: int) -> list[int]:
    """Return the sizes of a range worth a call: its ends, and 2 where 1 may be special."""
    return sorted({low, high, *((2,) if low < 2 < high else ())})


def edges(low: int, high: int) -> list[int]:
    """Return the sizes at which code that was compiled for a range goes wrong, if it does.

    Its ends and their neighbours, the small ones, and those around what a vector holds.
    """
    inside = {size for size in (1, 2, 3, 7, 8, 9, 16, 17) if low <= size <= high}
    return sorted(inside | {low, min(low + 1, high), max(high - 1, low), high})


def expand(
    specs: Sequence[InputSpec], *, is_exhaustive: bool = False
) -> list[tuple[ConcreteInput, ...]]:
    """Return the calls that specs with ranges stand for, the largest first.

    Args:
        specs: The inputs of one call.
        is_exhaustive: One range after the other takes all its `edges`, the others their high end.
            Else all combinations of `ends`.

    Raises:
        ModelError: They are too many.
    """
    ranges = sorted({size for spec in specs for size in spec.sizes or () if size[0] < size[1]})
    rows: list[dict[Range, int]] = []
    if is_exhaustive:
        top = {each: each[1] for each in ranges}
        rows = [top, {each: each[0] for each in ranges}]
        rows += [{**top, each: size} for each in ranges for size in reversed(edges(*each))]
    else:
        points = [reversed(ends(*each)) for each in ranges]
        rows = [dict(zip(ranges, row, strict=True)) for row in itertools.product(*points)]
    calls = list(dict.fromkeys(tuple(_fill(specs, row)) for row in rows))
    if len(calls) > _MOST_CALLS:
        raise ModelError(
            f"these shapes stand for {len(calls)} calls, more than {_MOST_CALLS}",
            "Use fewer different ranges: equal ones move together",
            is_usage=True,
        )
    return calls


def _fill(specs: Iterable[InputSpec], sizes: Mapping[Range, int]) -> Iterable[ConcreteInput]:
    for spec in specs:
        shape = None
        if spec.sizes is not None:
            shape = tuple(sizes[size] if size in sizes else size[1] for size in spec.sizes)
        yield ConcreteInput(spec.name, shape, spec.dtype, spec.constant)


def to_json(specs: Sequence[InputSpec]) -> list[dict[str, Any]]:
    """Return specs as plain data, for the process that makes inputs of them."""
    return [spec.as_dict() for spec in specs]


def from_json(data: Iterable[Mapping[str, Any]]) -> list[InputSpec]:
    """Return the specs that `to_json` wrote."""
    return [
        InputSpec(
            item["name"],
            None if item["sizes"] is None else tuple((low, high) for low, high in item["sizes"]),
            item["dtype"],
            item["constant"],
        )
        for item in data
    ]
