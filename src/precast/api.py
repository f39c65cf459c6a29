"""compile, status, wait, release: the only place where parts are chosen and joined.

A compiled model has one `CompiledModel`: its session (configuration, cache, compilers,
listeners), the dispatcher that serves calls, and what is to be told of it. For a module it
hangs at `nn.Module`'s own place for compiled calls, so that the object, its class, its
`state_dict` and its hooks stay what they are.
"""

from __future__ import annotations

import functools
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from precast.assembly import Assembly, LoadedAssembly, open_assembly
from precast.cache import CacheLoader, CacheStorage, open_cache
from precast.capture.fingerprint import call_signature, model_fingerprint
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
    from precast.capture.dynamo import Capture

ModelT = TypeVar("ModelT", bound=Callable[..., Any])

# Assemblies of one structure and signature: other constants, other ranges of sizes.
_MOST_CANDIDATES = 8


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
        self.manager = CompilerManager(config, self.loader, self.storage, self.emit)
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

    def __init__(
        self, function: types.FunctionType, owner: Any, session: Session, *, is_block: bool = False
    ) -> None:
        self.function = function
        self.owner = owner
        self.session = session
        self.is_block = is_block
        self.reasons: list[Reason] = []
        self.blocks: list[CompiledModel] = []
        self.dispatcher = Dispatcher(owner, function, self._resolve, self._report_failed_call)
        self.dispatcher.compiled = self
        self.is_warm: bool | None = None
        self.start_seconds: float | None = None
        self._lock = threading.RLock()
        self._gave_up: dict[str, Reason] = {}
        self._traced: Callable[..., Any] | None = None
        self._is_eager = session.config.compilation_level == "none"
        self._fingerprint: str | None = None

    # -- calls that no loaded assembly serves -----------------------------------

    def _resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call off the hot path: rebind, load, compile, or run eager with a reason."""
        run = self._find(args, kwargs)
        if run is None:
            return self.function(*args, **kwargs)
        return run(*args, **kwargs)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """Return what runs a call compiled; None: eager."""
        if self._is_eager or self._must_stay_eager(args, kwargs):
            return None
        with self._lock:
            if self._traced is not None:
                return self._traced
            if self.blocks:
                return None  # The blocks within are compiled, the rest is Python.
            signature = call_signature(args[self._num_owners :], kwargs)
            if signature in self._gave_up:
                return None
            loaded = self._rebind(args, kwargs) or self._start(args, kwargs, signature)
            if loaded is None or loaded.bound is None:
                return self._traced
            return loaded.bound.entry

    @property
    def _num_owners(self) -> int:
        return 0 if self.owner is None else 1

    def _must_stay_eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
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

    def _rebind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LoadedAssembly | None:
        """Bind a loaded assembly anew whose call check holds, where the model still fits."""
        for loaded in self.dispatcher.loaded:
            assert isinstance(loaded, LoadedAssembly)
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
        key = self._assembly_key(signature)
        loaded = self._load(key, args, kwargs, started)
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

    def _assembly_key(self, signature: str) -> str:
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.function, self.owner)
        return (
            self.session.hasher(self._device())
            .assembly_key(
                self._fingerprint, signature, _plain_settings(self.session.config.key_settings())
            )
            .digest
        )

    def _device(self) -> str:
        if self.owner is not None:
            for tensor in self.owner.parameters():
                if tensor.device.type != "cpu":
                    return tensor.device.type
                break
        return "cpu"

    # -- warm -----------------------------------------------------------------

    def _load(
        self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> LoadedAssembly | None:
        """Find a stored assembly for this call."""
        if self.session.config.revalidate == "always" and not self.dispatcher.loaded:
            return None
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
            self._install(loaded, started, is_warm=True)
            return loaded
        return None

    def _reject(self, key: str, problem: str) -> None:
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
            except Unrecordable as problem:
                self._trace_on_start(str(problem))
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
        assembly = self._assemble(capture, built)
        storable = assembly.to_json() if all(r.record is not None for r in built.results) else None
        slot_key = f"{key}-{self._free_candidate(key)}"
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

    def _assemble(self, capture: Capture, built: BuiltModel) -> Assembly:
        from precast.stitch import SerializableFunction

        assert capture.contract is not None
        position = {name: i for i, name in enumerate(capture.weights)}
        names = [slot.piece if slot is not None else "" for slot in built.slots.slots]
        return Assembly(
            call_check=capture.call_check(sorted(built.mutated), built.narrowed),
            contract=capture.contract.to_json(),
            entry=capture.entry.to_json(),
            execution=SerializableFunction(built.execution).to_json(),
            groups=[[position[name] for name in group] for group in built.groups],
            mutates=bool(built.mutated),
            pieces=[result.record for result in built.results],
            rest=[position[name] for name in built.rest],
            seconds=sum(result.seconds for result in built.results),
            slots=list(map(list, zip(built.slot_pieces, names, strict=True))),
            texts=built.texts,
        )

    def _free_candidate(self, key: str) -> int:
        """Return the first number that no sound assembly has, or the last one to replace."""
        known = {loaded.key for loaded in self.dispatcher.loaded}  # type: ignore[attr-defined]
        for number in range(_MOST_CANDIDATES):
            candidate = f"{key}-{number}"
            if candidate not in known and self.session.loader.manifest(candidate) is None:
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
            except Exception as error:
                # Dynamo raises before it runs anything, or what eager raises too.
                self._report_failed_call(None, error)
                self._is_eager = True
                return self.function(*args, **kwargs)

        self._traced = run

    # -- when it does not work ---------------------------------------------------

    def _fall_back(self, signature: str, error: PrecastError) -> None:
        if isinstance(error, CaptureError):
            self.session.emit(CaptureFailed(self.session.name, error.reason))
        self._give_up(signature, error.reason)
        if isinstance(error, CaptureError) and self.owner is not None and not self.dispatcher.loaded:
            self.blocks = [
                attach(block, Session.for_block(self.session, name), is_block=True)
                for name, block in find_blocks(self.owner)
            ]

    def _give_up(self, signature: str, reason: Reason) -> None:
        self._gave_up[signature] = reason
        self._note(reason)

    def _note(self, reason: Reason) -> None:
        if all(known.code != reason.code or known.message != reason.message for known in self.reasons):
            self.reasons.append(reason)
            self.session.emit(FellBack(self.session.name, None, reason))

    def _report_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loaded = self.dispatcher.loaded[-1]
        assert isinstance(loaded, LoadedAssembly)
        problem = loaded.why_not(args, kwargs) or "the model has changed"
        self.session.emit(
            CallOutsideContract(
                self.session.name,
                Reason("outside-contract", f"{problem}; this call is compiled anew", "nothing to do"),
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
        saved = loaded.assembly.seconds if is_warm else sum(
            result.seconds for result in (built.results if built else ()) if result.from_cache
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
            "blocks": [block.status() for block in self.blocks],
        }

    def detach(self) -> None:
        """Go back to eager and give everything back."""
        for block in self.blocks:
            block.detach()
        if self.owner is not None and self.owner._compiled_call_impl is self.dispatcher:
            self.owner._compiled_call_impl = None
        self.dispatcher.loaded = ()
        self._traced = None
        if not self.is_block:
            self.session.close()
            self.session.emit(ModelReleased(self.session.name))


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, PrecastError) else f"{type(error).__name__}: {error}"


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
    found = []
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            found.extend((f"{name}.{inner}", block) for inner, block in find_blocks(child))
        elif not type(child).__module__.startswith("torch.nn."):
            found.append((name, child))
        elif isinstance(child, torch.nn.Sequential):
            found.append((name, child))
    return found


# ---------------------------------------------------------------------------
# The public functions


@overload
def compile(  # noqa: A001
    model: ModelT,
    config: CompilationConfig | None = None,
    *,
    listeners: Iterable[Callable[[Event], None]] = (),
    **settings: Any,
) -> ModelT: ...
@overload
def compile(  # noqa: A001
    model: None = None,
    config: CompilationConfig | None = None,
    *,
    listeners: Iterable[Callable[[Event], None]] = (),
    **settings: Any,
) -> Callable[[ModelT], ModelT]: ...
def compile(  # noqa: A001
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

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled.dispatcher.forward(*args, **kwargs)

    call.__precast__ = compiled  # type: ignore[attr-defined]
    return call


def attach(model: torch.nn.Module, session: Session, *, is_block: bool = False) -> CompiledModel:
    """Let Precast serve a module's calls."""
    forward = model.forward
    function = forward.__func__ if isinstance(forward, types.MethodType) else forward
    owner_is_first = isinstance(forward, types.MethodType) and forward.__self__ is model
    if not isinstance(function, types.FunctionType) or not owner_is_first:
        # Somebody put another callable there (a wrapper for offloading, say): serve that.
        def function(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    compiled = CompiledModel(function, model, session, is_block=is_block)
    model._compiled_call_impl = compiled.dispatcher
    return compiled


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
