"""compile, status, wait, release: the only place where parts are chosen and joined.

A compiled model has one `CompiledModel`: its session (configuration, cache, compilers,
listeners), the dispatcher that serves calls, and what is to be told of it. For a module it
hangs at `nn.Module`'s own place for compiled calls, so that the object, its class, its
`state_dict` and its hooks stay what they are.
"""

from __future__ import annotations

import functools
import gc
import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch

from precast.assembly import Assembly, LoadedAssembly, open_assembly
from precast.cache import CacheLoader, CacheStorage, open_cache
from precast.capture.fingerprint import (
    call_signature,
    example_shapes,
    like_example,
    model_fingerprint,
)
from precast.config import CompilationConfig, read_config
from precast.errors import (
    ArtifactError,
    CaptureError,
    ConfigError,
    PrecastError,
    Reason,
)
from precast.events import (
    AssemblyLoaded,
    AssemblyPublished,
    AssemblyRejected,
    AssemblyRevalidated,
    CallOutsideContract,
    CaptureFailed,
    CaptureFinished,
    Event,
    FellBack,
    Listeners,
    ModelReady,
    ModelReleased,
)
from precast.graph.key import HashComputer
from precast.manager import CompilerManager, check_compiler, eager_call
from precast.monitoring.log import LogListener
from precast.runtime.dispatch import Dispatcher, needs_gradient
from precast.runtime.slot import Slot, SlotTable

if TYPE_CHECKING:
    from precast.backend import BuiltModel
    from precast.background.service import CompileService
    from precast.capture.dynamo import Capture

ModelT = TypeVar("ModelT", bound=Callable[..., Any])

# Assemblies of one structure and signature: other constants, other ranges of sizes.
_MOST_CANDIDATES = 8
# Calls of one signature that eager refuses too, after which it is captured no more.
_MOST_FAILED_CALLS = 3
# A start has better things to do than to look twice.
REVALIDATION_DELAY_S = 10.0


class Session:
    """What the parts of one compiled model share."""

    def __init__(
        self,
        name: str,
        config: CompilationConfig,
        origins: Mapping[str, str],
        is_disabled: bool,
        listeners: Iterable[Callable[[Event], None]],
    ) -> None:
        self.name = name
        self.config = config
        self.origins = dict(origins)
        self.is_disabled = is_disabled
        log = LogListener()
        self._listeners = Listeners((log, *listeners), on_failure=log.note_failed_listener)
        if config.progress is not False and not is_disabled:
            from precast.monitoring.progress import ProgressListener

            self._listeners = Listeners(
                (log, ProgressListener(is_enabled=config.progress), *listeners),
                on_failure=log.note_failed_listener,
            )
        self.emit = self._listeners
        self.loader: CacheLoader
        self.storage: CacheStorage
        self.loader, self.storage = open_cache(
            config.cache_path(),
            disabled=config.disable_compile_cache,
            emit=self.emit,
            clock=time.perf_counter,
        )
        self.manager = CompilerManager(
            config, self.loader, self.storage, self.emit, self._make_service
        )
        self._hashers: dict[str, HashComputer] = {}

    @staticmethod
    def for_block(whole: Session, name: str) -> Session:
        """Return a session for a block of a model: the same parts under the block's name."""
        block = object.__new__(Session)
        block.__dict__.update(whole.__dict__)
        block.name = f"{whole.name}.{name}"
        return block

    def hasher(self, device: str) -> HashComputer:
        """Return what computes keys for a device type."""
        if device not in self._hashers:
            self._hashers[device] = HashComputer(device)
        return self._hashers[device]

    def _worker_environment(self) -> dict[str, str]:
        # Inductor writes a loop for the number of threads that its process has.
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        if self.config.compilation_level != "full":
            # Pieces are compiled side by side; a pool of compile processes in each worker takes
            # longer to start than a piece's few kernels take.
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        return environment

    def _make_service(self) -> CompileService:
        from precast.background.service import CompileService

        return CompileService(
            num_workers=self.config.num_compile_workers(),
            timeout_s=self.config.max_compile_time,
            memory_bytes=self.config.max_compile_memory,
            emit=self.emit,
            clock=time.perf_counter,
            environment=self._worker_environment(),
        )

    def close(self) -> None:
        """End workers and remove temporary files."""
        self.manager.close()
        self.loader.close()


def open_session(
    name: str,
    config: CompilationConfig | None,
    settings: Mapping[str, Any],
    listeners: Iterable[Callable[[Event], None]],
) -> Session:
    """Read the configuration and open what one model needs.

    Raises:
        ConfigError: A setting is unknown or not usable.
    """
    resolved = read_config(config, **settings)
    check_compiler(resolved.config.compiler)
    return Session(name, resolved.config, resolved.origins, resolved.is_disabled, listeners)


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
        self.not_revalidated: str | None = None
        self._call_off: list[Callable[[], None]] = []
        self.start_seconds: float | None = None
        self._lock = threading.RLock()
        self._gave_up: dict[str, Reason] = {}
        self._num_failed: dict[str, int] = {}
        self._unsound: set[str] = set()
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
        device = self._device(signature)
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
        try:
            return self._compile(key, args, kwargs, started)
        except PrecastError as error:
            if config.on_error == "raise":
                raise
            self._fall_back(signature, error)
        except Exception as error:
            # A mistake of ours must not stop a model that runs without us.
            if config.on_error == "raise":
                raise
            self._fall_back(signature, CaptureError(self.session.name, _in_words(error)))
        return None

    def _assembly_key(self, signature: str, device: str) -> str:
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.function, self.owner)
        settings = _plain_settings(self.session.config.key_settings())
        hasher = self.session.hasher(device)
        return hasher.assembly_key(self._fingerprint, signature, settings).digest

    def _device(self, signature: str) -> str:
        """Return the device type whose toolchain counts."""
        kinds = set(re.findall(r"torch\.\w+/\d+/(\w+)", signature))
        # By hand: `parameters()` costs ten times as much, milliseconds in a deep model.
        modules = [] if self.owner is None else [self.owner]
        seen = set(modules)
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                kinds.update(x.device.type for x in tensors.values() if x is not None)
            new = [x for x in module._modules.values() if x is not None and x not in seen]
            seen.update(new)
            modules.extend(new)
        return min(kinds - {"cpu"}, default="cpu")

    # -- warm -----------------------------------------------------------------

    def _load(
        self, key: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        """Find a stored assembly for this call."""
        known = {loaded.key for loaded in self.dispatcher.loaded}  # type: ignore[attr-defined]
        for number in range(_MOST_CANDIDATES):
            candidate = f"{key}-{number}"
            if candidate in known:
                continue
            manifest = self.session.loader.manifest(candidate)
            if manifest is None:
                return None
            try:
                loaded = self._open(manifest, candidate)
            except Exception as error:
                if self.session.config.on_error == "raise" and not isinstance(
                    error, ArtifactError | LookupError
                ):
                    raise
                self._reject(candidate, _in_words(error))
                continue
            if loaded is None:
                self._reject(candidate, "an artifact of it is missing or damaged")
                continue
            if loaded.why_not(args, kwargs) is not None:
                continue
            bound = loaded.bind(self.function, self.owner)
            if isinstance(bound, Reason):
                self.session.emit(AssemblyRejected(self.session.name, candidate, bound))
                continue
            loaded.bound = bound
            if self._is_disproved(loaded, device, args, kwargs):
                continue
            self._install(loaded, started, is_warm=True)
            return loaded
        return None

    # -- a second look at a warm start -------------------------------------------

    def _is_disproved(
        self, loaded: LoadedAssembly, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Trace again as the settings say; True where that shows the assembly to be wrong now."""
        when = self.session.config.revalidate
        if when == "never" or self.is_block:
            return False
        if when == "background" and device != "cpu":
            self.not_revalidated = "a second look would take the model's size again on the GPU"
            return False
        request = self._revalidation_request(loaded, args[self._num_owners :], kwargs)
        if request is None:
            self.not_revalidated = "the captured call cannot be made again from this one"
            return False
        if when == "background":
            self._revalidate_behind(loaded, request)
            return False
        from precast.background.revalidate import texts_of

        started = time.perf_counter()
        try:
            texts = texts_of(request)
        except PrecastError:
            texts = []
        return not self._take_verdict(loaded, set(texts), time.perf_counter() - started)

    def _revalidation_request(
        self, loaded: LoadedAssembly, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return what a second look needs; None where it would not see what the first one saw.

        Sizes decide what is dynamic: the second look gets tensors of the captured call's shapes.
        """
        alike = like_example(args, kwargs, loaded.assembly.example)
        if alike is None or loaded.assembly.contract["state"]["autocast"]:
            return None
        is_method = getattr(type(self.owner), "forward", None) is self.function
        return {
            "function": None if is_method else self.function,
            "owner": self.owner,
            "args": alike[0],
            "kwargs": alike[1],
            "config": self.session.config,
            "is_inference": torch.is_inference_mode_enabled(),
        }

    def _revalidate_behind(self, loaded: LoadedAssembly, request: dict[str, Any]) -> None:
        called_off = threading.Event()
        self._call_off.append(called_off.set)

        def run() -> None:
            if called_off.wait(REVALIDATION_DELAY_S):
                return
            from precast.background.revalidate import CannotRevalidateError, ask_child

            started = time.perf_counter()
            try:
                texts = ask_child(request, called_off)
            except CannotRevalidateError as problem:
                self.not_revalidated = str(problem)
                return
            if not called_off.is_set():
                self._take_verdict(loaded, texts, time.perf_counter() - started)

        # A daemon: the interpreter does not wait for it at exit, and the child ends with its pipe.
        threading.Thread(target=run, name="precast-revalidate", daemon=True).start()

    def _take_verdict(self, loaded: LoadedAssembly, texts: set[str], seconds: float) -> bool:
        """Keep an assembly whose texts were found again; throw any other away. Return which."""
        is_valid = texts == set(loaded.assembly.texts)
        self.session.emit(AssemblyRevalidated(self.session.name, loaded.key, is_valid, seconds))
        if not is_valid:
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
        return is_valid

    def _reject(self, key: str, problem: str) -> None:
        self._unsound.add(key)
        self.session.emit(
            AssemblyRejected(
                self.session.name,
                key,
                Reason(
                    "artifact-incompatible",
                    f"{problem}; the model is captured again",
                    "nothing to do: a new assembly takes its place",
                ),
            )
        )

    def _open(self, manifest: Mapping[str, Any], key: str) -> LoadedAssembly | None:
        """Load the code of a stored assembly; None where an artifact is not sound."""
        assembly = Assembly.from_json(manifest)
        calls = []
        for record in assembly.pieces:
            if "eager" in record:
                from precast.graph.piece import Piece

                calls.append(eager_call(Piece.from_json(record["eager"])))
                continue
            call = self.session.manager.load(record, name=self.session.name)
            if call is None:
                return None
            calls.append(call)
        slots = SlotTable()
        for number, name in assembly.slots:
            if number is None:
                slots.add(None, None)
                continue
            record = assembly.pieces[number]
            slots.add(calls[number], _slot_of_record(name, record))
        return open_assembly(assembly, key, slots, self.function)

    # -- cold -----------------------------------------------------------------

    def _compile(
        self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        from precast.backend import build_model
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
                self._trace_on_start(str(finding))
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
                self._trace_on_start(str(capture.unrecordable))
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
        assembly = self._assemble(capture, built, example_shapes(args[self._num_owners :], kwargs))
        storable = assembly.to_json() if all(r.record is not None for r in built.results) else None
        slot_key = f"{key}-{self._free_candidate(key, assembly)}"
        loaded = open_assembly(assembly, slot_key, built.slots, self.function)
        bound = loaded.bind(self.function, self.owner)
        if isinstance(bound, Reason):
            raise CaptureError(session.name, f"its contract does not hold at once: {bound.message}")
        loaded.bound = bound
        if storable is not None:
            session.manager.save(slot_key, storable)
            session.emit(AssemblyPublished(session.name, slot_key, len(str(storable))))
        self._install(loaded, started, is_warm=False, built=built)
        problem = loaded.why_not(args, kwargs)
        if problem is not None:
            # Compiled for less than this call asks (overlapping arguments, a narrowed range).
            self._note(
                Reason("outside-contract", f"{problem}; this call ran eager", "nothing to do")
            )
            self._gave_up[call_signature(args[self._num_owners :], kwargs)] = self.reasons[-1]
            return None
        return loaded

    def _assemble(self, capture: Capture, built: BuiltModel, example: list[list[int]]) -> Assembly:
        from precast.capture.dynamo import native_digests
        from precast.stitch import SerializableFunction

        assert capture.contract is not None
        capture.contract.code.extend(native_digests(built.execution.targets))
        position = {name: i for i, name in enumerate(capture.weights)}
        names = [slot.piece if slot is not None else "" for slot in built.slots.slots]
        return Assembly(
            call_check=capture.call_check(sorted(built.mutated), built.narrowed),
            contract=capture.contract.to_json(),
            entry=capture.entry.to_json(),
            example=example,
            execution=SerializableFunction(built.execution).to_json(),
            groups=[[position[name] for name in group] for group in built.groups],
            mutates=bool(built.mutated),
            pieces=[result.record for result in built.results],
            rest=[position[name] for name in built.rest],
            seconds=sum(result.seconds for result in built.results),
            slots=list(map(list, zip(built.slot_pieces, names, strict=True))),
            texts=built.texts,
        )

    def _free_candidate(self, key: str, assembly: Assembly) -> int:
        """Return the first number that no sound other assembly has, or the last one to replace."""
        known = {loaded.key for loaded in self.dispatcher.loaded}  # type: ignore[attr-defined]
        for number in range(_MOST_CANDIDATES):
            candidate = f"{key}-{number}"
            if candidate in known:
                continue
            manifest = self.session.loader.manifest(candidate)
            if manifest is None or candidate in self._unsound or _is_same(manifest, assembly):
                return number
        return _MOST_CANDIDATES - 1

    def _trace_on_start(self, problem: str) -> None:
        """Let Dynamo keep the guards: pieces still come from the cache, tracing is not saved."""
        from precast.backend import compile_traced

        self._note(
            Reason(
                "trace-on-start",
                f"{problem}; every start traces the model, pieces come from the cache",
                "keep such values out of what the model reads in forward",
            )
        )
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

    def _fall_back(self, signature: str, error: PrecastError) -> None:
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

    # -- what is known -----------------------------------------------------------

    def _install(
        self,
        loaded: LoadedAssembly,
        started: float,
        *,
        is_warm: bool,
        built: BuiltModel | None = None,
    ) -> None:
        # A new tuple: threads inside the old one go on with it.
        self.dispatcher.loaded = (*self.dispatcher.loaded, loaded)
        seconds = time.perf_counter() - started
        if self.start_seconds is None:
            self.start_seconds, self.is_warm = seconds, is_warm
        slots = [slot for slot in loaded.slots.slots if slot is not None]
        pieces = loaded.assembly.pieces
        saved = (
            loaded.assembly.seconds
            if is_warm
            else sum(
                result.seconds for result in (built.results if built else ()) if result.from_cache
            )
        )
        name = self.session.name
        if is_warm:
            self.session.emit(
                AssemblyLoaded(name, loaded.key, seconds, len(slots), len(pieces), saved)
            )
        num_eager = sum(slot.compiler == "eager" for slot in slots)
        self.session.emit(
            ModelReady(
                name,
                seconds,
                len(slots),
                len(pieces),
                len(slots) - num_eager,
                num_eager,
                len(pieces)
                if is_warm
                else sum(result.from_cache for result in (built.results if built else ())),
                saved,
                is_warm,
            )
        )

    def status(self) -> dict[str, Any]:
        """Return what runs compiled, from where, why not, and what it saved; as plain data."""
        return {
            "model": self.session.name,
            "is_disabled": self.session.is_disabled,
            "is_warm": self.is_warm,
            "start_seconds": self.start_seconds,
            "settings": {
                name: {"value": value, "from": self.session.origins.get(name, "default")}
                for name, value in self.session.config.as_dict().items()
            },
            "cache_dir": str(self.session.config.cache_path()),
            "assemblies": [
                {
                    "key": loaded.key,
                    "compile_seconds": loaded.assembly.seconds,
                    "unique_pieces": len(loaded.assembly.pieces),
                    "conditions": loaded.assembly.call_check["conditions"][1:],
                    "execution_code": loaded.assembly.execution["source"],
                    "pieces": [
                        {
                            "name": slot.piece,
                            "compiler": slot.compiler,
                            "from": slot.tier or "compiled here",
                            "seconds_saved": slot.seconds_saved,
                            "reason": None if slot.reason is None else slot.reason.as_dict(),
                        }
                        for slot in loaded.slots.slots
                        if slot is not None
                    ],
                }
                for loaded in self.dispatcher.loaded
                if isinstance(loaded, LoadedAssembly)
            ],
            "reasons": [reason.as_dict() for reason in self.reasons],
            "not_revalidated": self.not_revalidated,
            "blocks": [block.status() for block in self.blocks],
        }

    def _go_back(self) -> None:
        """Forget everything that was compiled."""
        for block in self.blocks:
            block.detach()
        self.blocks = []
        self.dispatcher.loaded = ()
        self._traced = None
        self._gave_up.clear()

    def detach(self) -> None:
        """Go back to eager and give everything back."""
        for call_off in self._call_off:
            call_off()
        self._go_back()
        if self.owner is not None and self.owner._compiled_call_impl is self.dispatcher:
            self.owner._compiled_call_impl = None
        if not self.is_block:
            self.session.close()
            self.session.emit(ModelReleased(self.session.name))


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, PrecastError) else f"{type(error).__name__}: {error}"


def _is_same(manifest: Mapping[str, Any], assembly: Assembly) -> bool:
    """Whether a stored assembly asks for the same as another, which may then take its place."""
    stored: Any = manifest.get("call_check")
    return (
        manifest.get("contract") == assembly.contract
        and isinstance(stored, Mapping)
        and stored.get("source") == assembly.call_check["source"]
        and stored.get("constants") == assembly.call_check["constants"]
    )


def _slot_of_record(name: str, record: Mapping[str, Any]) -> Slot:
    if "eager" in record:
        reason = record["reason"]
        return Slot(name, compiler="eager", reason=None if reason is None else Reason(**reason))
    return Slot(name, compiler=record["compiler"], tier="cache", seconds_saved=record["seconds"])


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that count in a key, as text; an object counts by its identity or repr."""
    plain = {}
    for name, value in settings.items():
        identity = getattr(value, "identity", None)
        plain[name] = repr(identity() if callable(identity) else value)
    return plain


def find_blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the outermost sub-modules worth compiling alone, with their paths.

    Entries of module lists come one by one; modules of `torch.nn` itself are too small.
    """
    found: list[tuple[str, torch.nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            found.extend((f"{name}.{inner}", block) for inner, block in find_blocks(child))
        elif isinstance(child, torch.nn.Sequential) or not type(child).__module__.startswith(
            "torch.nn."
        ):
            found.append((name, child))
    return found


# ---------------------------------------------------------------------------
# The public functions


@overload
def compile(
    model: ModelT,
    config: CompilationConfig | None = None,
    *,
    listeners: Iterable[Callable[[Event], None]] = (),
    **settings: Any,
) -> ModelT: ...
@overload
def compile(
    model: None = None,
    config: CompilationConfig | None = None,
    *,
    listeners: Iterable[Callable[[Event], None]] = (),
    **settings: Any,
) -> Callable[[ModelT], ModelT]: ...
def compile(
    model: Any = None,
    config: CompilationConfig | None = None,
    *,
    listeners: Iterable[Callable[[Event], None]] = (),
    **settings: Any,
) -> Any:
    """Compile a model for inference; its start is warm from the second process on.

    Returns at once: the first call of each signature loads the compiled code from the cache
    (milliseconds) or compiles it (with `mode="blocking"`). A module is changed in place and is
    the same object; a function is wrapped. Usable as a decorator, with or without settings.

    Args:
        model: An `nn.Module` or a function.
        config: Settings as one value; `settings` win over it.
        listeners: Called with every event, for example a `CompilationCounter`.
        **settings: Fields of `CompilationConfig`.

    Raises:
        ConfigError: A setting is unknown or not usable, or the model cannot be compiled at all.
    """
    if model is None:
        return functools.partial(compile, config=config, listeners=listeners, **settings)
    if isinstance(model, torch.nn.Module):
        existing = model._compiled_call_impl
        if isinstance(existing, Dispatcher):
            release(model)
        elif existing is not None:
            raise ConfigError(
                "model",
                type(model).__name__,
                "a module that is not compiled by torch already",
                "compile it with one of both: leave out model.compile()",
            )
        name = f"{type(model).__name__}"
        session = open_session(name, config, settings, listeners)
        if not session.is_disabled:
            attach(model, session)
        return model
    function = model
    if isinstance(function, types.MethodType) or not isinstance(function, types.FunctionType):
        raise ConfigError(
            "model",
            f"a {type(model).__name__}",
            "an nn.Module or a plain function",
            "wrap it: precast.compile(lambda *args: thing(*args))",
        )
    session = open_session(function.__qualname__, config, settings, listeners)
    if session.is_disabled:
        return function
    compiled = CompiledModel(function, None, session)

    serve = compiled.dispatcher.forward

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)  # A part of what someone else captures.
        return serve(*args, **kwargs)

    call.__precast__ = compiled  # type: ignore[attr-defined]
    return call


def torch_backend(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """Compile a graph that `torch.compile(model, backend="precast")` captured.

    Dynamo keeps its guards and traces at every start; the pieces are looked up in Precast's
    cache. `precast.compile` saves the tracing too. Options are settings of `CompilationConfig`.

    Raises:
        ConfigError: An option is not a setting.
    """
    from precast.backend import compile_traced

    session = open_session("torch.compile", None, {**settings, **(options or {})}, ())
    if session.is_disabled:
        return graph_module.forward
    return compile_traced(graph_module, session)


def attach(model: torch.nn.Module, session: Session, *, is_block: bool = False) -> CompiledModel:
    """Let Precast serve a module's calls."""
    compiled = CompiledModel(None, model, session, is_block=is_block)
    model._compiled_call_impl = compiled.dispatcher
    return compiled


def find_forward(model: torch.nn.Module) -> types.FunctionType | None:
    """Return a module's `forward` unbound; None: it is no method of the module."""
    forward: Any = model.forward
    if isinstance(forward, types.MethodType) and forward.__self__ is model:
        function = forward.__func__
        return function if isinstance(function, types.FunctionType) else None
    return None


def wrap_forward() -> types.FunctionType:
    """Return a method for a module whose `forward` somebody replaced, to offload it, say."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    return cast("types.FunctionType", forward)


def _compiled_of(model: Any) -> CompiledModel | None:
    if isinstance(model, torch.nn.Module):
        dispatcher = model._compiled_call_impl
        return dispatcher.compiled if isinstance(dispatcher, Dispatcher) else None
    return getattr(model, "__precast__", None)


def status(model: Any) -> dict[str, Any]:
    """Return which pieces run compiled, from where, why not, and the seconds saved.

    Plain data, made for printing or JSON; for a model that Precast does not serve it says so
    in `reasons`.
    """
    compiled = _compiled_of(model)
    if compiled is None:
        reason = Reason(
            "disabled", "Precast does not serve this model", "call precast.compile(model) first"
        )
        return {"model": type(model).__name__, "assemblies": [], "reasons": [reason.as_dict()]}
    return compiled.status()


def wait(model: Any, timeout: float | None = None) -> bool:
    """Return when no background work is left for a model; False where `timeout` seconds ran out."""
    compiled = _compiled_of(model)
    if compiled is None:
        return True
    got = compiled._lock.acquire(timeout=-1 if timeout is None else timeout)
    if got:
        compiled._lock.release()
    return got


def release(model: Any) -> None:
    """Go back to eager: compiled code, workers and temporary files are given back.

    Artifacts in the cache stay. A model that Precast does not serve is left alone.
    """
    compiled = _compiled_of(model)
    if compiled is not None:
        compiled.detach()
