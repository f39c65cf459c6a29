"""Serving the calls of one model: load, compile, or run eager with a reason.

A compiled model has one `CompiledModel`: its session (configuration, cache, compilers,
listeners), the dispatcher that serves calls, and what is to be told of it. For a module it
hangs at `nn.Module`'s own place for compiled calls, so that the object, its class, its
`state_dict` and its hooks stay what they are.
"""

from __future__ import annotations

import os
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from precast.assembly import Assembly, Bound, LoadedAssembly, open_assembly
from precast.candidates import Candidates
from precast.capture.fingerprint import call_signature, example_shapes, model_fingerprint
from precast.describe import emit_start, refusals
from precast.errors import CaptureError, PrecastError, Reason, in_words
from precast.events import (
    AssemblyMissed,
    AssemblyPublished,
    AssemblyRejected,
    CallOutsideContract,
    CaptureFailed,
    CaptureFinished,
    FellBack,
    ModelReleased,
    StartBrokenOff,
)
from precast.owner import device_of, find_blocks, find_forward, wrap_forward
from precast.runtime.collector import no_collection
from precast.runtime.dispatch import Dispatcher, needs_gradient
from precast.second_look import SecondLook
from precast.session import Session

if TYPE_CHECKING:
    from precast.blueprint import Blueprint
    from precast.piece_result import PieceResult
    from precast.progressive import BackgroundCompiler, Request
    from precast.runtime.slot import SlotTable

# Calls of one signature that eager refuses too, after which it is captured no more.
_MOST_FAILED_CALLS = 3


class CompiledModel:
    """One model or function that Precast serves."""

    def __init__(
        self,
        function: Any,
        owner: Any,
        session: Session,
        *,
        is_block: bool = False,
        behind: BackgroundCompiler | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            function: The function to serve; None: what the owner's `forward` is.
            owner: The module that it is a method of; None for a function.
            session: What the parts share.
            is_block: It is a block of a model that could not be captured whole.
            behind: Of that model; None: one is made where the mode asks for it.
        """
        served = find_forward(owner) if function is None else function
        self._is_wrapping = served is None
        self.function: types.FunctionType = wrap_forward() if served is None else served
        self.owner = owner
        self.session = session
        self.is_block = is_block
        self.reasons: list[Reason] = []
        self.blocks: list[CompiledModel] = []
        self.dispatcher = Dispatcher(
            owner, self._run_eager, self._resolve, self._report_failed_call
        )
        self.dispatcher.compiled = self
        self.is_warm: bool | None = None
        self.start_seconds: float | None = None
        self._lock = threading.RLock()
        self._gave_up: dict[str, Reason] = {}
        self._num_failed: dict[str, int] = {}
        self._candidates = Candidates(session)
        self.second_look = SecondLook(session, self._throw_away)
        self._traced: Callable[..., Any] | None = None
        self._is_eager = session.config.compilation_level == "none"
        self._fingerprint: str | None = None
        self._behind = self._make_behind() if behind is None else behind
        self._pending: set[str] = set()  # Signatures that are compiled behind.
        self._error: PrecastError | None = None  # For `wait`, where failures are to be raised.
        self._pid = os.getpid()
        self.not_sampled: str | None = None  # Why no call is checked in service.
        if session.recording is not None and not is_block:
            from precast.portrait import portrait_later

            session.recording.portray_with(portrait_later(self))

    def _make_behind(self) -> BackgroundCompiler | None:
        if self.session.config.mode != "progressive":
            return None
        from precast.progressive import BackgroundCompiler  # Not at the first call, which waits.

        return BackgroundCompiler()

    # -- calls that no loaded assembly serves -----------------------------------

    def _resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call off the hot path: rebind, load, compile, or run eager with a reason."""
        found, failed = self._find(args, kwargs)
        if isinstance(found, LoadedAssembly):
            return self.dispatcher.run(found, found.bound, args, kwargs)
        if callable(found):
            return found(*args, **kwargs)
        if self._behind is not None:
            return self._run_and_queue(self._behind, found, args, kwargs)
        try:
            return self.function(*args, **kwargs)
        except Exception:
            if failed is not None:
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
        if self._is_eager or self._must_stay_eager(args, kwargs):
            return None, None
        with self._lock:
            if self._traced is not None:
                return self._traced, None
            if self.blocks:
                return None, None  # The blocks within are compiled, the rest is Python.
            signature = self._signature(args, kwargs)
            loaded = self._rebind(args, kwargs)
            if loaded is not None:
                return loaded, None
            if signature in self._gave_up or signature in self._pending:
                return None, None
            loaded = self._start(args, kwargs, signature)
            if loaded is not None:
                return loaded, None
            if signature in self._pending:
                return self._request(args, kwargs, signature), None
            return self._traced, signature if signature in self._gave_up else None

    def _follow_forward(self) -> None:
        """Serve the `forward` that the model has now, should someone have replaced it."""
        if self.owner is None:
            return
        function = find_forward(self.owner)
        if self._is_wrapping if function is None else function is self.function:
            return
        with self._lock:
            self._go_back()
            self._is_wrapping = function is None
            self.function = wrap_forward() if function is None else function
            self._fingerprint = None

    def _take_back(self, signature: str) -> None:
        """Forget that a call could not be compiled: eager failed as well, the call is at fault.

        Not for ever: a model that is called wrongly again and again is not captured each time.
        """
        with self._lock:
            self._num_failed[signature] = self._num_failed.get(signature, 0) + 1
            if self._num_failed[signature] < _MOST_FAILED_CALLS:
                reason = self._gave_up.pop(signature, None)
                self.reasons = [known for known in self.reasons if known is not reason]
                for block in self.blocks:
                    block.detach()
                self.blocks = []

    @property
    def _num_owners(self) -> int:
        return 0 if self.owner is None else 1

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return call_signature(self.function, self._num_owners, args[self._num_owners :], kwargs)

    def _must_stay_eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
            return True  # Somebody traces through the model: let them see its own code.
        if not torch.is_grad_enabled():
            return False
        weights = list(self.owner.parameters()) if self.owner is not None else []
        if not needs_gradient(weights, args, kwargs):
            return False
        self._note(
            Reason(
                "grad-enabled",
                "the call records gradients, which compiled code does not; it ran eager",
                "Call the model under torch.inference_mode() or torch.no_grad()",
            )
        )
        return True

    def _rebind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LoadedAssembly | None:
        """Bind a loaded assembly anew whose call check holds, where the model still fits."""
        for loaded in self.dispatcher.loaded:
            assert isinstance(loaded, LoadedAssembly)
            loaded.follow_defaults(self.function)
            if loaded.why_not(args, kwargs) is not None:
                continue
            bound = loaded.bind(self.function, self.owner)
            if isinstance(bound, Reason):
                self.session.emit(AssemblyRejected(self.session.name, loaded.key, bound))
                continue
            self._tie(loaded, bound)
            return loaded
        return None

    def _start(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str
    ) -> LoadedAssembly | None:
        started = time.perf_counter()
        config = self.session.config
        is_behind = config.mode == "progressive"
        # Looking it up takes longer than many a call: that is done behind as well, unless no
        # other thread can take on the state that this one is in.
        if not is_behind or torch._C._len_torch_function_stack():
            key = self._assembly_key(signature)
            with no_collection():
                loaded = self._load(key, args, kwargs, started)
            if loaded is not None:
                return loaded
        if is_behind:
            if len(self._pending) < config.max_assemblies:
                self._pending.add(signature)
            return None
        if config.mode == "cache_only":
            refused = refusals(self.session)
            self._give_up(
                signature,
                Reason(
                    "not-recorded",
                    'mode="cache_only" found nothing for this call; it runs eager'
                    + "".join(f"; refused: {reason.message}" for reason in refused[:1]),
                    refused[0].remedy if refused else 'Fill the cache with mode="blocking" first',
                ),
            )
            return None
        if self._is_full(signature):
            return None
        if self.dispatcher.loaded:
            self._report_outside(args, kwargs)
        try:
            return self._take_turn(key, args, kwargs, signature, started)
        except BaseException:
            self.session.emit(StartBrokenOff(self.session.name))
            raise

    def _take_turn(
        self,
        key: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        signature: str,
        started: float,
    ) -> LoadedAssembly | None:
        """Capture and compile, or load what another process made of it meanwhile."""
        is_raised = self.session.config.on_error == "raise"
        # Of the processes that miss this at once, one captures and compiles; the others load.
        with self.session.manager.turn(
            key,
            lambda: self._candidates.is_new(key),
            lambda: self._load(key, args, kwargs, started),
        ) as found:
            if found is not None:
                return found
            try:
                return self._compile(key, args, kwargs, started)
            except PrecastError as error:
                if is_raised:
                    raise
                self._fall_back(signature, error, key)
            except Exception as error:
                # A mistake of ours must not stop a model that runs without us.
                if is_raised:
                    raise
                self._fall_back(signature, CaptureError(self.session.name, in_words(error)), key)
        return None

    def _is_full(self, signature: str) -> bool:
        """Give a signature up where enough of them are compiled; return whether so."""
        most = self.session.config.max_assemblies
        if len(self.dispatcher.loaded) < most:
            return False
        reason = Reason(
            "recompile-limit",
            f"{most} compiled signatures are in use; this call runs eager",
            "Raise max_assemblies, or give dynamic_shapes so that one covers more calls",
        )
        self._give_up(signature, reason)
        return True

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str) -> Request:
        """Return a call as it is before it runs, to be compiled behind."""
        from precast.progressive import Request

        if self.dispatcher.loaded:
            self._report_outside(args, kwargs)
        return Request(self, signature, args[self._num_owners :], kwargs)

    def _assembly_key(self, signature: str) -> str:
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.function, self.owner)
        device = device_of(self.owner, signature)
        return self.session.assembly_key(self._fingerprint, signature, device)

    # -- warm -----------------------------------------------------------------

    def _load(
        self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        """Find a stored assembly for this call."""
        problem = None
        for loaded in self._candidates.sound(key, self._known(), self.function):
            problem = loaded.why_not(args, kwargs)
            if problem is not None:
                continue
            bound = loaded.bind(self.function, self.owner)
            if isinstance(bound, Reason):
                problem = bound.message
                self.session.emit(AssemblyRejected(self.session.name, loaded.key, bound))
                continue
            self._tie(loaded, bound)
            if not self.is_block and self.second_look.disproves(
                loaded, self.function, self.owner, args[self._num_owners :], kwargs
            ):
                continue
            self._install(loaded, started, None)
            return loaded
        self.session.emit(
            AssemblyMissed(self.session.name, key, self.session.key_parts(key), problem)
        )
        return None

    def _tie(self, loaded: LoadedAssembly, bound: Bound) -> None:
        """Let a loaded assembly run as it is bound now."""
        if self.session.config.verify == "sample":
            from precast.sampling import Sampler, why_not_sampled

            self.not_sampled = why_not_sampled(loaded.entry_code, loaded.mutates)
            if self.not_sampled is None:
                bound.entry = Sampler(
                    bound.entry,
                    self._run_eager_apart,
                    self.session.config.verify_every,
                    lambda problem: self._refute(loaded, problem),
                )
        loaded.bound = bound

    def _run_eager_apart(self, *args: Any, **kwargs: Any) -> Any:
        if self._behind is None:
            return self.function(*args, **kwargs)
        with self._behind.gate:
            return self.function(*args, **kwargs)

    def _refute(self, loaded: LoadedAssembly, problem: str) -> None:
        """Use an assembly no more that was found to be wrong in service, nor one like it."""
        with self._lock:
            if loaded not in self.dispatcher.loaded:
                return
            self.dispatcher.loaded = tuple(
                other for other in self.dispatcher.loaded if other is not loaded
            )
            self._is_eager = True
        self.session.storage.discard(loaded.key)
        self._note(
            Reason(
                "verify-mismatch",
                f"a call in service was checked: {problem}; the assembly was thrown away and the "
                "model runs eager",
                "Report it, with the model; precast.release and compile again to go on",
            )
        )

    def _throw_away(self, loaded: LoadedAssembly) -> None:
        """Use a stored assembly no more, in no process."""
        # From the next call on: another assembly or a new capture.
        with self._lock:
            self.dispatcher.loaded = tuple(
                other for other in self.dispatcher.loaded if other is not loaded
            )
        self.session.storage.discard(loaded.key)
        self._note(
            Reason(
                "stale-assembly",
                "tracing the model again gave other pieces than the stored assembly has; "
                "it was thrown away",
                "Report it: the contract should have noticed",
            )
        )

    # -- cold -----------------------------------------------------------------

    def _compile(
        self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        from precast.backend import blueprint_of, packing_rule
        from precast.capture.dynamo import capture_call
        from precast.contract import Unrecordable

        session = self.session
        session.manager.prestart()
        try:
            try:
                capture = capture_call(
                    self.function,
                    self.owner,
                    args[self._num_owners :],
                    kwargs,
                    dynamic_shapes=session.config.dynamic_shapes,
                    name=session.name,
                )
            except Unrecordable as finding:
                self._trace_on_start(str(finding), key)
                return None
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
                self._trace_on_start(str(capture.unrecordable), key)
                return None
            example = example_shapes(
                self.function, self._num_owners, args[self._num_owners :], kwargs
            )
            blueprint = blueprint_of(
                capture,
                session.config,
                session.emit,
                session.name,
                example,
                session.passes,
                packing_rule(capture, self.function, self.owner, session.passes),
            )
            results = session.manager.compile(blueprint.pieces, blueprint.names)
        finally:
            session.manager.close()
        loaded = self._open(key, blueprint, results)
        bound = loaded.bind(self.function, self.owner)
        if isinstance(bound, Reason):
            raise CaptureError(session.name, f"its contract does not hold at once: {bound.message}")
        self._tie(loaded, bound)
        self._keep(loaded, key)
        self._install(loaded, started, results)
        problem = loaded.why_not(args, kwargs)
        if problem is not None:
            # Compiled for less than this call asks (overlapping arguments, a narrowed range).
            self._note(
                Reason("outside-contract", f"{problem}; this call ran eager", "Nothing to do")
            )
            self._gave_up[self._signature(args, kwargs)] = self.reasons[-1]
            return None
        return loaded

    def _open(
        self, key: str, blueprint: Blueprint, results: Sequence[PieceResult]
    ) -> LoadedAssembly:
        """Return an assembly, not bound yet, under the name by which it will be found again."""
        from precast.blueprint import slot_table  # Here: a warm start does without.

        assembly = blueprint.assembly(results)
        name = self._candidates.free_name(key, self._known(), assembly)
        return open_assembly(assembly, name, slot_table(blueprint.slots, results), self.function)

    def _known(self) -> set[str]:
        return {loaded.key for loaded in self.dispatcher.loaded}  # type: ignore[attr-defined]

    def _keep(self, loaded: LoadedAssembly, key: str) -> None:
        """Publish an assembly, where each of its pieces can be found again."""
        if None in loaded.assembly.pieces:
            self._note_unkept(
                key, Reason("compile-failed", "a piece cannot be kept", "Nothing to do")
            )
        else:
            data = loaded.assembly.to_json()
            labels = {"model": self.session.name, "parts": self.session.key_parts(key)}
            self.session.manager.save(loaded.key, {**data, **labels})
            self.session.emit(AssemblyPublished(self.session.name, loaded.key, len(str(data))))

    def _add(self, loaded: LoadedAssembly) -> None:
        with self._lock:
            # A new tuple: threads inside the old one go on with it.
            self.dispatcher.loaded = (*self.dispatcher.loaded, loaded)

    def _install(
        self,
        loaded: LoadedAssembly,
        started: float,
        results: Sequence[PieceResult] | None,
    ) -> None:
        self._add(loaded)
        seconds = time.perf_counter() - started
        if self.start_seconds is None:
            self.start_seconds, self.is_warm = seconds, results is None
        emit_start(self.session, loaded, seconds, results)

    def _trace_on_start(self, problem: str, key: str) -> None:
        """Let Dynamo keep the guards: pieces still come from the cache, tracing is not saved."""
        from precast.backend import compile_traced

        reason = Reason(
            "trace-on-start",
            f"{problem}; every start traces the model, pieces come from the cache",
            "Keep such values out of what the model reads in forward",
        )
        self._note(reason)
        self._note_unkept(key, reason)
        session = self.session

        def backend(graph_module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            return compile_traced(graph_module, session)

        traced = torch.compile(self.function, backend=backend)

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return traced(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - Dynamo's, a compiler's or the user's.
                # Dynamo raises before it runs anything, or what eager raises too.
                result = self.function(*args, **kwargs)
                self._note_failed_call(error)
                self._is_eager = True
                return result

        self._traced = run

    # -- behind: called by the thread of `progressive.py` -------------------------

    # Calls wait for the lock at times: it is held for moments only.

    def is_served(self, request: Request) -> bool:
        """Whether no compile is needed for a call like the one that asked.

        By what was loaded meanwhile, by what is stored, which is loaded now, or because enough is
        compiled already.
        """
        if self.is_covered(request):
            return True
        key = self._assembly_key(request.signature)
        args, kwargs = self._full(request.args), request.kwargs
        with request.ambient.around() as is_alike, no_collection():
            if is_alike and self._load(key, args, kwargs, request.started) is not None:
                return True
        with self._lock:
            return self._is_full(request.signature)

    def is_covered(self, request: Request) -> bool:
        """Whether what is loaded by now serves a call like the one that asked."""
        args = self._full(request.args)
        return any(
            loaded.why_not(args, request.kwargs) is None  # type: ignore[attr-defined]
            for loaded in self.dispatcher.loaded
        )

    def _full(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.owner, *args) if self._num_owners else args

    def open(self, request: Request, assembly: Assembly, slots: SlotTable) -> LoadedAssembly:
        """Return an assembly ready to serve the call that asked.

        Raises:
            CaptureError: Its contract does not hold for the model.
        """
        key = self._assembly_key(request.signature)
        name = self._candidates.free_name(key, self._known(), assembly)
        loaded = open_assembly(assembly, name, slots, request.function)
        with request.ambient.around() as is_alike:
            # Else the next call binds it, in its own thread.
            bound = loaded.bind(request.function, self.owner) if is_alike else None
        if isinstance(bound, Reason):
            raise CaptureError(
                self.session.name, f"its contract does not hold at once: {bound.message}"
            )
        if bound is not None:
            self._tie(loaded, bound)
        return loaded

    def admit(self, request: Request, loaded: LoadedAssembly) -> None:
        """Let an assembly serve from the next call on."""
        with self._lock:
            if self.function is request.function:  # Else it was replaced meanwhile.
                self._add(loaded)

    def replace(
        self, request: Request, loaded: LoadedAssembly, successor: LoadedAssembly
    ) -> LoadedAssembly:
        """Let another form of an assembly serve in its place; calls inside go on with the old."""
        bound = successor.bound_as(loaded, request.function)
        if bound is not None:
            self._tie(successor, bound)
        with self._lock:
            self.dispatcher.loaded = tuple(
                successor if other is loaded else other for other in self.dispatcher.loaded
            )
        return successor

    def complete(
        self,
        request: Request,
        loaded: LoadedAssembly,
        assembly: Assembly,
        results: Sequence[PieceResult],
    ) -> None:
        """Publish an assembly all of whose pieces have landed, unless it was thrown away."""
        if loaded not in self.dispatcher.loaded:
            return
        loaded.assembly = assembly
        key = self._assembly_key(request.signature)
        loaded.key = self._candidates.free_name(key, self._known() - {loaded.key}, assembly)
        self._keep(loaded, key)
        seconds = time.perf_counter() - request.started
        with self._lock:
            if self.start_seconds is None:
                self.start_seconds, self.is_warm = seconds, False
            if not self.is_covered(request):
                reason = Reason(
                    "outside-contract",
                    "what was compiled does not serve the call that asked for it, which runs eager",
                    "Nothing to do",
                )
                self._give_up(request.signature, reason)
        emit_start(self.session, loaded, seconds, results)

    def fail(self, request: Request, why: PrecastError | Reason) -> None:
        """Run the calls of a request eager from now on."""
        with self._lock:
            if isinstance(why, Reason):
                self._give_up(request.signature, why)
                return
            if self.session.config.on_error == "raise":
                self._error = why
            self._fall_back(request.signature, why, self._assembly_key(request.signature))

    def finish(self, request: Request) -> None:
        """Take a request for done, whatever became of it."""
        with self._lock:
            self._pending.discard(request.signature)

    def note(self, reason: Reason) -> None:
        """Keep a reason, for `status`, and tell of it once."""
        with self._lock:
            self._note(reason)

    # -- when it does not work ---------------------------------------------------

    def _note_unkept(self, key: str, reason: Reason) -> None:
        """Note that a capture leaves nothing to load: then no process need wait for another's."""
        self.session.manager.failures.remember(key, reason, ("capture-failed",))

    def _fall_back(self, signature: str, error: PrecastError, key: str) -> None:
        self._note_unkept(key, error.reason)
        if isinstance(error, CaptureError):
            self.session.emit(CaptureFailed(self.session.name, error.reason))
        self._give_up(signature, error.reason)
        if (
            isinstance(error, CaptureError)
            and self.owner is not None
            and not self.dispatcher.loaded
        ):
            self.blocks = [
                attach(
                    block, Session.for_block(self.session, name), is_block=True, behind=self._behind
                )
                for name, block in find_blocks(self.owner)
            ]

    def _give_up(self, signature: str, reason: Reason) -> None:
        self._gave_up[signature] = reason
        self._note(reason)

    def _note(self, reason: Reason) -> None:
        if all(
            known.code != reason.code or known.message != reason.message for known in self.reasons
        ):
            self.reasons.append(reason)
            self.session.emit(FellBack(self.session.name, None, reason))

    def _report_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loaded = self.dispatcher.loaded[-1]
        assert isinstance(loaded, LoadedAssembly)
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
        self._note_failed_call(error)
        # Memory comes back, perhaps; other code that fails thrice is not tried at each call.
        if isinstance(error, torch.OutOfMemoryError):
            return
        with self._lock:
            self._num_failed[loaded.key] = self._num_failed.get(loaded.key, 0) + 1
            if self._num_failed[loaded.key] < _MOST_FAILED_CALLS:
                return
            self.dispatcher.loaded = tuple(
                other for other in self.dispatcher.loaded if other is not loaded
            )
            self._give_up(
                self._signature(args, kwargs),
                Reason(
                    "compile-crashed",
                    f"compiled code raised at {_MOST_FAILED_CALLS} calls that eager answered; such "
                    "calls run eager from now on",
                    "Please report it; precast.release and precast.compile try it again",
                ),
            )

    def _note_failed_call(self, error: BaseException) -> None:
        raised = f"compiled code raised {type(error).__name__}:"
        # Once a kind: what is said of memory has other figures each time.
        if any(known.message.startswith(raised) for known in self.reasons):
            return
        self._note(
            Reason(
                "compile-crashed",
                f"{raised} {error}; the call ran eager",
                "If eager does not raise for this call, please report it",
            )
        )

    def _go_back(self) -> None:
        """Forget everything that was compiled."""
        for block in self.blocks:
            block.detach()
        self.blocks = []
        self.dispatcher.loaded = ()
        self._traced = None
        self._gave_up.clear()

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
        if not self._lock.acquire(timeout=left):
            return False
        self._lock.release()
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
        if self.session.recording is not None and not self.is_block:
            self.session.recording.look()
        self.dispatcher.watch(None)
        self.second_look.call_off()
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
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._pending = set()
        if self._behind is not None:
            self._behind.forget()
            self._behind = self._make_behind()
        self.session.reopen()
        self.second_look = SecondLook(self.session, self._throw_away)


def attach(
    model: torch.nn.Module,
    session: Session,
    *,
    is_block: bool = False,
    behind: BackgroundCompiler | None = None,
) -> CompiledModel:
    """Let Precast serve a module's calls."""
    compiled = CompiledModel(None, model, session, is_block=is_block, behind=behind)
    model._compiled_call_impl = compiled.dispatcher
    return compiled
