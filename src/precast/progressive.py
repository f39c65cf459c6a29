"""Compiling behind a model that serves: calls run eager meanwhile, and pieces are swapped in.

One `BackgroundCompiler` serves one model with all its blocks. Its thread has a call captured (in a
child process; in this one, between two calls, only where the model cannot be sent, or is not the
same there), and the pieces compiled in workers. It never traces while a call runs, and never
compiles. How an assembly grows is `growth.py`'s business, how it comes to serve `handover.py`'s,
when a call is worth compiling `serving.py`'s.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from precast import handover
from precast.background.ambient import Ambient
from precast.background.capture import (
    CalledOffError,
    CaptureChild,
    UnrecordableError,
    draw_call,
    dump_call,
    dump_model,
)
from precast.background.skeleton import CannotSendError, hollow
from precast.behind import NAME, give_way, work_behind
from precast.binding import bind, what_differs
from precast.breakable import Breakable, EndingThread
from precast.contract import Contract
from precast.errors import (
    CaptureError,
    PrecastError,
    Reason,
    TracedCodeRaisedError,
    as_capture_error,
)
from precast.events import CaptureFinished, FellBack, PlanMade
from precast.growth import Growth
from precast.runtime.collector import no_collection
from precast.runtime.gate import CallGate, HeldUp
from precast.runtime.gpu import gpu_of, on_gpu

if TYPE_CHECKING:
    from precast.background.capture import Captured
    from precast.blueprint import Blueprint
    from precast.serving import CompiledModel

# How long is waited for the thread: at exit, where it was broken off, and when a model is released.
# Calls after that would meet a trace, so its end is waited for.
_EXIT_S = 0.8
_RELEASE_S = 2.0
_RELEASE_TRACING_S = 60.0

_DEFINE = "Define the model in a module of its own, to have a child process do it"
_SET_STATE = (
    "Have what it reads (module globals, registries, operators) set where its module is imported, "
    "to have a child process do it"
)


class Request:
    """One kind of call to be compiled: what is needed to make it again, without its data.

    It does not keep the model: one that nobody uses any more is not compiled either.
    """

    def __init__(
        self,
        target: CompiledModel,
        signature: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Take the call as it is before it runs. `args` are without the owner."""
        self.session = target.session
        self._target = weakref.ref(target)
        self.signature = signature
        self.function = target.function
        self.gpu = gpu_of(target.owner, args, kwargs)
        self.ambient = Ambient.now(is_on_gpu=self.gpu is not None)
        self.started = time.perf_counter()
        self.args, self.kwargs = hollow_call(args, kwargs)
        self.call: bytes | None = None
        self.why_not_sent = ""
        try:
            self.call = dump_call(args, kwargs)
        except CannotSendError as problem:
            self.why_not_sent = str(problem)

    @property
    def target(self) -> CompiledModel:
        """Whose call it is.

        Raises:
            CalledOffError: The model is gone.
        """
        target = self._target()
        if target is None:
            raise CalledOffError
        return target


def hollow_call(args: Any, kwargs: Any) -> Any:
    """Return a call's arguments with its tensors, in plain containers, without their data."""
    import torch

    known: dict[int, Any] = {}

    def replace(value: Any) -> Any:
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided:
            # One object at two places stays one.
            return known.setdefault(id(value), hollow(value))
        if type(value) in (tuple, list):
            return type(value)(map(replace, value))
        if type(value) is dict:
            return {key: replace(item) for key, item in value.items()}
        return value

    return replace((args, kwargs))


class BackgroundCompiler:
    """Compiles requests one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self.gate = CallGate()
        self._state = state = _State()
        # Started here, and not by the first call, which is to be answered at once.
        state.thread = EndingThread(_serve, state, self.gate, name=NAME, end=state.end_at_exit)
        state.thread.start()
        self._let_go = weakref.finalize(self, state.call_off)  # Holds no reference to us.
        self._let_go.atexit = False

    def submit(self, request: Request) -> None:
        """Queue a request."""
        state = self._state
        with state.condition:
            if state.is_ended:
                return
            state.waiting.append(request)
            state.condition.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Return when nothing is left to do; False where `timeout` seconds ran out."""
        state = self._state
        with state.condition:
            return state.condition.wait_for(
                lambda: not state.waiting and state.current is None, timeout
            )

    def close(self) -> None:
        """End everything at once; nothing is installed any more."""
        self._let_go.detach()
        self._state.end(_RELEASE_S, _RELEASE_TRACING_S)

    def forget(self) -> None:
        """Let go of everything without ending it: for a fork, which has no claim to it."""
        self._let_go.detach()

    def describe(self) -> dict[str, Any]:
        """Return what is going on, as plain data."""
        state = self._state
        with state.condition:
            return {"doing": state.doing, "waiting": len(state.waiting)}


class _State:
    """What the thread and its owner share."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiting: deque[Request] = deque()
        self.thread: threading.Thread | None = None
        self.current: Request | None = None
        self.child: CaptureChild | None = None
        self.doing: str | None = None
        self.tracing = Breakable()  # In this process.
        self.is_ended = False
        self.pid = os.getpid()

    def call_off(self) -> None:
        """Let the thread end as soon as it can; wait for nobody. For the garbage collector, too."""
        if os.getpid() != self.pid:
            return  # A fork: the thread is its parent's, and holds the lock perhaps.
        with self.condition:
            self.is_ended = True
            self.waiting.clear()
            self.condition.notify_all()

    def end(self, patience_s: float, patience_tracing_s: float) -> None:
        """End child, workers and thread; return when they are gone, or patience is at its end."""
        if os.getpid() != self.pid:
            return  # They are its parent's.
        self.call_off()
        with self.condition:
            thread, current, child = self.thread, self.current, self.child
        started = time.monotonic()
        if child is not None:
            child.end()
        while thread is not None and thread is not threading.current_thread():
            if current is not None:
                # Again and again: the thread may be about to start workers.
                current.session.manager.close()
            thread.join(0.05)
            limit_s = patience_tracing_s if self.tracing.is_inside else patience_s
            if not thread.is_alive() or time.monotonic() > started + limit_s:
                return
            with self.condition:
                current = self.current

    def end_at_exit(self, patience_s: float) -> None:
        """End them before the interpreter ends the thread, wherever that is."""
        if os.getpid() == self.pid:
            self.call_off()
            self.tracing.break_off(patience_s)
            self.end(_EXIT_S, _EXIT_S)


def _serve(state: _State, gate: CallGate) -> None:
    work_behind()
    while request := _next_request(state):
        assert state.child is not None
        _serve_one(state, gate, request, state.child)
        del request


def _next_request(state: _State) -> Request | None:
    """Wait for a request; None: this is the end."""
    while True:
        with state.condition:
            state.child = state.doing = state.current = None
            state.condition.notify_all()
            state.condition.wait_for(lambda: state.waiting or state.is_ended)
            if state.is_ended:
                return None
        give_way()  # To the answer of the call that asked.
        with state.condition:
            if not state.waiting:
                continue  # Ended meanwhile.
            state.child = CaptureChild()
            state.current = state.waiting.popleft()
            return state.current


def _serve_one(state: _State, gate: CallGate, request: Request, child: CaptureChild) -> None:
    session = request.session
    try:
        captured = _prepare(state, gate, request, child)
        if captured is None:
            return
        state.doing = "compiling"
        with on_gpu(captured.blueprint.gpu):
            Growth(request, captured.blueprint, lambda: state.is_ended).run()
    except CalledOffError:
        pass
    except BaseException as error:  # noqa: BLE001 - a mistake of ours must not stop a model.
        if not state.is_ended:  # Else it is what the end brought about.
            with contextlib.suppress(BaseException):
                request.target.fail(request, _why(error, session.name))
    finally:
        # Whatever is raised where an error is answered, by a listener say: the next request is
        # served all the same, and who waits is not left waiting.
        with contextlib.suppress(BaseException):
            session.manager.close()
        with contextlib.suppress(BaseException):
            request.target.finish(request)


def _prepare(
    state: _State, gate: CallGate, request: Request, child: CaptureChild
) -> Captured | None:
    """Find what serves a call, then None, or capture it."""
    with on_gpu(request.gpu):
        if handover.is_served(request):
            return None
        request.session.manager.prestart()
    state.doing = "capturing"
    return _capture(state, gate, request, child)


def _why(error: BaseException, name: str) -> PrecastError | Reason:
    if isinstance(error, UnrecordableError):
        return Reason(
            "trace-on-start",
            f"{error}; it would be traced at each start, which progressive mode does not do "
            "beside calls: they run eager",
            'Keep such values out of what the model reads in forward, or use mode="blocking"',
        )
    return as_capture_error(name, error)


def _capture(state: _State, gate: CallGate, request: Request, child: CaptureChild) -> Captured:
    session, owner = request.session, request.target.owner
    started = time.perf_counter()
    try:
        if request.call is None:
            raise CannotSendError(request.why_not_sent)
        model = dump_model(request.function, owner)
        captured = child.blueprint(
            model,
            request.call,
            session.config,
            session.passes,
            request.ambient,
            session.name,
        )
        differs = _what_differs_here(request, captured.blueprint)
        if differs is not None:
            why = f"a child process captured it in another state ({differs})"
            captured = _capture_here(state, gate, request, why, _SET_STATE)
    except CannotSendError as problem:
        captured = _capture_here(state, gate, request, str(problem), _DEFINE)
    except TracedCodeRaisedError as error:
        # The same call has just run here: there is something that the child does not have.
        why = f"in a child process {error.problem}"
        captured = _capture_here(state, gate, request, why, _SET_STATE)
    blueprint = captured.blueprint
    seconds = time.perf_counter() - started
    session.emit(CaptureFinished(session.name, seconds, blueprint.num_nodes, blueprint.num_guards))
    for piece, reason in captured.fell_back:
        session.emit(FellBack(session.name, piece, reason))
    num_slots = sum(number is not None for number, _ in blueprint.slots)
    session.emit(PlanMade(session.name, num_slots, len(blueprint.pieces), blueprint.split))
    return captured


def _what_differs_here(request: Request, blueprint: Blueprint) -> str | None:
    """Return what a child found otherwise than it is in this process; None: nothing, or unknown."""
    give_way()
    with request.ambient.around() as is_alike, on_gpu(blueprint.gpu), no_collection():
        if not is_alike:
            return None
        contract = Contract.from_json(blueprint.contract)
        found = bind(contract, request.function, request.target.owner, gpu=blueprint.gpu)
    return what_differs(found) if isinstance(found, Reason) else None


def _capture_here(
    state: _State, gate: CallGate, request: Request, problem: str, remedy: str
) -> Captured:
    """Capture in this process, between two calls of the model."""
    target = request.target
    held: HeldUp | None = None

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        """Around the trace alone: cutting and writing patch nothing."""
        nonlocal held
        with gate.alone(lambda: state.is_ended) as held:
            if held is None:
                raise CalledOffError
            yield
        if state.is_ended:
            raise CalledOffError

    def draw() -> Captured:
        importlib.import_module("torch._dynamo")  # Seconds, in which calls are still served.
        with request.ambient.around() as is_alike:
            if not is_alike:
                raise CaptureError(
                    target.session.name,
                    f"{problem}, and it is called in a state that no other thread can take on",
                )
            return draw_call(
                request.function,
                target.owner,
                request.args,
                request.kwargs,
                target.session.config,
                target.session.passes,
                target.session.name,
                alone=alone(),
            )

    try:
        with state.tracing:
            return draw()
    finally:
        if held is not None and not state.is_ended:
            target.note(
                Reason(
                    "capture-in-process",
                    f"{problem}; it was captured in this process, which held calls up for "
                    f"{held.total_s:.1f} s, at most {held.longest_s:.1f} s at a time",
                    remedy,
                )
            )
