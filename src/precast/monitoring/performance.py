"""`PerformanceMonitor`: what compiling gains and costs, by piece, by start and by call.

A fold over events, and, where `watch` asks for it, the latency of some calls of a model. Counts
how often things happen nowhere: that is `counter.py`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from precast import events
from precast.errors import ConfigError
from precast.events import Event
from precast.monitoring.distribution import CALL_S, Distribution
from precast.monitoring.recorder import resident_bytes
from precast.monitoring.system import Gpus, device_bytes, peak_device_bytes, used_gpu_torch

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_MOST_STARTS = 64
_MOST_MARKS = 64
_MOST_PENDING = 64


class PerformanceMonitor:
    """A listener that keeps figures per piece; give it to `precast.compile` as one of `listeners`.

        monitor = PerformanceMonitor()
        precast.compile(model, listeners=[monitor])
        monitor.pieces()["layers.0"]["speedup"]

        monitor.watch(model, every=100)  # Calls are timed only where one asks for it.
        monitor.calls()["Decoder"]["p99"]

    Safe to use from several threads. In a process that is forked from this one it begins anew.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Know nothing yet; `clock` gives seconds that only go forward."""
        self._clock = clock
        self._calls: dict[str, _Calls] = {}
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._gpus = Gpus()
        self._pieces: dict[str, dict[str, Any]] = {}
        self._starts: deque[dict[str, Any]] = deque(maxlen=_MOST_STARTS)
        self._before: dict[str, int | None] | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        self._follow_fork()
        match event:
            case events.CacheHit() | events.CacheMiss() | events.AssemblyMissed():
                if self._before is None:  # A start begins by looking into the cache.
                    self._before = _memory()
            case events.PieceTimed():
                rows = [_with_speedup(row) for row in event.timing]
                best = max(rows, key=lambda row: row["speedup"])
                self._note(event.piece, timing=rows, speedup=best["speedup"])
            case events.PieceCompiled():
                self._note(event.piece, compile_seconds=event.seconds, compiler=event.compiler)
            case events.PieceLoaded():
                self._note(event.piece, load_seconds=event.seconds, tier=event.tier)
            case events.PieceFailed():
                self._note(event.piece, reason=event.reason.as_dict())
            case events.ModelReady():
                self._note_start(event)
            case events.FellBack(piece=None) | events.ModelReleased():
                self._before = None
            case _:
                pass

    def _note(self, piece: str, **figures: Any) -> None:
        with self._lock:
            self._pieces.setdefault(piece, {}).update(figures)

    def _note_start(self, event: events.ModelReady) -> None:
        before, self._before = self._before or {}, None
        start = {
            "model": event.model,
            "is_warm": event.warm,
            "seconds": event.seconds,
            "seconds_saved": event.seconds_saved,
            "memory_before": before,
            "memory_after": _memory(),
        }
        with self._lock:
            self._starts.append(start)

    def _follow_fork(self) -> None:
        if os.getpid() != self._pid:
            self._begin()

    # -- what is known -----------------------------------------------------------

    def pieces(self) -> dict[str, dict[str, Any]]:
        """Return the figures so far, by the piece's name.

        `timing` is a list with a row for each set of sizes: the seconds of a compiled and of an
        eager call (medians, and how they spread), and eager's over compiled code's as `speedup`;
        beside it `speedup` is that at the sizes where it is most.
        """
        self._follow_fork()
        with self._lock:
            return {name: dict(figures) for name, figures in self._pieces.items()}

    def starts(self) -> list[dict[str, Any]]:
        """Return the latest starts: seconds, and memory before and after, of process and GPU.

        Before is at the first event of the start; where models start at the same time, of the
        first of them.
        """
        self._follow_fork()
        with self._lock:
            return list(self._starts)

    def calls(self) -> dict[str, dict[str, Any]]:
        """Return by model what was seen of watched calls: a distribution of seconds, and rates.

        `num_calls` counts all calls, `count` those that were timed; `calls_per_s` is over the
        latest 64 of these, less when calls come no more. `is_on_device`: timed by the GPU's clock.
        Calls that loaded or compiled something, or raised, are counted and not timed.
        """
        self._follow_fork()
        with self._lock:
            watched = dict(self._calls)
        return {name: calls.snapshot() for name, calls in watched.items()}

    def gpus(self) -> list[dict[str, Any]]:
        """Return utilisation and memory of each GPU; none without the extra `gpu`."""
        return self._gpus.figures()

    # -- calls --------------------------------------------------------------------

    def watch(self, model: Any, every: int = 100, name: str | None = None) -> None:
        """Time one call in `every` of a model or function that `precast.compile` returned.

        Until `unwatch`, or until the model is released. Costs the other calls a fraction of a
        microsecond. On a GPU the time between two events of its stream is taken, and nobody waits.
        Does nothing where `PRECAST_DISABLE` is set.

        Args:
            model: As `precast.compile` returned it.
            every: Again replaces it.
            name: Under which `calls` has it; models of one name are added up. None: its class.

        Raises:
            ConfigError: Precast does not serve it, or another monitor watches it.
        """
        if every < 1:
            raise ConfigError("every", every, "at least 1", "every=1 times each call")
        self._follow_fork()
        dispatcher = _dispatcher_of(model)
        if dispatcher is None:
            return
        if dispatcher.watcher is not None and dispatcher.watcher.monitor is not self:
            raise ConfigError(
                "model", type(model).__name__, "watched once", "unwatch it where it is watched"
            )
        name = dispatcher.compiled.session.name if name is None else name
        with self._lock:
            calls = self._calls.setdefault(name, _Calls(self._clock))
        watcher = CallWatcher(self, dispatcher.compiled, calls, every, self._clock)
        dispatcher.watch(watcher)
        calls.add(watcher)

    def unwatch(self, model: Any) -> None:
        """Time no more calls of a model; what was seen stays."""
        dispatcher = _dispatcher_of(model)
        if dispatcher is None or dispatcher.watcher is None:
            return
        if dispatcher.watcher.monitor is self:
            dispatcher.watch(None)


class CallWatcher:
    """What a watched model's dispatcher asks at each call, and hands one call in so many."""

    def __init__(
        self,
        monitor: PerformanceMonitor,
        compiled: Any,
        calls: _Calls,
        every: int,
        clock: Callable[[], float],
    ) -> None:
        self.monitor = monitor
        self.every = every
        self._compiled = weakref.ref(compiled)
        self._calls = calls
        self._clock = clock
        self._pending: deque[tuple[Any, Any]] = deque(maxlen=_MOST_PENDING)
        self._begin()

    def _begin(self) -> None:
        from itertools import count

        self._pid = os.getpid()
        self.num_calls = 0
        self.numbers: Iterator[int] = count(1)  # Whose next is one step: exact in all threads.
        self.marks: deque[tuple[int, float]] = deque([(0, self._clock())], maxlen=_MOST_MARKS)

    def follow_fork(self) -> bool:
        """Begin anew in a process that was forked from the one that watched; return whether so."""
        if os.getpid() == self._pid:
            return False
        self._pending.clear()
        self._begin()
        self._calls.add(self)
        return True

    @property
    def is_over(self) -> bool:
        """Whether it watches no more, and all that it timed was taken in."""
        compiled = self._compiled()
        is_watching = compiled is not None and compiled.dispatcher.watcher is self
        return not is_watching and not self._pending

    def run(
        self,
        serve: Callable[..., Any],
        dispatcher: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serve one call, and time it unless it turns out to be a start."""
        if self.follow_fork():
            self.num_calls = next(self.numbers)  # This call is the first.
        self.marks.append((self.num_calls, self._clock()))
        state = _state_of(dispatcher)
        torch, device = _device_of(dispatcher.owner, args, kwargs)
        if device is None:
            started = self._clock()
            result = serve(dispatcher, *args, **kwargs)
            seconds = self._clock() - started
            if _state_of(dispatcher) == state:
                self._calls.note(seconds, is_on_device=False)
            return result
        self.drain()
        stream = torch.cuda.current_stream(device)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record(stream)
        result = serve(dispatcher, *args, **kwargs)
        ended.record(stream)
        if _state_of(dispatcher) == state:
            self._pending.append((started, ended))
        return result

    def drain(self) -> None:
        """Take in the calls that the GPU has come to the end of."""
        while self._pending:
            try:
                started, ended = self._pending.popleft()
            except IndexError:  # Another thread was faster.
                return
            if not ended.query():
                self._pending.appendleft((started, ended))
                return
            self._calls.note(started.elapsed_time(ended) / 1e3, is_on_device=True)


class _Calls:
    """What was seen of the watched calls of one name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._seconds = Distribution(CALL_S)
        self._watchers: list[CallWatcher] = []
        self._num_past = 0  # Calls that watchers of before saw.
        self._is_on_device = False

    def add(self, watcher: CallWatcher) -> None:
        self._follow_fork()
        self._drain()
        with self._lock:
            if watcher not in self._watchers:
                self._watchers.append(watcher)

    def _drain(self) -> None:
        """Take in what has ended, and let watchers go that are done."""
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.drain()
        with self._lock:
            for watcher in [known for known in self._watchers if known.is_over]:
                self._watchers.remove(watcher)
                self._num_past += watcher.num_calls

    def note(self, seconds: float, *, is_on_device: bool) -> None:
        with self._lock:
            self._seconds.add(seconds)
            self._is_on_device = is_on_device

    def snapshot(self) -> dict[str, Any]:
        self._follow_fork()
        self._drain()
        now = self._clock()
        with self._lock:
            return {
                "num_calls": self._num_past + sum(each.num_calls for each in self._watchers),
                "calls_per_s": sum(_rate(each, now) for each in self._watchers),
                "is_on_device": self._is_on_device,
                **self._seconds.snapshot(),
            }

    def _follow_fork(self) -> None:
        if os.getpid() != self._pid:
            watchers = self._watchers
            self._begin()
            for watcher in watchers:
                watcher.follow_fork()


def _state_of(dispatcher: Any) -> tuple[Any, int]:
    """Return what differs after a call that loaded or compiled something.

    Where a model runs in blocks, or traced by Dynamo, only events tell. When it is compiled behind,
    events come from there, and calls start nothing.
    """
    session = dispatcher.compiled.session
    is_behind = session.config.mode == "progressive"
    return dispatcher.loaded, 0 if is_behind else session.recorder.num_events


def _rate(watcher: CallWatcher, now: float) -> float:
    number, then = watcher.marks[0]
    return (watcher.num_calls - number) / (now - then) if now > then else 0.0


def _dispatcher_of(model: Any) -> Any:
    """Return what serves a model's calls; None where Precast is switched off.

    Raises:
        ConfigError: Precast does not.
    """
    compiled = getattr(model, "__precast__", None)  # Of a function.
    found = getattr(model, "_compiled_call_impl", None) if compiled is None else compiled.dispatcher
    if not hasattr(found, "watch"):
        from precast.config import read_config

        if read_config().is_disabled:
            return None
        raise ConfigError(
            "model", type(model).__name__, "one that Precast serves", "call precast.compile(model)"
        )
    return found


def _device_of(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return torch and the GPU that a call runs on; None and None where it is to be timed here."""
    torch = used_gpu_torch()
    if torch is None:
        return None, None
    weight = None if owner is None else next(owner.parameters(), None)
    for value in (weight, *args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_cuda:
            # A stream that is being captured must not be asked for the time.
            with torch.cuda.device(value.device):
                is_captured = torch.cuda.is_current_stream_capturing()
            return (None, None) if is_captured else (torch, value.device)
    return None, None


def _with_speedup(row: Any) -> dict[str, Any]:
    return {**row, "speedup": row["eager_s"] / row["compiled_s"]}


def _memory() -> dict[str, int | None]:
    return {
        "resident_bytes": resident_bytes(),
        "device_bytes": device_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }
