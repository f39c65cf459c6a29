"""What a compiler generated, as text for people: kept beside an artifact and never run.

A piece's C++ is 40 KB, of which most checks arguments; what is kept of it packs into 2 to 4 KB.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_BYTES = 256 << 10  # Of one file.
_RUN = "void AOTInductorModel::run_impl("
_TRITON = re.compile(r"/\*.*?\*/", re.DOTALL)


def aoti_sources(folder: Path) -> dict[str, str]:
    """Return what AOTInductor wrote into a folder: kernels, and the calls of them.

    Without what is alike in all pieces, and without paths of this machine.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.cpp")):
        text = path.read_text(errors="replace")
        if path.name.endswith(".kernel.cpp"):
            found["kernels.cpp"] = found.get("kernels.cpp", "") + _without_commands(text)
        elif path.name.endswith(".wrapper.cpp"):
            # Triton kernels stand in comments.
            triton = [part for part in _TRITON.findall(text) if "@triton.jit" in part]
            found["wrapper.cpp"] = _without_commands("\n".join([*triton, _calls(text)]))
    return {name: text for name, text in found.items() if text.strip()}


def _calls(text: str) -> str:
    before, found, after = text.partition(_RUN)
    return f"{found}{after}" if found else before


def _without_commands(text: str) -> str:
    """Leave out comments that name paths: how it was compiled, and where other files lay."""
    lines = [
        line
        for line in text.splitlines()
        if not (line.startswith("//") and "/" in line[2:].strip())
    ]
    return "\n".join(lines).strip() + "\n"


def pack(sources: Mapping[str, str]) -> dict[str, str]:
    """Return texts in a form that takes little room in a manifest."""
    return {
        name: b64encode(zlib.compress(text.encode()[:_MOST_BYTES], 9)).decode()
        for name, text in sources.items()
    }


def unpack(packed: Any) -> dict[str, str]:
    """Return the texts that `pack` packed; what is no such thing is left out."""
    found: dict[str, str] = {}
    for name, data in packed.items() if isinstance(packed, Mapping) else ():
        try:
            text = zlib.decompressobj().decompress(b64decode(data), _MOST_BYTES)
        except (ValueError, TypeError, zlib.error):
            continue
        found[str(name)] = text.decode(errors="replace")
    return found
