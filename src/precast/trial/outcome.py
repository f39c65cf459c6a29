"""What became of a model's pieces and calls, read out of events and `precast.status`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import precast
from precast.errors import ModelError
from precast.events import Event, ModelReady, PieceCompiled
from precast.trial.inputs import describe_call
from precast.trial.model import Call, LoadedModel, failed

#: Reasons that are decisions, not failures: what is slower compiled had better run eager.
DECISIONS = ("not-worth-it",)


def compile_model(
    loaded: LoadedModel, cache_dir: str | None, listener: Callable[[Event], None], **settings: Any
) -> Any:
    """Let Precast serve a model as its service would, but compile at once and look no second time.

    Raises:
        ModelError: Settings switch Precast, or its cache, off.
        ConfigError: A setting is not usable.
    """
    if cache_dir is not None:
        settings["cache_dir"] = cache_dir
    served = precast.compile(
        loaded.module,
        listeners=[listener],
        **{"mode": "blocking", "on_error": "eager", "revalidate": "never", **settings},
    )
    status = precast.status(served)
    if any(reason["code"] == "disabled" for reason in status["reasons"]):
        raise ModelError("PRECAST_DISABLE is set", "Take the variable away", is_usage=True)
    if status["settings"]["compilation_level"]["value"] == "none":
        raise ModelError(
            "the setting compilation_level is 'none', so that nothing is compiled",
            "Write 'piecewise' or 'full'",
            is_usage=True,
        )
    return served


def run_call(module: Any, call: Call) -> Any:
    """Call a model without gradients.

    Raises:
        ModelError: It raised; eager would have as well.
    """
    try:
        with torch.inference_mode():
            return module(*call.args, **call.kwargs)
    except Exception as error:
        raise failed(
            f"the call ({describe_call(call)}) failed",
            error,
            "Give other --shapes, with dtypes where they matter: tokens=1x128:int64",
        ) from error


def summarize(events: Sequence[Event]) -> dict[str, Any]:
    """Return what the events of one call come to."""
    ready = [event for event in events if isinstance(event, ModelReady)]
    return {
        "num_kinds": len(ready),
        "num_pieces": sum(event.pieces for event in ready),
        "num_unique": sum(event.unique_pieces for event in ready),
        "num_compiled": sum(isinstance(event, PieceCompiled) for event in events),
        "num_from_cache": sum(event.from_cache for event in ready),
        "seconds": sum(event.seconds for event in ready),
        "seconds_saved": sum(event.seconds_saved for event in ready),
        "is_warm": bool(ready) and all(event.warm for event in ready),
    }


def reasons_in(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return why something runs eager, each reason once: of the model, its pieces, its blocks.

    `where` names the piece or block; a reason that is in several is counted, as `count`.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(reason: Mapping[str, Any], where: str) -> None:
        known = found.setdefault(
            (reason["code"], reason["message"]), {**reason, "where": where, "count": 0}
        )
        known["count"] += 1

    def walk(status: Mapping[str, Any]) -> None:
        for reason in status["reasons"]:
            add(reason, status["model"])
        for assembly in status["assemblies"]:
            for piece in assembly["pieces"]:
                if piece["reason"] is not None:
                    add(piece["reason"], piece["name"])
        for block in status.get("blocks", ()):
            walk(block)

    walk(status)
    return list(found.values())


def failures(reasons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the reasons that are no decisions of Precast's own."""
    return [reason for reason in reasons if reason["code"] not in DECISIONS]


def count_pieces(status: Mapping[str, Any]) -> dict[str, int]:
    """Return how many places run compiled and how many eager, blocks included."""
    pieces = [piece for assembly in status["assemblies"] for piece in assembly["pieces"]]
    counts = {
        "compiled": sum(piece["compiler"] != "eager" for piece in pieces),
        "eager": sum(piece["compiler"] == "eager" for piece in pieces),
    }
    for block in status.get("blocks", ()):
        for name, number in count_pieces(block).items():
            counts[name] += number
    return counts
