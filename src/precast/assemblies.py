"""The assemblies that serve one model: how they are found, bound, kept and taken out again.

Which call asks for one, and what is done where there is none, is the business of `serving.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from precast.assembly import Assembly, Bound, LoadedAssembly, open_assembly
from precast.binding import what_differs
from precast.candidates import Candidates
from precast.describe import emit_start
from precast.errors import CaptureError, Reason
from precast.events import AssemblyMissed, AssemblyPublished, AssemblyRejected
from precast.second_look import SecondLook

if TYPE_CHECKING:
    import types

    import torch

    from precast.piece_result import PieceResult
    from precast.runtime.dispatch import Dispatcher
    from precast.runtime.slot import SlotTable
    from precast.session import Session


class Assemblies:
    """The assemblies of one model.

    `lock` is held by whoever decides on what serves a call. `is_warm` and `start_seconds` say how
    the first start went, `not_sampled` why no call is checked in service.
    """

    def __init__(
        self,
        session: Session,
        dispatcher: Dispatcher,
        owner: torch.nn.Module | None,
        *,
        run_eager: Callable[..., Any],
        on_wrong: Callable[[], None],
        note: Callable[[Reason], None],
        looks_twice: bool,
    ) -> None:
        """Load nothing yet.

        Args:
            session: Of the model.
            dispatcher: Serves calls by what is here.
            owner: The module that is served; None: a function is.
            run_eager: Runs a call eager, beside calls that are served.
            on_wrong: Called where one was found to be wrong in service: others may be, too.
            note: Told what is to be known of the assemblies.
            looks_twice: What is loaded is traced again, as the settings say.
        """
        self.lock = threading.RLock()
        self.is_warm: bool | None = None
        self.start_seconds: float | None = None
        self.not_sampled: str | None = None
        self.second_look = SecondLook(session, self._throw_away)
        self._session = session
        self._dispatcher = dispatcher
        self._owner = owner
        self._run_eager = run_eager
        self._on_wrong = on_wrong
        self._note = note
        self._looks_twice = looks_twice
        self._candidates = Candidates(session)

    def follow_fork(self) -> None:
        """Go on in a forked process, where no thread is left that would let a lock go."""
        self.lock = threading.RLock()
        self.second_look = SecondLook(self._session, self._throw_away)

    @property
    def loaded(self) -> tuple[LoadedAssembly, ...]:
        """Those that serve calls now, in the order in which they are asked."""
        return self._dispatcher.loaded  # type: ignore[return-value]

    def _known(self) -> set[str]:
        return {loaded.key for loaded in self.loaded}

    def _known_on(self, gpu: int | None) -> set[str]:
        """Return the names of what need not be loaded once more: for another GPU it is."""
        return {loaded.key for loaded in self.loaded if loaded.gpu in (None, gpu)}

    # -- finding -----------------------------------------------------------------

    def rebind(
        self, function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LoadedAssembly | None:
        """Bind a loaded assembly anew whose call check holds, where the model still fits."""
        for loaded in self.loaded:
            loaded.follow_defaults(function)
            if loaded.why_not(args, kwargs) is not None:
                continue
            if self._bind(loaded, function) is None:
                return loaded
        return None

    def load(
        self,
        key: str,
        function: types.FunctionType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        started: float,
        gpu: int | None,
    ) -> LoadedAssembly | None:
        """Find a stored assembly for a call, and let it serve from now on.

        Args:
            key: Of the call.
            function: What is called.
            args: The call's, with the owner.
            kwargs: The call's.
            started: When the start began.
            gpu: The number of the GPU that the model is on.
        """
        problem = None
        for loaded in self._candidates.sound(key, self._known_on(gpu), function, gpu):
            problem = loaded.why_not(args, kwargs)
            if problem is not None:
                continue
            rejected = self._bind(loaded, function)
            if rejected is not None:
                problem = rejected.message
                continue
            own_args = args if self._owner is None else args[1:]
            if self._looks_twice and self.second_look.disproves(
                loaded, function, self._owner, own_args, kwargs
            ):
                continue
            self.add(loaded)
            self.note_start(loaded, time.perf_counter() - started, None)
            return loaded
        self._session.emit(
            AssemblyMissed(self._session.name, key, self._session.key_parts(key), problem)
        )
        return None

    def _bind(self, loaded: LoadedAssembly, function: types.FunctionType) -> Reason | None:
        """Tie an assembly to the model as it is now, or tell why it is not for it."""
        bound = loaded.bind(function, self._owner)
        if isinstance(bound, Reason):
            self._session.emit(AssemblyRejected(self._session.name, loaded.key, bound))
            return bound
        self.tie(loaded, bound, function)
        return None

    def is_new(self, key: str) -> bool:
        """Whether there is a stored assembly that was not when one was last looked for."""
        return self._candidates.is_new(key)

    # -- new ones ----------------------------------------------------------------

    def open(
        self,
        key: str,
        assembly: Assembly,
        slots: SlotTable,
        function: types.FunctionType,
        gpu: int | None,
    ) -> LoadedAssembly:
        """Return an assembly, not bound yet, under the name by which it will be found again."""
        name = self._candidates.free_name(key, self._known(), assembly)
        return open_assembly(assembly, name, slots, function, gpu)

    def bind_new(self, loaded: LoadedAssembly, function: types.FunctionType) -> None:
        """Bind an assembly to the model that it was made from.

        Raises:
            CaptureError: Its contract does not hold for the model.
        """
        bound = loaded.bind(function, self._owner)
        if isinstance(bound, Reason):
            raise CaptureError(
                self._session.name, f"its contract does not hold at once: {what_differs(bound)}"
            )
        self.tie(loaded, bound, function)

    def rename(self, loaded: LoadedAssembly, key: str) -> None:
        """Give a loaded assembly that has changed the name by which it will be found again."""
        known = self._known() - {loaded.key}
        loaded.key = self._candidates.free_name(key, known, loaded.assembly)

    def tie(self, loaded: LoadedAssembly, bound: Bound, function: types.FunctionType) -> None:
        """Let a loaded assembly run as it is bound now, to serve a function."""
        if self._session.config.verify == "sample":
            from precast.sampling import Sampler, why_not_sampled

            self.not_sampled = why_not_sampled(loaded.entry_code, loaded.mutates)
            if self.not_sampled is None:
                bound.entry = Sampler(
                    bound.entry,
                    self._run_eager,
                    self._session.config.verify_every,
                    partial(self._refute, loaded, function),
                )
        loaded.bound = bound

    def publish(self, loaded: LoadedAssembly, key: str) -> bool:
        """Store an assembly; False: a piece of it cannot be found again, so it is not kept."""
        if None in loaded.assembly.pieces:
            return False
        data = loaded.assembly.to_json()
        labels = {"model": self._session.name, "parts": self._session.key_parts(key)}
        self._session.manager.save(loaded.key, {**data, **labels})
        self._session.emit(AssemblyPublished(self._session.name, loaded.key, len(str(data))))
        return True

    def note_start(
        self, loaded: LoadedAssembly, seconds: float, results: Sequence[PieceResult] | None
    ) -> None:
        """Tell that an assembly serves; `results` are its pieces', None: it was loaded."""
        if self.start_seconds is None:
            self.start_seconds, self.is_warm = seconds, results is None
        emit_start(self._session, loaded, seconds, results)

    # -- which of them serve -------------------------------------------------------

    # A new tuple each time: threads inside the old one go on with it.

    def add(self, loaded: LoadedAssembly) -> None:
        """Let an assembly serve."""
        with self.lock:
            self._dispatcher.loaded = (*self._dispatcher.loaded, loaded)

    def replace(self, loaded: LoadedAssembly, successor: LoadedAssembly) -> None:
        """Let another assembly serve in the place of one."""
        with self.lock:
            self._dispatcher.loaded = tuple(
                successor if other is loaded else other for other in self._dispatcher.loaded
            )

    def remove(self, loaded: LoadedAssembly) -> None:
        """Let an assembly serve no more."""
        with self.lock:
            self._dispatcher.loaded = tuple(
                other for other in self._dispatcher.loaded if other is not loaded
            )

    def _remove_key(self, key: str) -> None:
        """Let what is stored under a key serve no more, on any GPU."""
        with self.lock:
            self._dispatcher.loaded = tuple(
                other
                for other in self._dispatcher.loaded
                if other.key != key  # type: ignore[attr-defined]
            )

    def remove_all(self) -> None:
        """Let none serve any more."""
        self._dispatcher.loaded = ()

    def _refute(
        self,
        loaded: LoadedAssembly,
        function: types.FunctionType,
        problem: str,
        args: Any,
        kwargs: Any,
    ) -> None:
        """Use an assembly no more that was found to be wrong in service, nor what made it so.

        The pieces at fault are thrown out. Where none can be found, all are, and calls of its kind
        run eager for as long as failures are remembered.
        """
        from precast.blame import find_wrong_pieces, throw_all_out, throw_out

        with self.lock:
            if loaded not in self.loaded:
                return
            self._remove_key(loaded.key)
            self._on_wrong()
        session, key = self._session, loaded.key.rpartition("-")[0]
        failures = session.manager.failures
        message = f"a call in service was checked: {problem}; "
        reason = Reason(
            "verify-mismatch",
            f"{message}the assembly was thrown away and the model runs eager",
            "Report it, with the model",
        )
        session.storage.discard(loaded.key)
        # At once: the process may end while the pieces are looked at.
        failures.remember(key, reason, (reason.code,))
        try:
            wrong = find_wrong_pieces(session, loaded, function, args, kwargs)
        except Exception:  # noqa: BLE001 - out of memory, say: then nobody knows.
            wrong = {}
        if wrong:
            names = throw_out(session, loaded, wrong)
            failures.forget(key)
            reason = reason.replace(
                message=f"{message}{', '.join(names)} is at fault and was thrown "
                "away with the assembly; the model runs eager",
                remedy="Report it, with the piece's text; a new start compiles all else",
            )
        else:
            throw_all_out(session, loaded)
        self._note(reason)

    def _throw_away(self, loaded: LoadedAssembly) -> None:
        """Use a stored assembly no more, in no process."""
        self._remove_key(loaded.key)  # From the next call on: another assembly or a new capture.
        self._session.storage.discard(loaded.key)
        self._note(
            Reason(
                "stale-assembly",
                "tracing the model again gave other pieces than the stored assembly has; "
                "it was thrown away",
                "Report it: the contract should have noticed",
            )
        )
