"""A second look at a warm start: what is traced again, when, and what its result means.

How the model gets into another process is `background/revalidate.py`'s business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from precast.assembly import LoadedAssembly
from precast.capture.fingerprint import like_example
from precast.errors import PrecastError
from precast.events import AssemblyRevalidated
from precast.session import Session

# A start has better things to do than to look twice.
REVALIDATION_DELAY_S = 10.0


class SecondLook:
    """Looks twice at what one model loads.

    Args:
        session: Says when to look, and is told what was found.
        throw_away: Called with an assembly that was shown to be wrong, from any thread.
    """

    def __init__(self, session: Session, throw_away: Callable[[LoadedAssembly], None]) -> None:
        self.why_not: str | None = None  # Why a second look was left out.
        self._session = session
        self._throw_away = throw_away
        self._call_off: list[Callable[[], None]] = []

    def disproves(
        self,
        loaded: LoadedAssembly,
        function: Any,
        owner: Any,
        device: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Trace again as the settings say; True where that shows the assembly to be wrong now.

        Args:
            loaded: What is about to serve the call.
            function: What it serves.
            owner: The module that this is a method of; None for a function.
            device: The device type of the call.
            args: The call's, without the owner.
            kwargs: The call's.
        """
        when = self._session.config.revalidate
        if when == "never":
            return False
        if when == "background" and device != "cpu":
            self.why_not = "a second look would take the model's size again on the GPU"
            return False
        request = self._request(loaded, function, owner, args, kwargs)
        if request is None:
            self.why_not = "the captured call cannot be made again from this one"
            return False
        if when == "background":
            self._look_behind(loaded, request)
            return False
        from precast.background.revalidate import texts_of

        started = time.perf_counter()
        try:
            texts = texts_of(request)
        except PrecastError:
            texts = []
        return not self._take_verdict(loaded, set(texts), time.perf_counter() - started)

    def _request(
        self,
        loaded: LoadedAssembly,
        function: Any,
        owner: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Any] | None:
        """Return what a second look needs; None where it would not see what the first one saw.

        Sizes decide what is dynamic: the second look gets tensors of the captured call's shapes.
        """
        alike = like_example(args, kwargs, loaded.assembly.example)
        if alike is None or loaded.assembly.contract["state"]["autocast"]:
            return None
        is_method = getattr(type(owner), "forward", None) is function
        return {
            "function": None if is_method else function,
            "owner": owner,
            "args": alike[0],
            "kwargs": alike[1],
            "config": self._session.config,
            "packs": loaded.assembly.packs,
            "is_inference": torch.is_inference_mode_enabled(),
        }

    def _look_behind(self, loaded: LoadedAssembly, request: dict[str, Any]) -> None:
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
                self.why_not = str(problem)
                return
            if not called_off.is_set():
                self._take_verdict(loaded, texts, time.perf_counter() - started)

        # A daemon: the interpreter does not wait for it at exit, and the child ends with its pipe.
        threading.Thread(target=run, name="precast-revalidate", daemon=True).start()

    def _take_verdict(self, loaded: LoadedAssembly, texts: set[str], seconds: float) -> bool:
        """Keep an assembly whose texts were found again; throw any other away. Return which."""
        is_valid = texts == set(loaded.assembly.texts)
        self._session.emit(AssemblyRevalidated(self._session.name, loaded.key, is_valid, seconds))
        if not is_valid:
            self._throw_away(loaded)
        return is_valid

    def call_off(self) -> None:
        """Let what is under way come to nothing."""
        for call_off in self._call_off:
            call_off()
