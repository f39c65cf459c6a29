"""What is compiled: one piece as plain data, the unit of caching.

A `Piece` holds no tensor, no graph and no reference to a model, so that it can be
hashed, shown, sent to a worker and read back without a pickle. Writing one from an
FX graph and reading it back is `canonical`'s job; this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# A size: a number, or an expression in the piece's symbols ("s0", "8*s0 + 1").
Size = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What is known of one tensor that enters or leaves a piece.

    `shape` and `stride` count elements; a symbolic one is a Python expression over the
    piece's symbols. `device` is a type without an index ("cpu", "cuda"): an artifact
    serves every device of its kind.
    """

    dtype: str
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    device: str

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON data."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "device": self.device,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_json` wrote."""
        return TensorSpec(
            dtype=data["dtype"],
            shape=tuple(data["shape"]),
            stride=tuple(data["stride"]),
            device=data["device"],
        )

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        stride = ", ".join(map(str, self.stride))
        return f"{self.dtype}[{shape}] stride [{stride}] {self.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolRange:
    """The sizes that one symbol may take, both ends included; `high` None: no bound."""

    low: int
    high: int | None

    def __contains__(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f"{self.low}..{'' if self.high is None else self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One piece: a straight-line function over tensors, as text.

    `text` is valid Python: a header comment and `def piece(a0, a1, ...)` that returns a
    tuple. Executed with `torch` and `operator` in its namespace it is the eager piece.
    It names every spec, so equal texts are equal pieces. Every input is a tensor; sizes
    are read from the inputs' shapes inside the text. `hints` are typical sizes, one a
    symbol, for tuning and verification: they are not in the text and not in the key.
    """

    text: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: Mapping[str, SymbolRange]
    mutated: tuple[int, ...] = ()  # Inputs that the piece writes into, by position.
    autocast: tuple[str, str] | None = None  # (device type, dtype) that was active around it.
    hints: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def device(self) -> str:
        """The device type that the piece runs on ("cpu" if no tensor says otherwise)."""
        for spec in (*self.inputs, *self.outputs):
            if spec.device != "cpu":
                return spec.device
        return "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the piece as JSON data, for a worker or a report."""
        return {
            "text": self.text,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "symbols": {name: [r.low, r.high] for name, r in self.symbols.items()},
            "mutated": list(self.mutated),
            "autocast": None if self.autocast is None else list(self.autocast),
            "hints": dict(self.hints),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Piece:
        """Read what `to_json` wrote."""
        autocast: Sequence[str] | None = data["autocast"]
        return Piece(
            text=data["text"],
            inputs=tuple(TensorSpec.from_json(spec) for spec in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in data["outputs"]),
            symbols={
                name: SymbolRange(low=low, high=high)
                for name, (low, high) in data["symbols"].items()
            },
            mutated=tuple(data["mutated"]),
            autocast=None if autocast is None else (autocast[0], autocast[1]),
            hints=dict(data["hints"]),
        )
