"""A compiled model in full, for a report: its pieces with texts, keys, figures and sources.

`describe.py` says how a model is doing; here is what stands behind that, as far as the cache has
it. Costs milliseconds to read, and nothing before somebody asks.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from precast.assembly import LoadedAssembly
from precast.compilers.sources import unpack
from precast.describe import describe
from precast.events import AssemblyMissed, PieceMissed
from precast.monitoring.recording import torch_version
from precast.monitoring.system import used_gpu_torch
from precast.session import explain_from

if TYPE_CHECKING:
    from precast.serving import CompiledModel
    from precast.session import Session

_EXPLAIN_BUDGET_S = 0.2
_MOST_MISSES = 32


def portray(compiled: CompiledModel) -> dict[str, Any]:
    """Return a compiled model as plain data: what `status` says, and what its pieces are.

    `pieces` has each different piece of the model and its blocks once, by its key; `assemblies`
    say which of them each slot runs.
    """
    pieces: dict[str, dict[str, Any]] = {}
    return {
        **_portray(compiled, pieces),
        "pieces": pieces,
        "misses": _misses(compiled.session),
        "torch": torch_version(),
        "device": _device_memory(),
    }


def portrait_later(compiled: CompiledModel) -> Callable[[], dict[str, Any] | None]:
    """Return a function that portrays a model, and gives None when it is gone or serves nothing."""
    reference = weakref.ref(compiled)

    def portray_now() -> dict[str, Any] | None:
        found = reference()
        if found is None:
            return None
        if not (found.dispatcher.loaded or found.blocks or found.why_eager.reasons):
            return None
        return portray(found)

    return portray_now


def _portray(compiled: CompiledModel, pieces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    status = describe(compiled)
    by_key = {row["key"]: row for row in status["assemblies"]}
    return {
        **status,
        "weights": _weights(compiled.owner),
        "assemblies": [
            _portray_assembly(compiled.session, loaded, by_key[loaded.key], pieces)
            for loaded in compiled.dispatcher.loaded
            if isinstance(loaded, LoadedAssembly) and loaded.key in by_key
        ],
        "blocks": [_portray(block, pieces) for block in compiled.blocks],
    }


def _portray_assembly(
    session: Session,
    loaded: LoadedAssembly,
    status: Mapping[str, Any],
    pieces: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    assembly = loaded.assembly
    rows = iter(status["pieces"])
    slots = []
    for place, (number, _) in enumerate(assembly.slots):
        if number is None:
            continue
        record = assembly.pieces[number]
        identity = _identity(record, f"{loaded.key}/{number}")
        slot = dict(next(rows))
        # What is alike in all slots of a piece is told with the piece.
        figures = {name: slot.pop(name) for name in ("timing", "passes")}
        if identity not in pieces:
            pieces[identity] = {**_portray_piece(session, record), **figures}
        slots.append(
            {**slot, "place": place, "piece": identity, "num_weights": len(assembly.groups[place])}
        )
    digest = loaded.key.partition("-")[0]
    return {
        **{name: value for name, value in status.items() if name != "pieces"},
        "slots": slots,
        "parts": session.find_key_parts(digest),
        "native": list(assembly.execution.get("targets", ())),
        "example": [list(shape) for shape in assembly.example],
    }


def _identity(record: Mapping[str, Any] | None, otherwise: str) -> str:
    """Return a name that equal pieces share."""
    if record is None:
        return otherwise  # Nothing of it is kept.
    if "eager" in record:
        return hashlib.sha256(record["eager"]["text"].encode()).hexdigest()
    return str(record["key"])


def _portray_piece(session: Session, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is known of a piece: from its record, and from what was published with it."""
    if record is None:
        return {"text": None}
    if "eager" in record:
        return {"text": record["eager"]["text"]}
    payload = session.loader.peek(record["key"]) or {}
    details = record["details"]
    return {
        "text": (payload.get("piece") or {}).get("text"),
        "key": record["key"],
        "seconds": record.get("seconds"),
        "artifact_bytes": sum(payload.get("sizes", {}).values()),
        "ranges": details.get("ranges", {}),
        "num_parts": details.get("num_parts", 1),
        "parts": payload.get("parts"),
        "verification": payload.get("verification"),
        "source": unpack(payload.get("source")),
    }


def _misses(session: Session) -> list[dict[str, Any]]:
    """Return what was looked for in vain, each with its cause."""
    found: dict[str, dict[str, Any]] = {}
    for _, event in session.recorder.events():
        match event:
            case PieceMissed():
                miss = {"kind": "piece", "name": event.piece, "problem": None}
            case AssemblyMissed():
                miss = {"kind": "assembly", "name": event.model, "problem": event.problem}
            case _:
                continue
        found[event.key] = {**miss, "key": event.key, "parts": event.parts}
    misses = list(found.values())[:_MOST_MISSES]
    if misses and not session.config.disable_compile_cache:
        explain_from(session.config.cache_path(), misses, _EXPLAIN_BUDGET_S)
    return [{name: value for name, value in miss.items() if name != "parts"} for miss in misses]


def _weights(owner: Any) -> dict[str, Any] | None:
    """Return how many weights a module has, and their bytes; tensors shared count once."""
    if owner is None:
        return None
    tensors = {id(tensor): tensor for tensor in (*owner.parameters(), *owner.buffers())}
    return {
        "num_tensors": len(tensors),
        "num_elements": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }


def _device_memory() -> dict[str, Any] | None:
    """Return what this process holds of a GPU, None where it uses none."""
    torch = used_gpu_torch()
    if torch is None:
        return None
    return {
        "name": torch.cuda.get_device_name(),
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "most_reserved_bytes": torch.cuda.max_memory_reserved(),
    }
