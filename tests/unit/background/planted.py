"""Compilers that behave badly, for workers to be tried with: named `unit.background.planted:X`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from precast.compilers.eager import EagerAdaptor
from precast.compilers.interface import CompiledPiece


class _Planted(EagerAdaptor):
    name = "planted"

    def identity(self) -> dict[str, str]:
        return {"compiler": "planted", "adaptor": type(self).__name__}

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        self.misbehave(directory)
        return super().compile(piece, directory)

    def misbehave(self, directory: str) -> None:
        raise NotImplementedError


class Hanging(_Planted):
    def misbehave(self, directory: str) -> None:
        # In a session of its own: whoever ends the worker's group alone does not end it.
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        Path(directory, "child").write_text(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.hang()

    def hang(self) -> None:
        time.sleep(600)


class Held(Hanging):
    """Hangs, where `Hanging` under its inherited name would be no compiler but eager."""

    name = "held"

    def identity(self) -> dict[str, str]:
        return {"compiler": self.name}


class Unhurried(_Planted):
    """Takes longer than the limit that its test sets, and comes to an end."""

    def misbehave(self, directory: str) -> None:
        time.sleep(2)


class HangingInC(Hanging):
    """No thread of the worker gets to run any more."""

    def hang(self) -> None:
        ctypes.PyDLL(None).sleep(600)


class Aborting(_Planted):
    def misbehave(self, directory: str) -> None:
        os.abort()


class AbortingOnce(_Planted):
    def misbehave(self, directory: str) -> None:
        mark = Path(directory).parents[1] / "was-here"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSEGV)


class Raising(_Planted):
    def misbehave(self, directory: str) -> None:
        raise ValueError("no such luck")


class Noisy(_Planted):
    def misbehave(self, directory: str) -> None:
        print("{}\nnot a message")  # noqa: T201
        os.write(1, b"neither\n")


class Greedy(_Planted):
    def misbehave(self, directory: str) -> None:
        bytearray(1 << 40)


class GreedyAndSlow(_Planted):
    """Grows by and by to 600 MB, and so does a child of its."""

    def misbehave(self, directory: str) -> None:
        grow = "held = []\nwhile len(held) < 75: held.append(b'x' * (8 << 20)); time.sleep(0.02)"
        subprocess.Popen([sys.executable, "-c", f"import time\n{grow}\ntime.sleep(600)"])
        held = []
        while len(held) < 75:
            held.append(b"x" * (8 << 20))
            time.sleep(0.02)
        time.sleep(600)


def _keep_text(piece: Any, directory: str) -> CompiledPiece:
    path = Path(directory, "code")
    path.write_text(piece.text)
    return CompiledPiece({"code": str(path)}, EagerAdaptor().compile(piece, directory).details)


class OnlySmall(_Planted):
    """Has memory for three operators."""

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        if piece.text.count("\n    v") > 3:
            raise MemoryError("too many operators")
        return _keep_text(piece, directory)

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        assert Path(files["code"]).read_text() == details["piece"]["text"]
        return super().load(details, files, piece)


class QuickIfSmall(OnlySmall):
    """Does not come to an end with more than twenty operators."""

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        if piece.text.count("\n    v") > 20:
            time.sleep(600)
        return _keep_text(piece, directory)


class OnlySmallAndPure(OnlySmall):
    """As `OnlySmall`, and refuses what writes into an input."""

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        made = super().compile(piece, directory)
        if piece.mutated:
            raise ValueError("no writing")
        return made


class HalfWritten(_Planted):
    """Says that it is done when half of its file is written."""

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        made = super().compile(piece, directory)
        path = Path(directory, "code")
        path.write_text("whole")
        path.write_text(path.read_text()[:2])
        return CompiledPiece({"code": str(path)}, made.details)

    def misbehave(self, directory: str) -> None:
        pass

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        if Path(files["code"]).read_text() != "whole":
            raise ValueError("the code is cut off")
        return super().load(details, files, piece)


class Unwritten(HalfWritten):
    """Names a file that is not there."""

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        made = super().compile(piece, directory)
        Path(directory, "code").unlink()
        return made

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        return EagerAdaptor.load(self, details, files, piece)


class DyingWhenTried(_Planted):
    """Compiles well; what it made takes its process down, the first time."""

    def misbehave(self, directory: str) -> None:
        self.mark = Path(directory).parents[1] / "was-tried"

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGBUS)
        return super().load(details, files, piece)


class Reporting(_Planted):
    """Tells of the process that it runs in, once another of its kind runs beside it."""

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        together = Path(directory).parents[3] / "together"
        together.mkdir(exist_ok=True)
        (together / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(together.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        nice_of_child = subprocess.run(
            [sys.executable, "-c", "import os; print(os.nice(0))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found = {
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "is_leader": os.getsid(0) == os.getpid(),
            "command": Path("/proc/self/cmdline").read_bytes().decode().split("\0")[1:4],
            "descriptors": [str(path.resolve()) for path in Path("/proc/self/fd").iterdir()],
            "nice": os.nice(0),
            "nice_of_child": int(nice_of_child),
        }
        return CompiledPiece({}, {**super().compile(piece, directory).details, "found": found})

    def misbehave(self, directory: str) -> None:
        pass


class Wrong(_Planted):
    def misbehave(self, directory: str) -> None:
        pass

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        run = super().load(details, files, piece)
        return lambda inputs: [output * 1.001 for output in run(inputs)]


class WrongWhenEmpty(EagerAdaptor):
    def load(self, details: Any, files: Any, piece: Any) -> Any:
        run = super().load(details, files, piece)

        def fail_when_empty(inputs: Any) -> Any:
            if inputs[0].numel() == 0:
                raise RuntimeError("nothing to do")
            return run(inputs)

        return fail_when_empty


class RefusingSmallSizes(EagerAdaptor):
    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        if any(allowed.low < 2 for allowed in piece.symbols.values()):
            raise KeyError("unbacked_bindings")
        return super().compile(piece, directory)


class BreakingTheDevice(EagerAdaptor):
    """As a GPU does: an index out of range ends all work of the process."""

    def load(self, details: Any, files: Any, piece: Any) -> Any:
        run = super().load(details, files, piece)

        def fail_when_empty(inputs: Any) -> Any:
            if inputs[0].numel() == 0:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return run(inputs)

        return fail_when_empty
