"""Serving the calls of one model: load, compile, or run eager with a reason.

A compiled model has one `CompiledModel`: its session (configuration, cache, compilers,
listeners), the dispatcher that serves calls, and what is to be told of it. For a module it
hangs at `nn.Module`'s own place for compiled calls, so that the object, its class, its
`state_dict` and its hooks stay what they are.
"""

from __future__ import annotations

import contextlib
import os
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from precast.assemblies import Assemblies
from precast.assembly import LoadedAssembly
from precast.attempts import Attempts
from precast.capture.fingerprint import call_signature, model_fingerprint
from precast.contract import NO_GRADIENTS
from precast.describe import refusals
from precast.errors import (
    CaptureAbortedError,
    CaptureCrashedError,
    CaptureError,
    PrecastError,
    Reason,
    as_capture_error,
)
from precast.events import (
    CallOutsideContract,
    CaptureFailed,
    ModelReleased,
    StartBrokenOff,
)
from precast.owner import device_of, find_blocks, find_forward, wrap_forward
from precast.runtime.collector import no_collection
from precast.runtime.dispatch import Dispatcher, any_requires_grad
from precast.runtime.gpu import gpu_of, on_gpu
from precast.session import Session
from precast.why_eager import MOST_FAILED_CALLS, WhyEager

if TYPE_CHECKING:
    from precast.progressive import BackgroundCompiler, Request


class _Start(NamedTuple):
    """A call that nothing loaded serves: `key` is of what does; `args` are with the owner."""

    signature: str
    key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    started: float


class CompiledModel:
    """One model or function that Precast serves."""

    def __init__(
        self,
        function: Any,
        owner: Any,
        session: Session,
        *,
        whole: CompiledModel | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            function: The function to serve; None: what the owner's `forward` is.
            owner: The module that it is a method of; None for a function.
            session: What the parts share.
            whole: The model that could not be captured whole, and that this is a block of.
        """
        served = find_forward(owner) if function is None else function
        self._is_wrapping = served is None
        self.function: types.FunctionType = wrap_forward() if served is None else served
        self.owner = owner
        self.session = session
        self.is_block = whole is not None
        self.blocks: list[CompiledModel] = []
        self.why_eager = WhyEager(session)
        self.dispatcher = Dispatcher(
            owner, self._run_eager, self._resolve, self._report_failed_call
        )
        self.dispatcher.compiled = self
        self.assemblies = Assemblies(
            session,
            self.dispatcher,
            owner,
            run_eager=self._run_eager_apart,
            on_wrong=self._go_eager,
            note=self.why_eager.note,
            looks_twice=whole is None,
        )
        self._traced: Callable[..., Any] | None = None
        self._is_eager = session.config.compilation_level == "none"
        self._fingerprint: str | None = None
        self._gpu: int | None = None  # That of the last call off the hot path.
        self._pending: set[str] = set()  # Signatures that are compiled behind.
        self._error: PrecastError | None = None  # For `wait`, where failures are to be raised.
        self._attempts = Attempts(session, owner)
        self._pid = os.getpid()
        self._whole = whole
        self._behind: BackgroundCompiler | None
        self._behind = self._make_behind() if whole is None else whole._behind
        if whole is None and self._behind is not None:
            self._rehearse()
        if session.recording is not None and whole is None:
            from precast.portrait import portrait_later

            session.recording.portray_with(portrait_later(self))

    def _make_behind(self) -> BackgroundCompiler | None:
        if self.session.config.mode != "progressive":
            return None
        from precast.progressive import BackgroundCompiler  # Not at the first call, which waits.

        return BackgroundCompiler()

    def _rehearse(self) -> None:
        """Make a request once, which is slow the first time, and not at the first call."""
        from precast.progressive import Request

        if torch._C._len_torch_dispatch_stack():
            return  # Somebody traces: it would be in the graph.
        with contextlib.suppress(Exception):  # A call says what is wrong, if anything is.
            if self.owner is not None:
                any_requires_grad(self.owner.parameters())
            call = {"x": torch.empty(1, device="cpu")}
            Request(self, call_signature(self.function, 0, (), call), (), call)

    # -- calls that no loaded assembly serves -----------------------------------

    def _resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call off the hot path: rebind, load, compile, or run eager with a reason."""
        found: LoadedAssembly | Callable[..., Any] | Request | None = None
        failed: str | None = None
        try:
            found, failed = self._find(args, kwargs)
        except Exception as error:
            # Whatever we lack, a file or a thread: the model needs none of it.
            if self.session.config.on_error == "raise":
                raise
            self._note_broken_start(error)
        if isinstance(found, LoadedAssembly):
            bound = found.bound
            if not self.why_eager.records_gradients(bound.weights):
                return self.dispatcher.run(found, bound, args, kwargs)
            found = None
        if callable(found):
            return found(*args, **kwargs)
        if self._behind is not None:
            return self._run_and_queue(self._behind, found, args, kwargs)
        try:
            return self.function(*args, **kwargs)
        except Exception:
            if failed is not None:
                with contextlib.suppress(Exception):
                    self._take_back(failed)
            raise

    def _run_and_queue(
        self,
        behind: BackgroundCompiler,
        request: Request | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call eager, and have its kind compiled behind if eager does not fail."""
        try:
            with behind.gate:
                result = self.function(*args, **kwargs)
        except BaseException:
            if request is not None:
                self.finish(request)
            raise
        if request is not None:
            behind.submit(request)
        return result

    def _run_eager(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[LoadedAssembly | Callable[..., Any] | Request | None, str | None]:
        """Return what runs a call, None: eager; and the signature if it was just given up.

        A request: the call runs eager, and is to be compiled behind.
        """
        if os.getpid() != self._pid:
            self._follow_fork()
        self._follow_forward()
        if self._is_eager or self.why_eager.must_run_eager(self.owner, args, kwargs):
            return None, None
        with self.assemblies.lock:
            if self._traced is not None:
                return self._traced, None
            if self.blocks:
                return None, None  # The blocks within are compiled, the rest is Python.
            signature = self._signature(args, kwargs)
            loaded = self.assemblies.rebind(self.function, args, kwargs)
            if loaded is not None:
                return loaded, None
            if self.why_eager.has_given_up(signature) or signature in self._pending:
                return None, None
            if self._is_refused_for_gradients(args, kwargs):
                return None, None
            loaded = self._start(args, kwargs, signature)
            if loaded is not None:
                return loaded, None
            if signature in self._pending:
                try:
                    return self._request(args, kwargs, signature), None
                except BaseException:
                    self._pending.discard(signature)
                    raise
            return self._traced, signature if self.why_eager.has_given_up(signature) else None

    def _follow_forward(self) -> None:
        """Serve the `forward` that the model has now, should someone have replaced it."""
        if self.owner is None:
            return
        function = find_forward(self.owner)
        if self._is_wrapping if function is None else function is self.function:
            return
        with self.assemblies.lock:
            self._go_back()
            self._is_wrapping = function is None
            self.function = wrap_forward() if function is None else function
            self._fingerprint = None

    def _take_back(self, signature: str) -> None:
        """Forget that a call could not be compiled: eager failed as well, the call is at fault."""
        with self.assemblies.lock:
            self._attempts.forget(signature)
            if self.why_eager.take_back(signature):
                for block in self.blocks:
                    block.detach()
                self.blocks = []

    @property
    def _num_owners(self) -> int:
        return 0 if self.owner is None else 1

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return call_signature(self.function, self._num_owners, args[self._num_owners :], kwargs)

    def _is_refused_for_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a call would be served but that a tensor deep within it has gradients."""
        if not torch.is_grad_enabled():
            return False
        for loaded in self.assemblies.loaded:
            if (loaded.why_not(args, kwargs) or "").endswith(NO_GRADIENTS):
                self.why_eager.note_gradients()
                return True
        return False

    def _start(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str
    ) -> LoadedAssembly | None:
        started = time.perf_counter()
        self._gpu = gpu_of(self.owner, args, kwargs)
        config = self.session.config
        is_behind = config.mode == "progressive"
        # Looking it up takes longer than many a call: that is done behind as well, unless no
        # other thread can take on the state that this one is in.
        if not is_behind or torch._C._len_torch_function_stack():
            with no_collection():
                start = _Start(signature, self.assembly_key(signature), args, kwargs, started)
                loaded = self._load(start)
            if loaded is not None:
                return loaded
        if is_behind:
            if len(self._pending) < config.max_assemblies:
                self._pending.add(signature)
            return None
        if config.mode == "cache_only":
            refused = refusals(self.session)
            self.why_eager.give_up(
                signature,
                Reason(
                    "not-recorded",
                    'mode="cache_only" found nothing for this call; it runs eager'
                    + "".join(f"; refused: {reason.message}" for reason in refused[:1]),
                    refused[0].remedy if refused else 'Fill the cache with mode="blocking" first',
                ),
            )
            return None
        if self.is_full(signature):
            return None
        own_args = args[self._num_owners :]
        if self.is_known_to_fail(signature, start.key, self.function, own_args, kwargs):
            return None
        if self.assemblies.loaded:
            self._report_outside(args, kwargs)
        try:
            return self._take_turn(start)
        except BaseException:
            self.session.emit(StartBrokenOff(self.session.name))
            raise

    def _load(self, start: _Start) -> LoadedAssembly | None:
        return self.assemblies.load(
            start.key, self.function, start.args, start.kwargs, start.started, self._gpu
        )

    def _take_turn(self, start: _Start) -> LoadedAssembly | None:
        """Capture and compile, or load what another process made of it meanwhile."""
        is_raised = self.session.config.on_error == "raise"
        # Of the processes that miss this at once, one captures and compiles; the others load.
        with self.session.manager.turn(
            self._attempts.of(start.signature),
            lambda: self.assemblies.is_new(start.key),
            lambda: self._load(start),
        ) as found:
            if found is not None:
                return found
            try:
                return self._compile(start)
            except Exception as error:
                # A mistake of ours must not stop a model that runs without us.
                if is_raised:
                    raise
                self._fall_back(start.signature, as_capture_error(self.session.name, error))
        return None

    def is_full(self, signature: str) -> bool:
        """Give a signature up where enough of them are compiled; return whether so."""
        most = self.session.config.max_assemblies
        if len(self.assemblies.loaded) < most:
            return False
        reason = Reason(
            "recompile-limit",
            f"{most} compiled signatures are in use; this call runs eager",
            "Raise max_assemblies, or give dynamic_shapes so that one covers more calls",
        )
        self.why_eager.give_up(signature, reason)
        return True

    def is_known_to_fail(
        self,
        signature: str,
        key: str,
        function: types.FunctionType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Give a signature up where a capture is known to be in vain; return whether so.

        Args:
            signature: Of the call.
            key: Of what serves it.
            function: What is called.
            args: The call's, without the owner.
            kwargs: The call's.
        """
        reason = self._attempts.why_in_vain(signature, key, function, args, kwargs)
        if reason is None:
            return False
        with self.assemblies.lock:
            self._give_up(signature, reason)
        return True

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str) -> Request:
        """Return a call as it is before it runs, to be compiled behind."""
        from precast.progressive import Request

        if self.assemblies.loaded:
            self._report_outside(args, kwargs)
        return Request(self, signature, args[self._num_owners :], kwargs)

    def assembly_key(self, signature: str) -> str:
        """Return the key of what serves calls of a signature."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.function, self.owner)
        device = device_of(self.owner, signature)
        with on_gpu(self._gpu):  # It is of a kind.
            return self.session.assembly_key(self._fingerprint, signature, device)

    def _run_eager_apart(self, *args: Any, **kwargs: Any) -> Any:
        if self._behind is None:
            return self.function(*args, **kwargs)
        with self._behind.gate:
            return self.function(*args, **kwargs)

    def _go_eager(self) -> None:
        self._is_eager = True

    def _note_broken_start(self, error: Exception) -> None:
        """Note a call that could not be looked up; look no more if that fails again and again."""
        self.why_eager.note_broken_start(error)
        is_of_a_moment = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)
        if not is_of_a_moment and self.why_eager.fails_too_often("start"):
            self._go_eager()

    # -- cold -----------------------------------------------------------------

    def _compile(self, start: _Start) -> LoadedAssembly | None:
        """Capture and compile a call; None: it is served by Dynamo, or not at all."""
        from precast.blueprint import slot_table
        from precast.cold_start import MustTrace, capture_and_compile

        signature, key, args, kwargs, started = start
        own_args = args[self._num_owners :]
        try:
            blueprint, results = capture_and_compile(
                self.function, self.owner, own_args, kwargs, self.session, started
            )
        except MustTrace as finding:
            self._trace_on_start(str(finding), signature)
            return None
        if self._is_eager:
            return None  # It was released meanwhile, and its pieces were called off.
        assembly, slots = blueprint.assembly(results), slot_table(blueprint.slots, results)
        loaded = self.assemblies.open(key, assembly, slots, self.function, blueprint.gpu)
        self.assemblies.bind_new(loaded, self.function)
        self.keep(loaded, key, signature)
        self.assemblies.add(loaded)
        self.assemblies.note_start(loaded, time.perf_counter() - started, results)
        problem = loaded.why_not(args, kwargs)
        if problem is not None and problem.endswith(NO_GRADIENTS):
            self.why_eager.note_gradients()
            return None
        if problem is not None:
            # Compiled for less than this call asks (overlapping arguments, a narrowed range).
            self.why_eager.give_up(
                signature,
                Reason("outside-contract", f"{problem}; this call ran eager", "Nothing to do"),
            )
            return None
        return loaded

    def keep(self, loaded: LoadedAssembly, key: str, signature: str) -> None:
        """Publish an assembly, where each of its pieces can be found again."""
        if self.assemblies.publish(loaded, key):
            self._attempts.forget(signature)
        else:
            reason = Reason("compile-failed", "a piece cannot be kept", "Nothing to do")
            self._attempts.remember(signature, reason)

    def _trace_on_start(self, problem: str, signature: str) -> None:
        """Let Dynamo keep the guards: pieces still come from the cache, tracing is not saved."""
        from precast.cold_start import let_dynamo_trace

        reason = Reason(
            "trace-on-start",
            f"{problem}; every start traces the model, pieces come from the cache",
            "Keep such values out of what the model reads in forward",
        )
        self.why_eager.note(reason)
        self._attempts.remember(signature, reason)

        def note_failed_call(error: Exception) -> None:
            self.why_eager.note_failed_call(error)
            self._go_eager()

        self._traced = let_dynamo_trace(self.function, self.session, note_failed_call)

    # -- behind: called by the thread of `progressive.py`, as is `handover.py` ---

    def fail(self, request: Request, why: PrecastError | Reason) -> None:
        """Run the calls of a request eager from now on."""
        with self.assemblies.lock:
            if isinstance(why, Reason):
                self.why_eager.give_up(request.signature, why)
                return
            if self.session.config.on_error == "raise":
                self._error = why
            self._fall_back(request.signature, why)

    def finish(self, request: Request) -> None:
        """Take a request for done, whatever became of it."""
        with self.assemblies.lock:
            self._pending.discard(request.signature)

    def note(self, reason: Reason) -> None:
        """Keep a reason, for `status`, and tell of it once."""
        with self.assemblies.lock:
            self.why_eager.note(reason)

    # -- when it does not work ---------------------------------------------------

    def _fall_back(self, signature: str, error: PrecastError) -> None:
        if self._is_eager:
            return  # It was released meanwhile, and everything called off.
        self._give_up(signature, error.reason)
        if isinstance(error, CaptureError):
            self.session.emit(CaptureFailed(self.session.name, error.reason))
        if not isinstance(error, CaptureAbortedError):
            is_crash = isinstance(error, CaptureCrashedError)
            code = "compile-crashed" if is_crash else None
            self._attempts.remember(signature, error.reason, code)

    def _give_up(self, signature: str, reason: Reason) -> None:
        """Run calls of a signature eager; of a model without a graph, compile the blocks within."""
        self.why_eager.give_up(signature, reason)
        if reason.code != "capture-failed" or self.owner is None or self.assemblies.loaded:
            return
        self.blocks = [
            attach(block, Session.for_block(self.session, name), whole=self)
            for name, block in find_blocks(self.owner)
        ]

    def _report_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loaded = self.assemblies.loaded[-1]
        problem = loaded.why_not(args, kwargs) or "the model has changed"
        self.session.emit(
            CallOutsideContract(
                self.session.name,
                Reason(
                    "outside-contract", f"{problem}; this call is compiled anew", "Nothing to do"
                ),
            )
        )

    def _report_failed_call(
        self, loaded: Any, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A compiled call raised and eager answered it: note it, and give it up after a few."""
        self.why_eager.note_failed_call(error)
        # Memory comes back, perhaps; other code that fails thrice is not tried at each call.
        if isinstance(error, torch.OutOfMemoryError):
            return
        with self.assemblies.lock:
            if not self.why_eager.fails_too_often(loaded.key):
                return
            self.assemblies.remove(loaded)
            self.why_eager.give_up(
                self._signature(args, kwargs),
                Reason(
                    "compile-crashed",
                    f"compiled code raised at {MOST_FAILED_CALLS} calls that eager answered; such "
                    "calls run eager from now on",
                    "Please report it; precast.release and precast.compile try it again",
                ),
            )

    def _go_back(self) -> None:
        """Forget everything that was compiled."""
        for block in self.blocks:
            block.detach()
        self.blocks = []
        self.assemblies.remove_all()
        self._traced = None
        self.why_eager.try_all_again()

    # -- for the public functions ------------------------------------------------

    def wait(self, timeout: float | None) -> bool:
        """Return when nothing is loaded, compiled or written; False where time ran out.

        Raises:
            PrecastError: With `on_error="raise"`, what went wrong behind.
        """
        if os.getpid() != self._pid:
            self._follow_fork()
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._behind is not None and not self._behind.wait(timeout):
            return False
        left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self.assemblies.lock.acquire(timeout=left):
            return False
        self.assemblies.lock.release()
        error, self._error = self._error, None
        if error is not None:
            raise error
        left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        return self.session.storage.flush(None if deadline is None else left)

    def behind(self) -> dict[str, Any]:
        """Return what is being compiled behind, as plain data."""
        return {"doing": None, "waiting": 0} if self._behind is None else self._behind.describe()

    def detach(self) -> None:
        """Go back to eager and give everything back."""
        if os.getpid() != self._pid:
            self._follow_fork()
        self._go_eager()  # What is compiled now comes too late.
        if self.session.recording is not None and not self.is_block:
            self.session.recording.look()
        self.dispatcher.watch(None)
        self.assemblies.second_look.call_off()
        if self._behind is not None and not self.is_block:
            self._behind.close()
        self._go_back()
        if self.owner is not None and self.owner._compiled_call_impl is self.dispatcher:
            self.owner._compiled_call_impl = None
        if not self.is_block:
            self.session.close()
            self.session.emit(ModelReleased(self.session.name))

    def _follow_fork(self) -> None:
        """Serve on in a forked process: with locks, workers and files of its own.

        Another thread of the parent may have held any of them, and no thread is left to let go.
        What was compiled behind is asked for anew; what is loaded goes on.
        """
        if self._whole is not None:
            self._whole._follow_fork()  # Its blocks with it: they share what is opened.
        elif os.getpid() != self._pid:
            if self._behind is not None:
                self._behind.forget()
            self.session.reopen()
            self._begin_in_fork(self._make_behind())

    def _begin_in_fork(self, behind: BackgroundCompiler | None) -> None:
        self._pid = os.getpid()
        self._behind = behind
        self._pending = set()
        self.assemblies.follow_fork()
        for block in self.blocks:
            block.session.share(self.session)
            block._begin_in_fork(behind)


def attach(
    model: torch.nn.Module,
    session: Session,
    *,
    whole: CompiledModel | None = None,
) -> CompiledModel:
    """Let Precast serve a module's calls; `whole` is the model that it is a block of."""
    compiled = CompiledModel(None, model, session, whole=whole)
    model._compiled_call_impl = compiled.dispatcher
    return compiled
