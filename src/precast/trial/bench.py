"""`precast bench`: what one start and what calls take, in a process that measures nothing else.

A *start* goes from "model and inputs are ready" to the first output, less one call measured later
in the same process. torch and Precast are imported before the clock runs; what they import while it
runs counts. For torch.compile the import of Dynamo and Inductor is timed apart and left out of
`start_s`, to its advantage.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import precast
from precast.trial.check import eager_copy
from precast.trial.inputs import describe_call, make_calls
from precast.trial.memory import peak_memory_mb
from precast.trial.model import Call, LoadedModel, load_model
from precast.trial.outcome import compile_model, failures, reasons_in, run_call
from precast.trial.shapes import from_json

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 1000


def measure_start(job: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Start a model one way and return what that took.

    Args:
        job: `model`, `shapes`, `dtype`, `device`, `cache_dir`, and `way`: `eager`, `precast` or
            `compile` (torch.compile).
        tell: Not needed: there is one step.

    Raises:
        ModelError: The model cannot be loaded or called.
    """
    loaded, calls = _load(job)
    call, module, way = calls[0], loaded.module, job["way"]
    synchronize = _synchronizer(loaded)
    _wake(loaded)
    gc.collect()  # What building the model owes the collector is not the start's to pay.
    synchronize()
    started = time.perf_counter()
    served, imports_s = module, 0.0
    if way == "compile":
        import torch._dynamo
        import torch._inductor.compile_fx

        imports_s = time.perf_counter() - started
        served = torch.compile(module)
    elif way == "precast":
        served = compile_model(loaded, job["cache_dir"], lambda event: None)
    run_call(served, call)
    synchronize()
    first_output_s = time.perf_counter() - started
    peak_mb = peak_memory_mb()
    call_s = statistics.median(_seconds(served, call, synchronize, 15))
    result: dict[str, Any] = {
        "way": way,
        "call": describe_call(call),
        "start_s": max(0.0, first_output_s - imports_s - call_s),
        "imports_s": imports_s,
        "first_output_s": first_output_s,
        "call_s": call_s,
        "peak_memory_mb": peak_mb,
        **_machine(loaded),
    }
    if way == "precast":
        status = precast.status(served)
        reasons = reasons_in(status)
        result |= {
            "is_warm": status["is_warm"],
            "reasons": reasons,
            "has_failures": bool(failures(reasons)),
        }
        precast.release(served)
    return result


def measure_calls(job: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time calls each way in turn, so that a busy moment of the machine hits all of them.

    Args:
        job: As for `measure_start`, with `ways`, a list, and `seconds` for each kind of input.
        tell: Told of each input, as it was measured.

    Raises:
        ModelError: The model cannot be loaded or called.
    """
    loaded, calls = _load(job)
    synchronize = _synchronizer(loaded)
    eager = eager_copy(loaded.module)
    ways: dict[str, Any] = {"eager": eager}
    if "compile" in job["ways"]:
        ways["compile"] = torch.compile(eager_copy(loaded.module))
    ways["precast"] = compile_model(loaded, job["cache_dir"], lambda event: None)
    rows = []
    for call in calls:
        for served in ways.values():
            for _ in range(3):
                run_call(served, call)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        ends_s = time.perf_counter() + job["seconds"]
        while len(seconds["eager"]) < _LEAST_ROUNDS or (
            time.perf_counter() < ends_s and len(seconds["eager"]) < _MOST_ROUNDS
        ):
            for way, served in ways.items():
                seconds[way] += _seconds(served, call, synchronize, 1)
        row = {
            "call": describe_call(call),
            "num_rounds": len(seconds["eager"]),
            "ways": {
                way: {
                    "median_s": statistics.median(times),
                    "spread": _spread(times),
                    "against_eager": statistics.median(
                        theirs / ours for ours, theirs in zip(times, seconds["eager"], strict=True)
                    ),
                }
                for way, times in seconds.items()
            },
        }
        rows.append(row)
        tell(row)
    reasons = reasons_in(precast.status(ways["precast"]))
    precast.release(ways["precast"])
    return {
        "calls": rows,
        "reasons": reasons,
        "has_failures": bool(failures(reasons)),
        **_machine(loaded),
    }


def _load(job: Mapping[str, Any]) -> tuple[LoadedModel, list[Call]]:
    loaded = load_model(job["model"], job["dtype"], job["device"])
    calls = make_calls(loaded, [from_json(specs) for specs in job["shapes"]])
    return loaded, calls


def _machine(loaded: LoadedModel) -> dict[str, Any]:
    device = _device(loaded)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}


def _device(loaded: LoadedModel) -> torch.device:
    module = loaded.module
    if isinstance(module, torch.nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _synchronizer(loaded: LoadedModel) -> Callable[[], None]:
    device = _device(loaded)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


def _wake(loaded: LoadedModel) -> None:
    """Let the device's libraries load, as they would for whatever a process does first."""
    small = torch.ones(8, 8, device=_device(loaded))
    (small @ small).sum().item()


def _seconds(served: Any, call: Call, synchronize: Callable[[], None], number: int) -> list[float]:
    found = []
    with torch.inference_mode():
        for _ in range(number):
            begun = time.perf_counter()
            served(*call.args, **call.kwargs)
            synchronize()
            found.append(time.perf_counter() - begun)
    return found


def _spread(times: list[float]) -> float:
    """Return within what share of their median the middle half of some figures lies."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle if middle else 0.0
