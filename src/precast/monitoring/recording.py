"""A recording: what a `Recorder` kept and what a model is like, as JSON that outlives the process.

`docs/format.md` describes it. What is read may come from anywhere: it is plain data, of which the
page believes nothing. How a model looks is told by `portrait.py`, which knows models.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from precast import __version__, events
from precast.errors import RecordingError, RecordingUnwritableError
from precast.events import Event
from precast.monitoring.recorder import Recorder, resident_bytes
from precast.values import Value

KIND = "precast-recording"
FORMAT = 1

#: What is larger is not read.
MOST_BYTES = 64 << 20

_DELAY_S = 0.5  # Between what is worth writing and writing it: starts are not held up.
_LONGEST_TEXT = 20_000
_DEEPEST = 40  # Levels of a recording; ours have ten.


def recording_of(recorder: Recorder, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a recording as plain data.

    Args:
        recorder: Its events and times.
        model: What `portrait.portray` returned; None: nothing is known but the events.
    """
    return {
        "kind": KIND,
        "format": FORMAT,
        "precast": __version__,
        "opened_at": round(recorder.opened_at, 3),
        "seconds": round(recorder.seconds(), 6),
        "process": {
            "pid": os.getpid(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "machine": f"{os.uname().sysname} {os.uname().machine}",
            "num_cores": os.cpu_count(),
        },
        "memory": [
            *({"at": round(at_s, 6), "resident_bytes": size} for at_s, size in recorder.memory()),
            {"at": round(recorder.seconds(), 6), "resident_bytes": resident_bytes()},
        ],
        "num_dropped": recorder.num_dropped,
        "events": [as_data(at_s, event) for at_s, event in recorder.events()],
        "model": None if model is None else plain(model),
    }


def as_data(at_s: float, event: Event) -> dict[str, Any]:
    """Return an event as plain data: `at`, `event` and its fields."""
    fields = {name: plain(value) for name, value in event.as_dict().items()}
    return {"at": round(at_s, 6), "event": type(event).__name__, **fields}


def plain(value: Any) -> Any:
    """Return a value as JSON data; what JSON does not know becomes text."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return value if len(value) <= _LONGEST_TEXT * 50 else f"{value[:_LONGEST_TEXT]} …"
        case float():
            return value if value - value == 0 else str(value)  # Neither infinite nor none.
        case Value():
            return plain(value.as_dict())
        case Mapping():
            return {str(name): plain(item) for name, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case _:
            return str(value)[:_LONGEST_TEXT]


def write_recording(path: str | os.PathLike[str], recording: Mapping[str, Any]) -> int:
    """Write a recording, beside its place first; return its bytes.

    Raises:
        RecordingError: It cannot be written.
    """
    data = json.dumps(recording, separators=(",", ":"), allow_nan=False).encode()
    write_whole(path, data)
    return len(data)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the whole of it or none.

    Raises:
        RecordingError: It cannot be written.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        beside.write_bytes(data)
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RecordingUnwritableError(str(target), str(error.strerror or error)) from error


def read_recording(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recording. Events that this version does not know are kept as they are.

    Raises:
        RecordingError: The file is not there, or no recording of a format that is known.
    """
    name = os.fspath(path)
    try:
        if Path(path).stat().st_size > MOST_BYTES:
            raise RecordingError(name, f"it is larger than {MOST_BYTES >> 20} MiB")
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise RecordingError(name, str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise RecordingError(name, f"it is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise RecordingError(name, "it is no recording of Precast")
    if _is_deeper(found, _DEEPEST):
        raise RecordingError(name, f"it is nested more than {_DEEPEST} levels deep")
    if found.get("format") != FORMAT:
        raise RecordingError(
            name, f"it has format {found.get('format')!r}, and this version reads {FORMAT}"
        )
    return found


def _is_deeper(data: Any, levels: int) -> bool:
    """Whether data is nested deeper than so many levels; asks without recursion."""
    level = [data]
    for _ in range(levels):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, dict | list) for value in level)


class RecordingWriter:
    """A listener that writes a recording when a plan, a piece or the model is ready, or ends.

    It writes from a thread of its own, a moment later, once for all that happened; and at exit.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        recorder: Recorder,
        on_failure: Callable[[RecordingWriter, Exception], None],
    ) -> None:
        """Write nothing yet.

        Args:
            folder: Where to; made when it is not there.
            name: Of the model.
            recorder: What to write.
            on_failure: Told once when something cannot be written. Then nothing is any more: a
                recording never stops a model.
        """
        weak = weakref.ref(self)

        def tell(error: Exception) -> None:
            writer = weak()
            if writer is not None:
                on_failure(writer, error)

        self._pen = _Pen(folder, name, recorder, tell)
        self._at_end = weakref.finalize(self, self._pen.finish)

    def portray_with(self, portray: Callable[[], Mapping[str, Any] | None]) -> None:
        """Have the model in the recording; `portray` returns None where it is gone."""
        self._pen.portray = portray

    def look(self) -> None:
        """Portray the model as it is now: the last time, before it is released."""
        self._pen.look()

    def __call__(self, event: Event) -> None:
        """Note what is worth writing."""
        match event:
            case (
                events.PlanMade()
                | events.PieceCompiled()
                | events.PieceFailed()
                | events.PieceLoaded()
                | events.ModelReady()
                | events.FellBack(piece=None)
                | events.AssemblyRevalidated()
                | events.StartBrokenOff()
            ):
                self._pen.write_soon()
            case events.ModelReleased():
                self._at_end.detach()  # It is written for good, and its file the user's.
                self._pen.finish()
            case _:
                pass


class _Pen:
    """What a writer writes with; outlives it until exit."""

    def __init__(
        self, folder: Path, name: str, recorder: Recorder, tell: Callable[[Exception], None]
    ) -> None:
        self.portray: Callable[[], Mapping[str, Any] | None] = lambda: None
        self._folder = folder
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(recorder.opened_at))
        self._stem = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:60]}-{moment}"
        self._end = f"{os.urandom(2).hex()}.json"
        self._recorder = recorder
        self._tell = tell
        self._model: Mapping[str, Any] | None = None
        self._is_broken = False
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Of two that write, the later one has the last word. The collector may end in here again.
        self._writing = threading.RLock()
        self._timer: threading.Timer | None = None

    def write_soon(self) -> None:
        """Write in a moment, once for all that happens until then."""
        self._follow_fork()
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(_DELAY_S, self._write)
                self._timer.daemon = True
                self._timer.start()

    def finish(self) -> None:
        """Write now."""
        self._follow_fork()
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self._write()

    def _follow_fork(self) -> None:
        if os.getpid() != self._pid:
            self._begin()

    def look(self) -> None:
        """Keep how the model is now; once it is released there is nothing to be seen."""
        try:
            self._model = self.portray() or self._model
        except Exception as error:  # noqa: BLE001 - nothing of this may reach a model.
            self._give_up(error)

    def _write(self) -> None:
        with self._lock:
            self._timer = None
        with self._writing:
            self.look()
            if self._is_broken:
                return
            try:
                try:
                    self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                except OSError as error:
                    problem = str(error.strerror or error)
                    raise RecordingUnwritableError(str(self._folder), problem) from error
                path = self._folder / f"{self._stem}-{os.getpid()}-{self._end}"
                write_recording(path, recording_of(self._recorder, self._model))
            except Exception as error:  # noqa: BLE001 - as above.
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._is_broken:
            self._is_broken = True
            self._tell(error)


def newest_of(folder: str | os.PathLike[str]) -> Path:
    """Return the newest recording of a folder.

    Raises:
        RecordingError: There is none.
    """
    found: list[tuple[float, Path]] = []
    for path in Path(folder).glob("*.json"):
        with contextlib.suppress(OSError):  # Removed a moment ago, or a link to nowhere.
            found.append((path.stat().st_mtime, path))
    if not found:
        raise RecordingError(os.fspath(folder), "the folder holds no recordings")
    return max(found)[1]


def torch_version() -> str | None:
    """Return the version of torch, where this process has imported it."""
    torch = sys.modules.get("torch")
    return None if torch is None else str(getattr(torch, "__version__", None))
