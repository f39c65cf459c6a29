"""The name an artifact is stored under: equal keys must mean interchangeable artifacts.

A key is the SHA-256 of named parts on an allow-list. Hosts, ports, ranks, paths and device
indices never enter. `explain` says why two keys differ, part by part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from precast.machine import cpu_flags, python_identity

# A step of this number makes every older artifact a miss.
KEY_VERSION = 1


class Key:
    """A key with the parts it was made from."""

    __slots__ = ("digest", "parts")

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)
        text = json.dumps(self.parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Key({self.digest[:12]}, parts={sorted(self.parts)})"


class HashComputer:
    """Computes keys; holds what all keys of one process share."""

    def __init__(self, device: str = "cpu") -> None:
        self._toolchain = toolchain_parts(device)

    def piece_key(
        self, text: str, compiler: Mapping[str, str], passes: Mapping[str, str] | None = None
    ) -> Key:
        """Return the key of one compiled piece.

        Args:
            text: The canonical text, before any pass. It names the specs and ranges.
            compiler: The adaptor's `identity()`.
            passes: Name to identity of every pass, in order.
        """
        return Key(
            {
                "kind": "piece",
                "version": KEY_VERSION,
                "text": hashlib.sha256(text.encode()).hexdigest(),
                "compiler": dict(compiler),
                "passes": list((passes or {}).items()),
                **self._toolchain,
            }
        )

    def assembly_key(
        self,
        model: str,
        call: str,
        config: Mapping[str, Any],
        passes: Mapping[str, str] | None = None,
    ) -> Key:
        """Return the key under which assemblies of a model and a call signature are kept."""
        return Key(
            {
                "kind": "assembly",
                "version": KEY_VERSION,
                "model": model,
                "call": call,
                "config": dict(config),
                "passes": list((passes or {}).items()),
                # The code around the graph is bytecode, good for one Python only.
                "python": python_identity(),
                **self._toolchain,
            }
        )

    @staticmethod
    def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """Return one sentence for every part in which two keys' parts differ."""
        return [
            f"{name}: was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]


def toolchain_parts(device: str) -> dict[str, Any]:
    """Return what the compiled code depends on besides its text."""
    import torch

    parts: dict[str, Any] = {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "cpu": cpu_identity(),
        # Inductor writes loops for one thread or for as many as there will be.
        "threads": "one" if torch.get_num_threads() == 1 else "many",
    }
    if device != "cpu":
        parts["device"] = device
        parts["runtime"] = f"cuda {torch.version.cuda} hip {torch.version.hip}"
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            parts["architecture"] = f"sm_{major}{minor}"
    return parts


def cpu_identity() -> str:
    """Return the CPU's instruction set: architecture, torch's dispatch level, its flags' digest.

    torch's own caches leave it out; an AVX-512 artifact then runs on AVX2 and returns NaN.
    """
    import platform

    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {cpu_flags()}"
