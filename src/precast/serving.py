"""Serving the calls of one model: load, compile, or run eager with a reason.

A compiled model has one `CompiledModel`: its session (configuration, cache, compilers,
listeners), the dispatcher that serves calls, and what is to be told of it. For a module it
hangs at `nn.Module`'s own place for compiled calls, so that the object, its class, its
`state_dict` and its hooks stay what they are.
"""

from __future__ import annotations

import gc
import threading
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from precast.assembly import LoadedAssembly, open_assembly
from precast.candidates import Candidates
from precast.capture.fingerprint import call_signature, example_shapes, model_fingerprint
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
)
from precast.owner import device_of, find_blocks, find_forward, wrap_forward
from precast.report import emit_start
from precast.runtime.dispatch import Dispatcher, needs_gradient
from precast.second_look import SecondLook
from precast.session import Session

if TYPE_CHECKING:
    from precast.backend import BuiltModel

# Calls of one signature that eager refuses too, after which it is captured no more.
_MOST_FAILED_CALLS = 3


class CompiledModel:
    """One model or function that Precast serves."""

    def __init__(self, function: Any, owner: Any, session: Session, *, is_block: bool = False):
        """Start nothing yet.

        Args:
            function: The function to serve; None: what the owner's `forward` is.
            owner: The module that it is a method of; None for a function.
            session: What the parts share.
            is_block: It is a block of a model that could not be captured whole.
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

    # -- calls that no loaded assembly serves -----------------------------------

    def _resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call off the hot path: rebind, load, compile, or run eager with a reason."""
        found, failed = self._find(args, kwargs)
        if isinstance(found, LoadedAssembly):
            return self.dispatcher.run(found, found.bound, args, kwargs)
        if found is not None:
            return found(*args, **kwargs)
        try:
            return self.function(*args, **kwargs)
        except Exception:
            if failed is not None:
                self._take_back(failed)
            raise

    def _run_eager(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[LoadedAssembly | Callable[..., Any] | None, str | None]:
        """Return what runs a call, None: eager; and the signature if it was just given up."""
        self._follow_forward()
        if self._is_eager or self._must_stay_eager(args, kwargs):
            return None, None
        with self._lock:
            if self._traced is not None:
                return self._traced, None
            if self.blocks:
                return None, None  # The blocks within are compiled, the rest is Python.
            signature = call_signature(args[self._num_owners :], kwargs)
            loaded = self._rebind(args, kwargs)
            if loaded is not None:
                return loaded, None
            if signature in self._gave_up:
                return None, None
            loaded = self._start(args, kwargs, signature)
            if loaded is not None:
                return loaded, None
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
                "call the model under torch.inference_mode() or torch.no_grad()",
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
            loaded.bound = bound
            return loaded
        return None

    def _start(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str
    ) -> LoadedAssembly | None:
        started = time.perf_counter()
        device = device_of(self.owner, signature)
        key = self._assembly_key(signature, device)
        # A large assembly is thousands of small lists, and one full collection, over everything
        # that torch holds, takes longer than the whole start.
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            loaded = self._load(key, device, args, kwargs, started)
        finally:
            if is_collecting:
                gc.collect(0)  # Only what is new, or the full collection follows right away.
                gc.enable()
        if loaded is not None:
            return loaded
        config = self.session.config
        if config.mode == "cache_only":
            self._give_up(
                signature,
                Reason(
                    "not-recorded",
                    'mode="cache_only" found nothing for this call; it runs eager',
                    'fill the cache with mode="blocking" first',
                ),
            )
            return None
        if len(self.dispatcher.loaded) >= config.max_assemblies:
            self._give_up(
                signature,
                Reason(
                    "recompile-limit",
                    f"{config.max_assemblies} compiled signatures are in use; this call runs eager",
                    "raise max_assemblies, or give dynamic_shapes so that one covers more calls",
                ),
            )
            return None
        if self.dispatcher.loaded:
            self._report_outside(args, kwargs)
        # Of the processes that miss this at once, one captures and compiles; the others load.
        with self.session.manager.turn(
            key,
            lambda: self._candidates.is_new(key),
            lambda: self._load(key, device, args, kwargs, started),
        ) as found:
            if found is not None:
                return found
            try:
                return self._compile(key, args, kwargs, started)
            except PrecastError as error:
                if config.on_error == "raise":
                    raise
                self._fall_back(signature, error, key)
            except Exception as error:
                # A mistake of ours must not stop a model that runs without us.
                if config.on_error == "raise":
                    raise
                self._fall_back(signature, CaptureError(self.session.name, in_words(error)), key)
        return None

    def _assembly_key(self, signature: str, device: str) -> str:
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.function, self.owner)
        return self.session.assembly_key(self._fingerprint, signature, device)

    # -- warm -----------------------------------------------------------------

    def _load(
        self, key: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        """Find a stored assembly for this call."""
        known = {loaded.key for loaded in self.dispatcher.loaded}  # type: ignore[attr-defined]
        problem = None
        for loaded in self._candidates.sound(key, known, self.function):
            problem = loaded.why_not(args, kwargs)
            if problem is not None:
                continue
            bound = loaded.bind(self.function, self.owner)
            if isinstance(bound, Reason):
                problem = bound.message
                self.session.emit(AssemblyRejected(self.session.name, loaded.key, bound))
                continue
            loaded.bound = bound
            if not self.is_block and self.second_look.disproves(
                loaded, self.function, self.owner, device, args[self._num_owners :], kwargs
            ):
                continue
            self._install(loaded, started, None)
            return loaded
        self.session.emit(
            AssemblyMissed(self.session.name, key, self.session.key_parts(key), problem)
        )
        return None

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
                "report it: the contract should have noticed",
            )
        )

    # -- cold -----------------------------------------------------------------

    def _compile(
        self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        from precast.backend import assemble, build_model
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
            built = build_model(
                capture.graph_module,
                ranges=capture.ranges,
                sources=capture.sources,
                arguments=capture.entry.arguments,
                weights=capture.weights,
                config=session.config,
                manager=session.manager,
                emit=session.emit,
                name=session.name,
            )
        finally:
            session.manager.close()
        assembly = assemble(capture, built, example_shapes(args[self._num_owners :], kwargs))
        storable = assembly.to_json() if all(r.record is not None for r in built.results) else None
        known = {loaded.key for loaded in self.dispatcher.loaded}  # type: ignore[attr-defined]
        slot_key = self._candidates.free_name(key, known, assembly)
        loaded = open_assembly(assembly, slot_key, built.slots, self.function)
        bound = loaded.bind(self.function, self.owner)
        if isinstance(bound, Reason):
            raise CaptureError(session.name, f"its contract does not hold at once: {bound.message}")
        loaded.bound = bound
        if storable is None:
            self._note_unkept(key, Reason("compile-failed", "a piece cannot be kept", "nothing"))
        else:
            labels = {"model": session.name, "parts": session.key_parts(key)}
            session.manager.save(slot_key, {**storable, **labels})
            session.emit(AssemblyPublished(session.name, slot_key, len(str(storable))))
        self._install(loaded, started, built)
        problem = loaded.why_not(args, kwargs)
        if problem is not None:
            # Compiled for less than this call asks (overlapping arguments, a narrowed range).
            self._note(
                Reason("outside-contract", f"{problem}; this call ran eager", "nothing to do")
            )
            self._gave_up[call_signature(args[self._num_owners :], kwargs)] = self.reasons[-1]
            return None
        return loaded

    def _install(self, loaded: LoadedAssembly, started: float, built: BuiltModel | None) -> None:
        # A new tuple: threads inside the old one go on with it.
        self.dispatcher.loaded = (*self.dispatcher.loaded, loaded)
        seconds = time.perf_counter() - started
        if self.start_seconds is None:
            self.start_seconds, self.is_warm = seconds, built is None
        emit_start(self.session, loaded, seconds, built)

    def _trace_on_start(self, problem: str, key: str) -> None:
        """Let Dynamo keep the guards: pieces still come from the cache, tracing is not saved."""
        from precast.backend import compile_traced

        reason = Reason(
            "trace-on-start",
            f"{problem}; every start traces the model, pieces come from the cache",
            "keep such values out of what the model reads in forward",
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
                self._report_failed_call(None, error)
                self._is_eager = True
                return result

        self._traced = run

    # -- when it does not work ---------------------------------------------------

    def _note_unkept(self, key: str, reason: Reason) -> None:
        """Note that a capture leaves nothing to load: then no process need wait for another's."""
        self.session.manager.remember(key, reason, ("capture-failed",))

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
                attach(block, Session.for_block(self.session, name), is_block=True)
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
                    "outside-contract", f"{problem}; this call is compiled anew", "nothing to do"
                ),
            )
        )

    def _report_failed_call(self, loaded: Any, error: BaseException) -> None:
        """A compiled call raised: it is run eager, which raises too if the call is at fault."""
        self._note(
            Reason(
                "compile-crashed",
                f"compiled code raised {type(error).__name__}: {error}; the call ran eager",
                "if eager does not raise for this call, please report it",
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
        """Return when nothing is loaded, compiled or written; False where time ran out."""
        end_s = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._lock.release()
        left_s = None if end_s is None else max(end_s - time.monotonic(), 0.0)
        return self.session.storage.flush(left_s)

    def detach(self) -> None:
        """Go back to eager and give everything back."""
        self.second_look.call_off()
        self._go_back()
        if self.owner is not None and self.owner._compiled_call_impl is self.dispatcher:
            self.owner._compiled_call_impl = None
        if not self.is_block:
            self.session.close()
            self.session.emit(ModelReleased(self.session.name))


def attach(model: torch.nn.Module, session: Session, *, is_block: bool = False) -> CompiledModel:
    """Let Precast serve a module's calls."""
    compiled = CompiledModel(None, model, session, is_block=is_block)
    model._compiled_call_impl = compiled.dispatcher
    return compiled
