"""Capturing a model in a child process, which `child.py` starts.

The serving process sends the model's skeleton (`skeleton.py`) and a call of it; the child, of low
priority, traces and cuts the model and answers plain data: the `Blueprint` of it, or for a second
look the digests of its pieces' texts. So no serving process traces or imports a tracer. The child
neither reads nor writes a cache and compiles nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from precast import errors
from precast.background.child import start_child
from precast.background.limits import NICE_BESIDE_CALLS
from precast.background.skeleton import CannotSendError, dump, load
from precast.background.usage import UsageMeter
from precast.errors import (
    CaptureAbortedError,
    CaptureCrashedError,
    CaptureError,
    CompileMemoryError,
    CompileTimeoutError,
    PrecastError,
    Reason,
)
from precast.runtime.collector import no_collection
from precast.values import Value

if TYPE_CHECKING:
    from precast.background.ambient import Ambient
    from precast.blueprint import Blueprint
    from precast.config import CompilationConfig
    from precast.passes.chosen import ChosenPasses

_POLL_S = 0.1
# At least, from the child's start on: a low limit is meant for compilers, and a busy machine may
# take as long to import torch and the user's modules.
_LEAST_S = 60.0
_STDERR_BYTES = 2000


class CalledOffError(Exception):
    """Nobody wants the answer any more."""


class UnrecordableError(Exception):
    """A guard has no form as data; says which."""


class Captured(Value, kw_only=True):
    """A blueprint, and what fell back while it was drawn: [piece, reason]."""

    blueprint: Blueprint
    fell_back: list[tuple[str, Reason]]


def dump_call(args: Any, kwargs: Any) -> bytes:
    """Return a call's arguments as bytes, its tensors without data.

    Raises:
        CannotSendError: Something in them lives in this process only.
    """
    return dump((args, kwargs))


def dump_model(function: Any, owner: Any) -> bytes:
    """Return a model as bytes, its tensors without data.

    Args:
        function: What is served, unbound.
        owner: The module that it is a method of; None for a function.

    Raises:
        CannotSendError: Something in it lives in this process only.
    """
    is_method = getattr(type(owner), "forward", None) is function
    return dump((None if is_method else function, owner))


class CaptureChild:
    """Asks child processes, one at a time; `end` may be called from any thread, at any time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_ended = False

    def texts(
        self,
        model: bytes,
        call: bytes,
        config: CompilationConfig,
        passes: ChosenPasses,
        packs: Sequence[Sequence[int]],
        ambient: Ambient,
    ) -> Any:
        """Return the digests of the pieces' texts, as an assembly keeps them, and the contract.

        Args:
            model: From `dump_model`.
            call: From `dump_call`.
            config: Of the model.
            passes: Of the model.
            packs: Of the assembly.
            ambient: Of the call.

        Raises:
            CannotSendError, PrecastError, CalledOffError: As `blueprint`.
        """
        name = "second look"
        answer = self._ask("texts", model, call, config, passes, packs, ambient, name)
        found = _understood(json.loads(answer), name)
        return set(found["texts"]), found["contract"]

    def blueprint(
        self,
        model: bytes,
        call: bytes,
        config: CompilationConfig,
        passes: ChosenPasses,
        ambient: Ambient,
        name: str,
    ) -> Captured:
        """Return a call captured, cut and written.

        Raises:
            CannotSendError: The child cannot read it: a module is not importable there, say.
            UnrecordableError: Each start would have to trace it.
            PrecastError: It cannot be captured or cut, or takes more time or memory than it may.
            CalledOffError: `end` was called.
        """
        from precast.blueprint import Blueprint

        answer = self._ask("blueprint", model, call, config, passes, (), ambient, name)
        with no_collection():
            found = _understood(json.loads(answer), name)
            return Captured(
                blueprint=Blueprint.from_json(found["blueprint"]),
                fell_back=[(piece, Reason(**reason)) for piece, reason in found["fell_back"]],
            )

    def end(self) -> None:
        """Kill the child, if there is one, and start no other."""
        with self._lock:
            self._is_ended = True
            if self._process is not None:
                _kill(self._process)

    def _ask(
        self,
        task: str,
        model: bytes,
        call: bytes,
        config: CompilationConfig,
        passes: ChosenPasses,
        packs: Sequence[Sequence[int]],
        ambient: Ambient,
        name: str,
    ) -> bytes:
        # A compiler or a pass is an object of the user's at times, and not the child's business:
        # passes for whole graphs are Precast's own.
        config = config.replace(compiler="eager", passes=passes.names_on_whole_graph)
        packs = [list(group) for group in packs]
        request = pickle.dumps((task, model, call, dump(config), packs, ambient, name))
        with tempfile.TemporaryFile() as stderr:
            with self._lock:
                if self._is_ended:
                    raise CalledOffError
                self._process = process = _start(stderr)
            try:
                answer = _receive(process, request, name, config)
            finally:
                _kill(process)
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
            if self._is_ended:
                raise CalledOffError
            if not answer:
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
                said = stderr.read().decode(errors="replace").strip()[-300:]
                raise CaptureCrashedError(
                    name, f"the process that traces it ended with {process.returncode}: {said}"
                )
        return answer


def _receive(
    process: subprocess.Popen[bytes], request: bytes, name: str, config: CompilationConfig
) -> bytes:
    """Send the request and return the answer, b"" where the child ended without one.

    Raises:
        CompileTimeoutError, CompileMemoryError: It takes more than a worker may, of either.
    """
    limit_s, limit_bytes = max(config.max_compile_time, _LEAST_S), config.max_compile_memory
    deadline = time.monotonic() + limit_s
    meter = None if limit_bytes is None else UsageMeter(process.pid, limit_bytes)
    data: bytes | None = request
    while True:
        try:
            return process.communicate(data, timeout=_POLL_S)[0]
        except subprocess.TimeoutExpired:
            data = None  # It is on its way already.
        if time.monotonic() > deadline:
            raise CompileTimeoutError(name, "capture", limit_s)
        if meter is not None and limit_bytes is not None and (meter.look() or 0) > limit_bytes:
            raise CompileMemoryError(name, "capture", limit_bytes, meter.peak_bytes)


def _start(stderr: Any) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PRECAST_DISABLE": "1",  # Decorators in the user's modules: the child serves nothing.
    }
    return start_child("precast.background.capture", NICE_BESIDE_CALLS, environment, stderr)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _understood(answer: dict[str, Any], name: str) -> dict[str, Any]:
    match answer:
        case {"cannot_send": problem}:
            raise CannotSendError(problem)
        case {"unrecordable": problem}:
            raise UnrecordableError(problem)
        case {"error": [kind, args]}:
            raise getattr(errors, kind)(*args)
        case {"failed": problem}:
            raise CaptureAbortedError(name, problem)
    return answer


# ---------------------------------------------------------------------------
# What the child does, and a process that has to do it itself


def draw_call(
    function: Any,
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: CompilationConfig,
    passes: ChosenPasses,
    name: str,
    alone: contextlib.AbstractContextManager[object] | None = None,
) -> Captured:
    """Capture one call in this process, and cut and write it.

    Args:
        function: To trace, unbound.
        owner: The module that it is a method of; None for a function.
        args: The call's, without the owner; tensors need no data.
        kwargs: The call's.
        config: Of the model.
        passes: Of the model. None packs weights: the tensors may be hollow.
        name: Of the model.
        alone: Entered while it is traced.

    Raises:
        UnrecordableError: Each start would have to trace it.
        PrecastError: It cannot be captured or cut.
    """
    from precast.backend import blueprint_of
    from precast.capture.dynamo import capture_call
    from precast.capture.fingerprint import example_shapes
    from precast.contract import Unrecordable
    from precast.drawing import pack_nothing
    from precast.events import Event, FellBack

    events: list[Event] = []
    try:
        with alone or contextlib.nullcontext():
            capture = capture_call(
                function, owner, args, kwargs, dynamic_shapes=config.dynamic_shapes, name=name
            )
    except Unrecordable as finding:
        raise UnrecordableError(str(finding)) from finding
    if capture is None:
        raise CaptureError(name, "it computes nothing with tensors")
    if capture.contract is None:
        raise UnrecordableError(str(capture.unrecordable))
    example = example_shapes(function, int(owner is not None), args, kwargs)
    blueprint = blueprint_of(capture, config, events.append, name, example, passes, pack_nothing)
    fell_back = [
        (event.piece or "", event.reason) for event in events if isinstance(event, FellBack)
    ]
    return Captured(blueprint=blueprint, fell_back=fell_back)


def texts_of_call(
    function: Any,
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: CompilationConfig,
    passes: ChosenPasses,
    packs: Sequence[Sequence[int]],
) -> tuple[list[str], dict[str, Any] | None]:
    """Return the digests of the pieces' texts of a call, as an assembly keeps them.

    And the contract as JSON data, where it can be written.

    Raises:
        PrecastError: It cannot be captured or cut.
    """
    from precast.backend import digests_of_texts
    from precast.capture.dynamo import capture_call

    capture = capture_call(
        function, owner, args, kwargs, dynamic_shapes=config.dynamic_shapes, name="second look"
    )
    if capture is None:
        return [], None
    contract = None if capture.contract is None else capture.contract.to_json()
    return digests_of_texts(capture, config, passes, packs), contract


def answer_request(data: bytes) -> dict[str, Any]:
    """Do what the parent asks; returns the answer as JSON data."""
    task, model, call, sent_config, packs, ambient, name = pickle.loads(
        data
    )  # The parent's own bytes.
    from precast.passes.chosen import choose

    try:
        ambient.set_in_process()
        config = load(sent_config)
        passes = choose(config.passes)
        function, owner = load(model)
        args, kwargs = load(call)
    except Exception as error:  # noqa: BLE001 - modules of the user's are imported.
        return {"cannot_send": f"a child process cannot read it: {type(error).__name__}: {error}"}
    function = function or type(owner).forward
    try:
        with ambient.around() as is_alike:
            if not is_alike:
                return {"cannot_send": "it is called in a state that no other process can take on"}
            if task == "texts":
                texts, contract = texts_of_call(
                    function, owner, args, kwargs, config, passes, packs
                )
                return {"texts": texts, "contract": contract}
            captured = draw_call(function, owner, args, kwargs, config, passes, name)
    except UnrecordableError as finding:
        return {"unrecordable": str(finding)}
    except PrecastError as error:
        return {"error": [type(error).__name__, error.args]}
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told.
        return {"failed": f"{type(error).__name__}: {error}"}
    return {
        "blueprint": captured.blueprint.to_json(),
        "fell_back": [[piece, reason.as_dict()] for piece, reason in captured.fell_back],
    }


def main() -> None:
    """Read one request, answer it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What the user's modules print is no answer.
    with answers:
        answers.write(json.dumps(answer_request(sys.stdin.buffer.read())))
