"""`precast warm`: make the calls that a service will make, so that it finds all compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import precast
from precast.cache.bundle_writing import keys_of
from precast.errors import ModelError
from precast.events import Event, TierFailed
from precast.trial.inputs import describe_call, make_calls
from precast.trial.model import Call, load_model
from precast.trial.outcome import (
    compile_model,
    count_pieces,
    failures,
    reasons_in,
    run_call,
    summarize,
)
from precast.trial.shapes import from_json


def warm(job: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compile what a model's calls need into the cache, or find it there.

    Args:
        job: `model`, `shapes`, `dtype`, `device`, `cache_dir`, `bundle` and `report` (files
            to write, or None), `generate` (tokens to generate with each call's input, or None).
        tell: Told of each call, as it is done.

    Raises:
        ModelError: The model cannot be loaded or called, or there is no cache to fill.
        PrecastError: The bundle or the report cannot be written.
    """
    loaded = load_model(job["model"], job["dtype"], job["device"])
    calls = make_calls(loaded, [from_json(specs) for specs in job["shapes"]])
    events: list[Event] = []
    tier_failures: dict[str, dict[str, Any]] = {}  # The first of each tier.

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, TierFailed):
            tier_failures.setdefault(event.tier, event.reason.as_dict())

    served = compile_model(loaded, job["cache_dir"], listen)
    if precast.status(served)["settings"]["disable_compile_cache"]["value"]:
        raise ModelError(
            "the setting disable_compile_cache leaves no cache to fill",
            "Take it away (PRECAST_DISABLE_COMPILE_CACHE)",
            is_usage=True,
        )
    rows = []
    started = time.perf_counter()
    for call in calls:
        events.clear()
        if job["generate"]:
            generate(served, call, job["generate"])
        else:
            run_call(served, call)
        row = {"call": describe_call(call), **summarize(events)}
        rows.append(row)
        tell(row)
    precast.wait(served)  # Shared tiers are written behind the calls.
    seconds = time.perf_counter() - started
    status = precast.status(served)
    reasons = reasons_in(status)
    bundle = None
    if job["bundle"] is not None:
        bundle = precast.save_bundle(served, job["bundle"])
    if job["report"] is not None:
        precast.save_report(served, job["report"])
    result = {
        "model": loaded.name,
        "calls": rows,
        "seconds": seconds,
        "num_kinds": sum(row["num_kinds"] for row in rows),
        "num_compiled": sum(row["num_compiled"] for row in rows),
        "num_from_cache": sum(row["num_from_cache"] for row in rows),
        "seconds_saved": sum(row["seconds_saved"] for row in rows),
        "is_warm": all(row["is_warm"] for row in rows if row["num_kinds"]),
        "places": count_pieces(status),
        "reasons": reasons,
        "has_failures": bool(failures(reasons)),
        "keys": keys_of(status),
        "tier_failures": list(tier_failures.values()),
        "cache_dir": status["cache_dir"],
        "bundle": bundle,
        "report": job["report"],
    }
    precast.release(served)
    return result


def generate(model: Any, call: Call, num_tokens: int) -> Any:
    """Generate greedily with a model of transformers, and a static cache if it names no other.

    Every step with a cache that grows would be another kind of call.

    Raises:
        ModelError: It has no `generate`, or that raised.
    """
    if not callable(getattr(model, "generate", None)):
        raise ModelError(
            f"{type(model).__name__} has no generate()", "Leave --generate out", is_usage=True
        )
    settings = {
        "max_new_tokens": num_tokens,
        "min_new_tokens": num_tokens,
        "do_sample": False,
        "cache_implementation": model.generation_config.cache_implementation or "static",
        "disable_compile": True,  # Else transformers compiles the model by itself.
    }

    class Generating(torch.nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return model.generate(*args, **settings, **kwargs)

    return run_call(Generating(), call)
