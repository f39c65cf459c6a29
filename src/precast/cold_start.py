"""A cold start: a call is captured, its graph cut, and each piece found or compiled.

Imported only where nothing that is stored serves a call. What becomes of the result is the business
of `serving.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from precast.backend import blueprint_of, compile_traced, packing_rule
from precast.capture.dynamo import capture_call
from precast.capture.fingerprint import example_shapes
from precast.contract import Unrecordable
from precast.errors import CaptureError
from precast.events import CaptureFinished
from precast.runtime.gpu import gpu_of, on_gpu

if TYPE_CHECKING:
    import types

    from precast.blueprint import Blueprint
    from precast.piece_result import PieceResult
    from precast.session import Session


class MustTrace(Exception):  # noqa: N818 - a finding that is answered, not an error that is shown.
    """A call whose contract cannot be written as data; says what cannot."""


def capture_and_compile(
    function: types.FunctionType,
    owner: torch.nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    session: Session,
    started: float,
) -> tuple[Blueprint, list[PieceResult]]:
    """Capture a call and return its blueprint, and what became of each piece.

    Args:
        function: What is called.
        owner: The module that it is a method of; None for a function.
        args: The call's, without the owner.
        kwargs: The call's.
        session: Of the model.
        started: When the start began.

    Raises:
        MustTrace: Dynamo has to keep the guards.
        CaptureError: There is no graph.
    """
    with on_gpu(gpu_of(owner, args, kwargs)):
        session.manager.prestart()
    try:
        try:
            capture = capture_call(
                function,
                owner,
                args,
                kwargs,
                dynamic_shapes=session.config.dynamic_shapes,
                name=session.name,
            )
        except Unrecordable as finding:
            raise MustTrace(str(finding)) from finding
        if capture is None:
            raise CaptureError(session.name, "it computes nothing with tensors")
        session.emit(
            CaptureFinished(
                session.name,
                time.perf_counter() - started,
                len(capture.graph_module.graph.nodes),
                capture.num_guards,
            )
        )
        if capture.unrecordable is not None or capture.contract is None:
            raise MustTrace(str(capture.unrecordable))
        blueprint = blueprint_of(
            capture,
            session.config,
            session.emit,
            session.name,
            example_shapes(function, int(owner is not None), args, kwargs),
            session.passes,
            packing_rule(capture, function, owner, session.passes),
        )
        with on_gpu(blueprint.gpu):
            return blueprint, session.manager.compile(blueprint.pieces, blueprint.names)
    finally:
        session.manager.close()


def let_dynamo_trace(
    function: types.FunctionType, session: Session, on_failure: Callable[[Exception], None]
) -> Callable[..., Any]:
    """Return a function that Dynamo traces at every start; its pieces come from the cache.

    Args:
        function: What is called.
        session: Of the model.
        on_failure: Told of a call that raised, and that eager has answered.
    """

    def backend(graph_module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return compile_traced(graph_module, session)

    traced = torch.compile(function, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return traced(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - Dynamo's, a compiler's or the user's.
            # Dynamo raises before it runs anything, or what eager raises too.
            result = function(*args, **kwargs)
            on_failure(error)
            return result

    return run
