"""Whether a compiled piece computes what the eager piece does, tried on random inputs.

A difference from eager is no error by itself: both round. Where the piece can also be run in
float64, both are measured against that, and compiled code may be as far from it as eager is, times
`SLACK`, or as far as the dtype's tolerance allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precast.compilers.tracing import piece_name
from precast.errors import CompileError
from precast.graph.inputs import random_inputs
from precast.graph.piece import Piece
from precast.graph.read import eager_function
from precast.values import Value

if TYPE_CHECKING:
    import torch

    from precast.compilers.interface import CompiledCallable

#: How much further from the float64 result than eager compiled code may be.
SLACK = 4.0

#: Largest error that is accepted whatever eager's is, relative to the largest value of the tensor.
#: Some twenty units in the last place for wide types (long sums are added in another order), two
#: to four for narrow ones. Integers and booleans must be equal.
TOLERANCES: dict[str, float] = {
    "float64": 1e-11,
    "float32": 2e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "complex64": 2e-5,
    "complex128": 1e-11,
}
_WIDEST_TOLERANCE = 0.25  # Eight-bit floats.


class VerifyResult(Value):
    """How far compiled code was from eager, at most, over all outputs and sizes."""

    max_abs_error: float
    max_rel_error: float
    sizes: tuple[dict[str, int], ...]


class VerifyMismatchError(CompileError):
    """A compiled piece does not compute what the eager one does."""

    code = "verify-mismatch"
    outcome = "the artifact is thrown away and the piece stays eager"


class EagerRefusedError(Exception):
    """The eager piece itself fails at the sizes tried, so that nothing can be compared."""


def verify(
    piece: Piece,
    compiled: CompiledCallable,
    eager: Callable[..., Sequence[torch.Tensor]],
    sizes: Iterable[Mapping[str, int]],
    compiler: str = "compiled code",
    integers_below: int = 2,
) -> VerifyResult:
    """Compare outputs and mutated inputs on random inputs at each assignment of sizes.

    Values, dtypes, shapes, strides (of dimensions longer than 1), and which inputs an output
    shares memory with, must agree; NaN equals NaN.

    Integers are made below `integers_below`: 1 where 1 may be no valid index.

    Sizes at which eager fails are passed over: two inputs may have to be of one length although
    only the model's code says so.

    Raises:
        VerifyMismatchError: They do not; says at which sizes, and how far apart they are.
        EagerRefusedError: Eager fails at every assignment.
    """
    tried: list[dict[str, int]] = []
    refused: EagerRefusedError | None = None
    worst_abs = worst_rel = 0.0
    known: dict[int, torch.Tensor] = {}
    for seed, row in enumerate(map(dict, sizes)):
        check = _Check(piece, compiler, row, known, integers_below)
        try:
            compared = check.run(compiled, eager, seed)
        except EagerRefusedError as error:
            refused = error
            continue
        tried.append(row)
        for ours, theirs, reference, name in compared:
            absolute, relative = check.compare(ours, theirs, reference, name)
            worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
    if refused is not None and not tried:
        raise refused
    return VerifyResult(worst_abs, worst_rel, tuple(tried))


def verify_from_text(
    piece: Piece,
    compiled: CompiledCallable,
    sizes: Iterable[Mapping[str, int]],
    compiler: str,
    integers_below: int = 2,
) -> VerifyResult:
    """Compare with the piece's own text, run eager."""
    return verify(piece, compiled, eager_function(piece), sizes, compiler, integers_below)


def verify_at(
    piece: Piece,
    compiled: CompiledCallable,
    eager: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    compiler: str = "compiled code",
) -> None:
    """Compare on given inputs, which stay as they are.

    Raises:
        VerifyMismatchError, EagerRefusedError: As `verify`.
    """
    check = _Check(piece, compiler, {}, {}, 2)
    for compared in check.run_on(inputs, compiled, eager):
        check.compare(*compared)


class _Check:
    """One comparison, at one assignment of sizes."""

    def __init__(
        self,
        piece: Piece,
        compiler: str,
        sizes: Mapping[str, int],
        known: dict[int, torch.Tensor],
        integers_below: int,
    ) -> None:
        self._known = known
        self._integers_below = integers_below
        self._piece = piece
        self._compiler = compiler
        self._sizes = sizes

    def run(
        self, compiled: CompiledCallable, eager: Callable[..., Any], seed: int
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]]:
        """Run all three ways on random inputs; return as `run_on` does."""
        made = random_inputs(self._piece, self._sizes, seed, self._known, self._integers_below)
        return self.run_on(made, compiled, eager, seed)

    def run_on(
        self,
        made: Sequence[torch.Tensor],
        compiled: CompiledCallable,
        eager: Callable[..., Any],
        seed: int | None = None,
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]]:
        """Run all three ways; return matching tensors and a name for them.

        Without a seed torch's generator is let be.
        """
        import torch

        def fresh() -> list[torch.Tensor]:
            if seed is not None:
                torch.manual_seed(seed)
            return list(map(copy_tensor, made))

        with torch.no_grad():
            theirs_in = fresh()
            try:
                theirs = list(eager(*theirs_in))
            except Exception as error:
                problem = f"the eager piece fails: {type(error).__name__}: {error}"
                raise EagerRefusedError(problem + self._at()) from error
            ours_in = fresh()
            ours = list(compiled(list(ours_in)))
            reference_in, reference = self._reference(eager, fresh())
        if len(ours) != len(theirs):
            raise self._mismatch(f"{len(ours)} outputs where eager has {len(theirs)}")
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if _shared_with(mine, ours_in) != _shared_with(other, theirs_in):
                raise self._mismatch(f"output {i} shares memory with other inputs than in eager")
        rows = [
            (ours[i], theirs[i], reference[i] if reference else None, f"output {i}")
            for i in range(len(ours))
        ]
        return rows + [
            (ours_in[i], theirs_in[i], reference_in[i] if reference else None, f"input {i}")
            for i in range(len(ours_in))
        ]

    def _reference(
        self, eager: Callable[..., Any], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run in float64; nothing where the piece insists on its own dtypes."""
        import torch

        wide = [
            tensor.double() if tensor.dtype in (torch.float32, *_NARROW()) else tensor
            for tensor in inputs
        ]
        if self._piece.autocast is not None or all(
            w is t for w, t in zip(wide, inputs, strict=True)
        ):
            return [], []
        try:
            return wide, list(eager(*wide))
        except Exception:  # noqa: BLE001 - mixed dtypes fail in many ways; then without it.
            return [], []

    def compare(
        self, ours: torch.Tensor, theirs: torch.Tensor, reference: torch.Tensor | None, name: str
    ) -> tuple[float, float]:
        """Return the absolute and relative difference of two tensors that agree well enough."""
        try:
            return compare_tensors(ours, theirs, reference)
        except TensorsDifferError as error:
            raise self._mismatch(f"{name}{error}") from error

    def _mismatch(self, problem: str) -> VerifyMismatchError:
        return VerifyMismatchError(piece_name(self._piece), self._compiler, problem + self._at())

    def _at(self) -> str:
        at = ", ".join(f"{name}={size}" for name, size in self._sizes.items())
        return f" at {at}" if at else ""


class TensorsDifferError(Exception):
    """Two tensors are not the same, for rounding; the message goes on after a tensor's name."""


def compare_tensors(
    ours: torch.Tensor, theirs: torch.Tensor, reference: torch.Tensor | None
) -> tuple[float, float]:
    """Return the absolute and the relative difference of two tensors that agree well enough.

    Args:
        ours: What compiled code made.
        theirs: What eager made.
        reference: The same in float64, where that is known: both may be as far from it.

    Raises:
        TensorsDifferError: They do not agree; says how far apart they are.
    """
    import torch

    _compare_kind(ours, theirs)
    if torch.equal(ours, theirs):  # Weights, mostly: one pass over them, not six.
        return 0.0, 0.0
    if not (theirs.is_floating_point() or theirs.is_complex()):
        wrong = int((ours != theirs).sum())
        if wrong:
            raise TensorsDifferError(f": {wrong} of {ours.numel()} integers differ")
        return 0.0, 0.0
    difference, scale = _distance(ours, theirs)
    relative = difference / scale if scale else 0.0
    dtype = str(theirs.dtype).removeprefix("torch.")
    allowed = TOLERANCES.get(dtype, _WIDEST_TOLERANCE) * max(scale, 1e-6)
    if difference <= allowed:
        return difference, relative
    usable = reference is not None and reference.shape == ours.shape
    if usable and reference is not None and reference.is_floating_point():
        from_truth, _ = _distance(ours, reference)
        eager_from_truth, _ = _distance(theirs, reference)
        if from_truth <= max(SLACK * eager_from_truth, allowed):
            return difference, relative
        allowed = max(SLACK * eager_from_truth, allowed)
        difference = from_truth
    raise TensorsDifferError(f" ({dtype}) is off by {difference:.3g}, allowed {allowed:.3g}")


def _compare_kind(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    for what in ("dtype", "shape", "device"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        if mine != other:
            raise TensorsDifferError(f" has {what} {mine}, in eager {other}")
    if ours.numel() and _strides(ours) != _strides(theirs):
        raise TensorsDifferError(f" has strides {ours.stride()}, in eager {theirs.stride()}")


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference and the largest value, NaN and infinities left out."""
    import torch

    wide = torch.complex128 if theirs.is_complex() else torch.float64
    ours, theirs = ours.to(wide), theirs.to(wide)
    finite = torch.isfinite(theirs)
    equal = (ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs))
    if not bool((finite | equal).all()) or not bool(torch.isfinite(ours)[finite].all()):
        raise TensorsDifferError(" has NaN or infinity at other places than eager")
    if not bool(finite.any()):
        return 0.0, 0.0
    difference = (ours - theirs)[finite].abs().max()
    return float(difference), float(theirs[finite].abs().max())


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides, also where elements share a place in memory."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.as_strided((size,), (1,), 0)
    return flat.clone().as_strided(tensor.shape, tensor.stride())


def _NARROW() -> tuple[torch.dtype, ...]:  # noqa: N802
    import torch

    return (torch.float16, torch.bfloat16)


def _strides(tensor: torch.Tensor) -> list[int]:
    return [step for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _shared_with(output: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[int]:
    if output.numel() == 0:
        return []
    where = output.untyped_storage().data_ptr()
    return [i for i, t in enumerate(inputs) if t.untyped_storage().data_ptr() == where]
