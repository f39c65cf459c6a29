"""A second look at a warm start: what is traced again, when, and what its result means.

How the model gets into another process is `background/capture.py`'s business.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from precast.assembly import LoadedAssembly
from precast.binding import bind, what_differs
from precast.breakable import Breakable, EndingThread
from precast.capture.fingerprint import like_example
from precast.contract import Contract
from precast.errors import PrecastError, Reason
from precast.events import AssemblyRevalidated
from precast.session import Session

if TYPE_CHECKING:
    from precast.background.ambient import Ambient

# A start has better things to do than to look twice.
REVALIDATION_DELAY_S = 10.0


class _CallingOff:
    """What is under way, to be called off whenever that began."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self._ends: list[Callable[[], None]] = []

    def ask(self) -> None:
        """Call everything off, now and from now on."""
        self.is_asked.set()
        for end in list(self._ends):
            end()

    @contextlib.contextmanager
    def told(self, end: Callable[[], None]) -> Iterator[None]:
        """Have `end` called if this is called off within the block, or was before."""
        self._ends.append(end)
        try:
            if self.is_asked.is_set():
                end()
            yield
        finally:
            self._ends.remove(end)


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
        self._calling_off = _CallingOff()

    def disproves(
        self,
        loaded: LoadedAssembly,
        function: Any,
        owner: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Trace again as the settings say; True where that shows the assembly to be wrong now.

        Args:
            loaded: What is about to serve the call.
            function: What it serves.
            owner: The module that this is a method of; None for a function.
            args: The call's, without the owner.
            kwargs: The call's.
        """
        when = self._session.config.revalidate
        if when == "never":
            return False
        # Sizes decide what is dynamic: tensors of the captured call's shapes, of no values.
        alike = like_example(
            function, int(owner is not None), args, kwargs, loaded.assembly.example
        )
        if alike is None:
            self.why_not = "the captured call cannot be made again from this one"
            return False
        if when == "background":
            self._look_behind(loaded, function, owner, *alike)
            return False
        if self._session.config.mode == "progressive":
            # In this thread, which serves nothing, but in no serving process.
            from precast.background.ambient import Ambient

            ambient = Ambient.now(is_on_gpu=loaded.gpu is not None)
            return self._look(loaded, function, owner, *alike, ambient) is False
        from precast.background.capture import texts_of_call

        started = time.perf_counter()
        try:
            texts, _ = texts_of_call(
                function,
                owner,
                *alike,
                self._session.config,
                self._session.passes,
                loaded.assembly.packs,
            )
        except PrecastError:
            texts = []
        return not self._take_verdict(loaded, set(texts), time.perf_counter() - started)

    def _look_behind(
        self,
        loaded: LoadedAssembly,
        function: Any,
        owner: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        from precast.background.ambient import Ambient

        ambient = Ambient.now(is_on_gpu=loaded.gpu is not None)
        calling_off, breakable = self._calling_off, Breakable()

        def run() -> None:
            if not calling_off.is_asked.wait(REVALIDATION_DELAY_S):
                with breakable:
                    self._look(loaded, function, owner, args, kwargs, ambient)

        def end(patience_s: float) -> None:
            calling_off.ask()
            breakable.break_off(patience_s)

        try:
            EndingThread(run, name="precast-revalidate", end=end).start()
        except RuntimeError as problem:  # There is no thread left.
            self.why_not = str(problem)

    def _look(
        self,
        loaded: LoadedAssembly,
        function: Any,
        owner: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ambient: Ambient,
    ) -> bool | None:
        """Have a child trace it again; return the verdict, None: there is none."""
        from precast.background.capture import (
            CalledOffError,
            CaptureChild,
            dump_call,
            dump_model,
        )
        from precast.background.skeleton import CannotSendError

        child = CaptureChild()
        started = time.perf_counter()
        try:
            with self._calling_off.told(child.end):
                texts, contract = child.texts(
                    dump_model(function, owner),
                    dump_call(args, kwargs),
                    self._session.config,
                    self._session.passes,
                    loaded.assembly.packs,
                    ambient,
                )
        except (CannotSendError, PrecastError, OSError, ValueError) as problem:
            self.why_not = str(problem)
            return None
        except CalledOffError:
            return None
        with ambient.around() as is_alike:
            bound = None
            if is_alike and contract is not None:
                bound = bind(Contract.from_json(contract), function, owner, gpu=loaded.gpu)
        if isinstance(bound, Reason):
            self.why_not = f"a child process is in another state ({what_differs(bound)})"
            return None
        return self._take_verdict(loaded, texts, time.perf_counter() - started)

    def _take_verdict(self, loaded: LoadedAssembly, texts: set[str], seconds: float) -> bool:
        """Keep an assembly whose texts were found again; throw any other away. Return which."""
        is_valid = texts == set(loaded.assembly.texts)
        self._session.emit(AssemblyRevalidated(self._session.name, loaded.key, is_valid, seconds))
        if not is_valid:
            self._throw_away(loaded)
        return is_valid

    def call_off(self) -> None:
        """Let what is under way come to nothing."""
        self._calling_off.ask()
