"""What is told of a compiled model: its state as plain data, and the events of a start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from precast.assembly import LoadedAssembly
from precast.errors import Reason
from precast.events import ArtifactRefused, AssemblyLoaded

if TYPE_CHECKING:
    from precast.piece_result import PieceResult
    from precast.serving import CompiledModel
    from precast.session import Session


def describe(compiled: CompiledModel) -> dict[str, Any]:
    """Return what runs compiled, from where, why not, and what it saved; as plain data."""
    return {
        "model": compiled.session.name,
        "is_disabled": compiled.session.is_disabled,
        "is_warm": compiled.assemblies.is_warm,
        "start_seconds": compiled.assemblies.start_seconds,
        "settings": {
            name: {"value": value, "from": compiled.session.origins.get(name, "default")}
            for name, value in compiled.session.config.shown().items()
        },
        "cache_dir": str(compiled.session.config.cache_path()),
        "assemblies": [
            {
                "key": loaded.key,
                "compile_seconds": loaded.assembly.seconds,
                "unique_pieces": len(loaded.assembly.pieces),
                "conditions": loaded.assembly.call_check["conditions"][1:],
                "execution_code": loaded.assembly.execution["source"],
                "passes": list(loaded.assembly.passes),
                "pieces": [
                    {
                        "name": slot.piece,
                        "compiler": slot.compiler,
                        "from": slot.tier or "compiled here",
                        "seconds_saved": slot.seconds_saved,
                        "passes": list(slot.passes),
                        "timing": slot.timing,
                        "reason": None if slot.reason is None else slot.reason.as_dict(),
                    }
                    for slot in loaded.slots.slots
                    if slot is not None
                ],
            }
            for loaded in compiled.dispatcher.loaded
            if isinstance(loaded, LoadedAssembly)
        ],
        "reasons": [reason.as_dict() for reason in compiled.why_eager.reasons],
        "refused": [reason.as_dict() for reason in refusals(compiled.session)],
        "behind": compiled.behind(),
        "not_sampled": compiled.assemblies.not_sampled,
        "not_revalidated": compiled.assemblies.second_look.why_not,
        "blocks": [describe(block) for block in compiled.blocks],
    }


def refusals(session: Session) -> list[Reason]:
    """Return why artifacts were left alone that nobody trusted vouches for, each reason once."""
    found = {
        (event.reason.code, event.reason.message): event.reason
        for _, event in session.recorder.events()
        if isinstance(event, ArtifactRefused)
    }
    return list(found.values())


def emit_start(
    session: Session,
    loaded: LoadedAssembly,
    seconds: float,
    results: Sequence[PieceResult] | None,
) -> None:
    """Tell that an assembly serves calls now.

    Args:
        session: Whose listeners are told.
        loaded: The assembly.
        seconds: How long its start took.
        results: What became of its pieces; None: it was loaded, the start was warm.
    """
    is_warm = results is None
    num_unique = len(loaded.assembly.pieces)
    found = [result for result in (results or ()) if result.from_cache]
    ready = loaded.slots.ready(
        session.name,
        seconds,
        unique_pieces=num_unique,
        from_cache=num_unique if is_warm else len(found),
        seconds_saved=loaded.assembly.seconds if is_warm else sum(r.seconds for r in found),
        warm=is_warm,
    )
    if is_warm:
        session.emit(
            AssemblyLoaded(
                session.name, loaded.key, seconds, ready.pieces, num_unique, ready.seconds_saved
            )
        )
    session.emit(ready)
