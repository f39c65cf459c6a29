"""How what was compiled behind a model comes to serve it: called by the thread of `progressive.py`.

Calls wait for the model's lock at times: it is held for moments only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from precast.behind import give_way
from precast.errors import Reason
from precast.runtime.collector import no_collection

if TYPE_CHECKING:
    from precast.assembly import Assembly, LoadedAssembly
    from precast.piece_result import PieceResult
    from precast.progressive import Request
    from precast.runtime.slot import SlotTable


def is_served(request: Request) -> bool:
    """Whether no compile is needed for a call like the one that asked.

    By what was loaded meanwhile, by what is stored, which is loaded now, or because enough is
    compiled already, what was compiled for such calls was wrong, or it would fail again.
    """
    if _is_covered(request):
        return True
    target = request.target
    key = target.assembly_key(request.signature)
    args, kwargs = _full_args(request), request.kwargs
    with request.ambient.around() as is_alike, no_collection():
        if is_alike and target.assemblies.load(
            key, target.function, args, kwargs, request.started, request.gpu
        ):
            return True
    with target.assemblies.lock:
        if target.is_full(request.signature):
            return True
    return target.is_known_to_fail(
        request.signature, key, request.function, request.args, request.kwargs
    )


def open_for(
    request: Request, assembly: Assembly, slots: SlotTable, gpu: int | None
) -> LoadedAssembly:
    """Return an assembly ready to serve the call that asked, on a GPU.

    Raises:
        CaptureError: Its contract does not hold for the model.
    """
    target = request.target
    key = target.assembly_key(request.signature)
    with no_collection():
        loaded = target.assemblies.open(key, assembly, slots, request.function, gpu)
    give_way()
    with request.ambient.around() as is_alike, no_collection():
        if is_alike:  # Else the next call binds it, in its own thread.
            target.assemblies.bind_new(loaded, request.function)
    return loaded


def admit(request: Request, loaded: LoadedAssembly) -> None:
    """Let an assembly serve from the next call on."""
    target = request.target
    with target.assemblies.lock:
        if target.function is request.function:  # Else it was replaced meanwhile.
            target.assemblies.add(loaded)


def replace(request: Request, loaded: LoadedAssembly, successor: LoadedAssembly) -> None:
    """Let another form of an assembly serve in its place; calls inside go on with the old."""
    assemblies = request.target.assemblies
    bound = successor.bound_as(loaded, request.function)
    if bound is not None:
        assemblies.tie(successor, bound, request.function)
    assemblies.replace(loaded, successor)


def complete(
    request: Request,
    loaded: LoadedAssembly,
    assembly: Assembly,
    results: Sequence[PieceResult],
) -> None:
    """Publish an assembly all of whose pieces have landed, unless it was thrown away."""
    target = request.target
    give_way()
    if loaded not in target.assemblies.loaded:
        return
    loaded.assembly = assembly
    key = target.assembly_key(request.signature)
    target.assemblies.rename(loaded, key)
    target.keep(loaded, key, request.signature)
    give_way()
    seconds = time.perf_counter() - request.started
    with target.assemblies.lock:
        if not _is_covered(request):
            reason = Reason(
                "outside-contract",
                "what was compiled does not serve the call that asked for it, which runs eager",
                "Nothing to do",
            )
            target.why_eager.give_up(request.signature, reason)
    target.assemblies.note_start(loaded, seconds, results)


def _is_covered(request: Request) -> bool:
    """Whether what is loaded by now serves a call like the one that asked."""
    args = _full_args(request)
    return any(
        loaded.why_not(args, request.kwargs) is None for loaded in request.target.assemblies.loaded
    )


def _full_args(request: Request) -> tuple[Any, ...]:
    owner = request.target.owner
    return request.args if owner is None else (owner, *request.args)
