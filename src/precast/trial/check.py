"""`precast check`: whether a model computes the same compiled, and what stays eager and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import precast
from precast.compilers.verify import TensorsDifferError, compare_tensors, copy_tensor
from precast.errors import ModelError
from precast.torch_private import find_graph_breaks
from precast.trial.inputs import describe_call, make_calls
from precast.trial.model import Call, failed, load_model
from precast.trial.outcome import compile_model, count_pieces, failures, reasons_in, run_call
from precast.trial.shapes import from_json

_DEEPEST = 8  # Of containers and objects within each other in what a model returns.


def check(job: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compare a model's calls, compiled and eager, at sizes where compiled code may go wrong.

    Args:
        job: `model`, `shapes`, `dtype`, `device`, `cache_dir`, `report` (a file to write, or None).
        tell: Told of each call, as it was compared.

    Raises:
        ModelError: The model cannot be loaded, copied or called.
        PrecastError: The report cannot be written.
    """
    loaded = load_model(job["model"], job["dtype"], job["device"])
    calls = make_calls(loaded, [from_json(specs) for specs in job["shapes"]], is_exhaustive=True)
    eager = _Eager(loaded.module)
    served = compile_model(loaded, job["cache_dir"], lambda event: None)
    rows = []
    for number, call in enumerate(calls):
        try:
            expected = eager.run(call)
        except ModelError:
            if number == 0:
                raise
            continue  # Varied sizes are a guess of ours.
        row = {"call": describe_call(call), **_compare(served, call, expected, eager)}
        rows.append(row)
        tell(row)
    status = precast.status(served)
    reasons = reasons_in(status)
    breaks = []
    if any(reason["code"] == "capture-failed" for reason in reasons):
        breaks = _find_breaks(eager, calls[0])
    if job["report"] is not None:
        precast.wait(served)
        precast.save_report(served, job["report"])
    precast.release(served)
    places = count_pieces(status)
    num_different = sum(row["problem"] is not None for row in rows)
    return {
        "model": loaded.name,
        "calls": rows,
        "num_different": num_different,
        "max_rel_error": max((row["max_rel_error"] or 0.0 for row in rows), default=0.0),
        "graph_breaks": breaks,
        "places": places,
        "reasons": reasons,
        "has_failures": bool(num_different or breaks or failures(reasons)),
        "cache_dir": status["cache_dir"],
        "report": job["report"],
    }


def eager_copy(module: Any) -> Any:
    """Return another module with the same weights, for Precast not to serve; a function as it is.

    Raises:
        ModelError: It cannot be copied.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    try:
        return copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
    except Exception as error:
        raise failed("the model cannot be copied", error, "Mend its __deepcopy__") from error


class _Eager:
    """The model as it is without Precast: another object with the same weights."""

    def __init__(self, module: Any) -> None:
        self.module = eager_copy(module)
        self._wide: Any = None

    def run(self, call: Call) -> tuple[Any, Call]:
        """Return what a call gives, and its arguments as they are afterwards."""
        return _run(self.module, call)

    def run_wide(self, call: Call) -> list[tuple[str, Any]]:
        """Return what a call gives in float64; nothing where the model insists on its dtypes."""
        try:
            if self._wide is None:
                is_module = isinstance(self.module, torch.nn.Module)
                self._wide = copy.deepcopy(self.module).double() if is_module else self.module
            return list(_leaves(_run(self._wide, _mapped(call, _widened))))
        except Exception:  # noqa: BLE001 - Mixed dtypes fail in many ways; then without it.
            return []


def _run(module: Any, call: Call) -> tuple[Any, Call]:
    """Call a model on copies of its arguments, with the random numbers of every other way."""
    fresh = _mapped(call, _fresh)
    torch.manual_seed(0)
    return run_call(module, fresh), fresh


def _compare(served: Any, call: Call, expected: tuple[Any, Call], eager: _Eager) -> dict[str, Any]:
    """Run a call compiled, and return how far from eager it is."""
    row: dict[str, Any] = {"max_abs_error": None, "max_rel_error": None, "problem": None}
    try:
        ours = list(_leaves(_run(served, call)))
    except ModelError as error:
        return {**row, "problem": f"compiled it fails: {error.problem}"}
    theirs = list(_leaves(expected))
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return {**row, "problem": "it returns another structure than eager"}
    worst_abs = worst_rel = 0.0
    wide: list[tuple[str, Any]] | None = None
    for place, ((name, mine), (_, other)) in enumerate(zip(ours, theirs, strict=True)):
        try:
            try:
                absolute, relative = _compare_leaf(mine, other, None)
            except TensorsDifferError:
                wide = eager.run_wide(call) if wide is None else wide
                reference = wide[place][1] if len(wide) == len(ours) else None
                absolute, relative = _compare_leaf(mine, other, reference)
        except TensorsDifferError as error:
            return {**row, "problem": f"{name}{error}"}
        worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
    return {**row, "max_abs_error": worst_abs, "max_rel_error": worst_rel}


def _compare_leaf(ours: Any, theirs: Any, reference: Any) -> tuple[float, float]:
    if type(ours) is not type(theirs):
        raise TensorsDifferError(f" is {type(ours).__name__}, in eager {type(theirs).__name__}")
    if isinstance(theirs, torch.Tensor):
        return compare_tensors(ours, theirs, reference)
    if repr(ours) != repr(theirs):  # As text, since NaN equals NaN here.
        raise TensorsDifferError(f" is {ours!r}, in eager {theirs!r}")
    return 0.0, 0.0


def _leaves(result: tuple[Any, Call]) -> Iterator[tuple[str, Any]]:
    """Iterate over the tensors and plain values in what a call returned and in its arguments."""
    output, call = result
    yield from _walk(output, "the output", _DEEPEST)
    for number, value in enumerate(call.args):
        yield from _walk(value, f"argument {number}", _DEEPEST)
    for name, value in call.kwargs.items():
        yield from _walk(value, f"argument {name}", _DEEPEST)


def _walk(value: Any, name: str, levels: int) -> Iterator[tuple[str, Any]]:
    if value is None or isinstance(value, torch.Tensor | bool | int | float | str):
        yield name, value
    elif levels:
        if isinstance(value, Mapping):
            inside = [(f"{name}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            inside = [(f"{name}[{number}]", item) for number, item in enumerate(value)]
        else:
            inside = [
                (f"{name}.{key}", item) for key, item in getattr(value, "__dict__", {}).items()
            ]
        for place, item in inside:
            yield from _walk(item, place, levels - 1)


def _mapped(call: Call, change: Callable[[Any], Any]) -> Call:
    return Call(
        tuple(change(value) for value in call.args),
        {name: change(value) for name, value in call.kwargs.items()},
    )


def _fresh(value: Any) -> Any:
    return copy_tensor(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    return value


def _find_breaks(eager: _Eager, call: Call) -> list[dict[str, Any]]:
    """Return where Dynamo cannot go on, each with the line of the model's code."""
    fresh = _mapped(call, _fresh)
    try:
        with torch.no_grad():
            found = find_graph_breaks(eager.module, fresh.args, fresh.kwargs)
    except Exception:  # noqa: BLE001 - Then the first one is known, from the reason.
        return []
    return [{"why": why, "location": where, "line": line} for why, where, line in found]
