"""Compilers that behave badly, for workers to be tried with: named `unit.background.planted:X`."""

from __future__ import annotations

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
    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        self.misbehave(directory)
        return super().compile(piece, directory)

    def misbehave(self, directory: str) -> None:
        raise NotImplementedError


class Hanging(_Planted):
    def misbehave(self, directory: str) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(directory, "child").write_text(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)


class Held(Hanging):
    """Hangs, where `Hanging` under its inherited name would be no compiler but eager."""

    name = "held"

    def identity(self) -> dict[str, str]:
        return {"compiler": self.name}


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


class Wrong(EagerAdaptor):
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
