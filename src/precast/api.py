"""compile, status, wait, release: the only place where parts are chosen and joined."""

from __future__ import annotations

import functools
import os
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch

from precast.config import CompilationConfig, is_switched_off
from precast.describe import describe
from precast.errors import ConfigError, Reason
from precast.events import Event
from precast.runtime.collector import no_collection
from precast.runtime.dispatch import Dispatcher
from precast.serving import CompiledModel, attach
from precast.session import open_session

ModelT = TypeVar("ModelT", bound=Callable[..., Any])


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
        if existing is not None and not isinstance(existing, Dispatcher):
            raise ConfigError(
                "model",
                type(model).__name__,
                "a module that is not compiled by torch already",
                "compile it with one of both: leave out model.compile()",
            )
        name = f"{type(model).__name__}"
        # A collection would fall due in the first call else, which is to be answered at once.
        with no_collection():
            session = open_session(name, config, settings, listeners)
        release(model)  # Now that the settings are known to be usable.
        if not session.is_disabled:
            with no_collection():
                attach(model, session)
        return model
    function = model
    if isinstance(function, types.MethodType) or not isinstance(function, types.FunctionType):
        raise ConfigError(
            "model",
            type(model).__name__,
            "an nn.Module or a plain function",
            "Wrap it: precast.compile(lambda *args: thing(*args))",
        )
    with no_collection():
        session = open_session(function.__qualname__, config, settings, listeners)
        if session.is_disabled:
            return function
        compiled = CompiledModel(function, None, session)

    dispatcher = compiled.dispatcher

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)  # A part of what someone else captures.
        return dispatcher.forward(*args, **kwargs)  # Looked up each time: it may be watched.

    call.__precast__ = compiled  # type: ignore[attr-defined]
    return call


def torch_backend(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    listeners: Iterable[Callable[[Event], None]] = (),
    **settings: Any,
) -> Callable[..., Any]:
    """Compile a graph that `torch.compile(model, backend="precast")` captured.

    Dynamo keeps its guards and traces at every start; the pieces are looked up in Precast's
    cache. `precast.compile` saves the tracing too. Options are settings of `CompilationConfig`,
    and `listeners`.

    Raises:
        ConfigError: An option is not a setting.
    """
    from precast.backend import compile_traced

    given = {**settings, **(options or {})}
    told = given.pop("listeners", listeners)
    session = open_session("torch.compile", None, given, told)
    if session.is_disabled:
        return graph_module.forward
    return compile_traced(graph_module, session)


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
        reason = (
            Reason("disabled", "PRECAST_DISABLE is set; models run eager", "Take the variable away")
            if is_switched_off()
            else Reason(
                "disabled", "Precast does not serve this model", "Call precast.compile(model) first"
            )
        )
        is_function = isinstance(model, types.FunctionType)
        name = model.__qualname__ if is_function else type(model).__name__
        return {"model": name, "assemblies": [], "reasons": [reason.as_dict()]}
    return describe(compiled)


def save_bundle(model: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write what a warm start of a compiled model needs into one file.

    Each kind of call that the model has served so far is in it. Elsewhere it is read where it
    lies, with the setting `bundle`, or copied into a cache by `precast bundle load`.
    It is signed where `signing_key` is set; without, readers need `allow_unsigned`.

    Returns:
        `path`, `bytes`, and how many `manifests` and `blobs`.

    Raises:
        PrecastError: The model has nothing that can be kept, or the file cannot be written.
    """
    from precast.cache.bundle_writing import keys_of
    from precast.errors import BundleIncompleteError

    compiled = _compiled_of(model)
    keys = [] if compiled is None else keys_of(describe(compiled))
    if compiled is None or not keys:
        raise BundleIncompleteError(os.fspath(path), "the model has served no call compiled")
    return compiled.session.loader.save_bundle(path, keys)


def save_report(model: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write what is known of a compiled model: its pieces, its starts, what they cost and saved.

    A path that ends in `.html` becomes a page that opens anywhere without a network; one that ends
    in `.json` becomes the recording that such a page is made from, for `precast report`.
    Nothing has to be planned for it: each compiled model remembers what happened around its starts.

    Returns:
        `path` and `bytes`.

    Raises:
        ConfigError: The path has another ending, or Precast does not serve the model.
        RecordingError: The file cannot be written.
    """
    from precast.monitoring.recording import recording_of, write_recording
    from precast.portrait import portray

    name = os.fspath(path)
    if not name.endswith((".html", ".json")):
        raise ConfigError("path", name, "a name that ends in .html or .json", "Choose one of both")
    compiled = _compiled_of(model)
    if compiled is None:
        raise ConfigError(
            "model",
            type(model).__name__,
            "a model that Precast serves",
            "Call precast.compile(model) first, and make the report before precast.release(model)",
        )
    recording = recording_of(compiled.session.recorder, portray(compiled))
    if name.endswith(".json"):
        return {"path": name, "bytes": write_recording(path, recording)}
    from precast.monitoring.report import write_report

    return {"path": name, "bytes": write_report(path, recording)}


def wait(model: Any, timeout: float | None = None) -> bool:
    """Return when no background work is left for a model; False where `timeout` seconds ran out.

    Args:
        model: As it was given to `precast.compile`.
        timeout: In seconds; None or infinity: as long as it takes.

    Raises:
        ValueError: The timeout is negative or no number.
        PrecastError: With `on_error="raise"`, what went wrong behind.
    """
    if timeout is not None and not timeout >= 0:  # Nor is NaN.
        raise ValueError(f"timeout must be None or at least 0 seconds, got {timeout!r}")
    if timeout is not None and timeout > threading.TIMEOUT_MAX:
        timeout = None  # No lock waits for centuries.
    compiled = _compiled_of(model)
    return compiled is None or compiled.wait(timeout)


def release(model: Any) -> None:
    """Go back to eager: compiled code, workers and temporary files are given back.

    Artifacts in the cache stay. A model that Precast does not serve is left alone.
    """
    compiled = _compiled_of(model)
    if compiled is not None:
        compiled.detach()
