"""Which compiled assembly serves a call: the hot path, and the way out of it.

`Dispatcher` asks the loaded assemblies in turn: does the call fit (generated code), is the
model still as it was bound (loops in C)? The first that says yes runs. Everything else, a
first call, a new shape, a changed model, is `resolve`'s business, one thread at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_global_pre_hooks = torch.nn.modules.module._global_forward_pre_hooks
_global_hooks = torch.nn.modules.module._global_forward_hooks


class Runnable(Protocol):
    """What the hot path needs of a loaded assembly (`assembly.LoadedAssembly`)."""

    @property
    def check(self) -> Callable[..., int]:
        """0 where the assembly serves a call with these arguments."""

    @property
    def bound(self) -> Any:
        """The assembly tied to the model: `entry` and `is_current`."""

    @property
    def mutates(self) -> bool:
        """Whether a call writes into its arguments or the model."""


class Watcher(Protocol):
    """What is told of some of the calls: see `WatchedDispatcher`."""

    @property
    def numbers(self) -> Iterator[int]:
        """Gives each call its number."""

    @property
    def every(self) -> int:
        """One call in so many is handed to `run`."""

    num_calls: int

    def run(
        self,
        serve: Callable[..., Any],
        dispatcher: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return what `serve(dispatcher, *args, **kwargs)` returns."""


class Dispatcher:
    """Serves the calls of one model or function.

    Args:
        owner: The module whose `forward` is served; None for a plain function.
        eager: Runs a call as it would run without Precast; takes the owner first.
        resolve: Serves a call that no loaded assembly serves, and may load or compile one.
        report: Told of a compiled call that raised where eager did not: (assembly, error, args,
            kwargs).
    """

    __slots__ = (
        "_eager",
        "_owner_args",
        "_report",
        "_resolve",
        "compiled",
        "loaded",
        "owner",
        "watcher",
    )

    def __init__(
        self,
        owner: Any,
        eager: Callable[..., Any],
        resolve: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        report: Callable[[Any, BaseException, tuple[Any, ...], dict[str, Any]], None],
    ) -> None:
        self.owner = owner
        self.compiled: Any = None  # Whose dispatcher this is.
        self.loaded: tuple[Runnable, ...] = ()
        self.watcher: Watcher | None = None
        self._owner_args = () if owner is None else (owner,)
        self._eager = eager
        self._resolve = resolve
        self._report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Serve one call."""
        owner = self.owner
        if owner is not None:
            # Global hooks want every module, someone else's capture the model's own code.
            if _global_pre_hooks or _global_hooks or _is_dynamo_compiling():
                return owner._call_impl(*args, **kwargs)
            if owner._forward_pre_hooks or owner._forward_hooks:
                return call_with_hooks(owner, self.forward, args, kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Serve one call, the model's own hooks left out."""
        args = self._owner_args + args
        for assembly in self.loaded:
            try:
                # 0: the call is as the assembly wants it. Arguments that do not even bind raise.
                is_fit = not assembly.check(*args, **kwargs)
            except Exception:  # noqa: BLE001 - The arguments are anything a user may pass.
                continue
            bound = assembly.bound
            if is_fit and bound.is_current():
                # That no argument records gradients is part of the check.
                if _is_grad_enabled() and any_requires_grad(bound.weights):
                    break
                try:  # As `run` does, one call less on the hot path.
                    return bound.entry(*args, **kwargs)
                except Exception as error:  # noqa: BLE001 - raised again, or eager's turn.
                    return self._run_instead(assembly, error, args, kwargs)
        return self._resolve(args, kwargs)

    def watch(self, watcher: Watcher | None) -> None:
        """Hand some calls to a watcher from now on; None: to nobody, as before.

        It is the class that changes, so that a model which nobody watches pays nothing for it.
        """
        if watcher is None:
            self.__class__ = Dispatcher
        self.watcher = watcher
        if watcher is not None:
            self.__class__ = WatchedDispatcher

    def run(
        self, assembly: Runnable, bound: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call compiled; eager, if compiled code raises. `args` begin with the owner."""
        try:
            return bound.entry(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - raised again, or eager's turn.
            return self._run_instead(assembly, error, args, kwargs)

    def _run_instead(
        self, assembly: Runnable, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if assembly.mutates:
            raise error  # Half of a write may be done: running it again would be wrong.
        result = self._eager(*args, **kwargs)  # Raises too where the call is at fault.
        self._report(assembly, error, args, kwargs)
        return result


class WatchedDispatcher(Dispatcher):
    """A dispatcher of whose calls one in so many runs in its watcher's hands."""

    __slots__ = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Serve one call, the model's own hooks left out."""
        watcher = self.watcher
        if watcher is None:  # Another thread ended the watch a moment ago.
            return Dispatcher.forward(self, *args, **kwargs)
        watcher.num_calls = number = next(watcher.numbers)
        if number % watcher.every:
            return Dispatcher.forward(self, *args, **kwargs)
        return watcher.run(Dispatcher.forward, self, args, kwargs)


def any_requires_grad(tensors: Iterable[Any]) -> bool:
    """Whether eager would record gradients for one of these."""
    return any(tensor.requires_grad for tensor in tensors)


def call_with_hooks(
    module: torch.nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call `forward` between a module's own forward hooks, as `nn.Module.__call__` does.

    Backward hooks need gradients, which compiled code never has.
    """
    for identity, hook in list(module._forward_pre_hooks.items()):
        if identity in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(
                        "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {changed}."
                    )
                args, kwargs = changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    done: set[int] = set()
    try:
        result = forward(*args, **kwargs)
        for identity, hook in list(module._forward_hooks.items()):
            done.add(identity)
            changed = _run_hook(module, identity, hook, args, kwargs, result)
            if changed is not None:
                result = changed
        return result
    except Exception:
        # As torch does: hooks that asked to run always, run also after an error.
        for identity, hook in list(module._forward_hooks.items()):
            if identity in module._forward_hooks_always_called and identity not in done:
                try:
                    _run_hook(module, identity, hook, args, kwargs, None)
                except Exception as second:  # noqa: BLE001 - The first error is the one to raise.
                    warnings.warn(
                        f"module forward hook with ``always_call=True`` raised an exception "
                        f"that was silenced as another error was raised in forward: {second}",
                        stacklevel=2,
                    )
        raise


def _run_hook(
    module: torch.nn.Module,
    identity: int,
    hook: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
) -> Any:
    if identity in module._forward_hooks_with_kwargs:
        return hook(module, args, kwargs, result)
    return hook(module, args, result)
