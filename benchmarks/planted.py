"""Compilers that behave badly, for `progressive.py`; workers import them from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from precast.compilers.eager import EagerAdaptor
from precast.compilers.interface import CompiledPiece


class Hung(EagerAdaptor):
    """Never comes to an end, and does not want to be ended."""

    name = "hung"

    def identity(self) -> dict[str, str]:
        return {"compiler": "hung"}

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
        raise AssertionError


class KilledOnce(EagerAdaptor):
    """Its worker is killed at the first try."""

    name = "killed_once"

    def identity(self) -> dict[str, str]:
        return {"compiler": "killed_once"}

    def compile(self, piece: Any, directory: str) -> CompiledPiece:
        mark = Path(directory).parents[1] / "was-here"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compile(piece, directory)
