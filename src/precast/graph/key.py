"""The name an artifact is stored under: equal keys must mean interchangeable artifacts.

A key is the SHA-256 of named parts on an allow-list. Hosts, ports, ranks, paths and device
indices never enter. `explain` says why two keys differ, part by part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from precast.machine import cpu_flags, python_identity

# A step of this number makes every older artifact a miss.
KEY_VERSION = 1

# The parts that say what a key is of, not what it was made with; and what a new one means.
_SUBJECT = {"text": "new piece", "model": "new model", "call": "new kind of call"}


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
        old, new = _flat(old), _flat(new)
        return [
            f"{name}: was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]


def find_nearest(
    parts: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any]]]
) -> tuple[str, Mapping[str, Any]] | None:
    """Return the stored key that a key nearly is, with its parts; None: nothing of its kind.

    One of the same subject (text, or model and call) is nearer than any other, then what differs
    in fewer parts; among equals the first.
    """

    def distance(other: tuple[str, Mapping[str, Any]]) -> tuple[int, int]:
        of_subject = sum(parts.get(name) != other[1].get(name) for name in _SUBJECT)
        return of_subject, len(HashComputer.explain(other[1], parts))

    same_kind = [other for other in others if other[1].get("kind") == parts.get("kind")]
    return min(same_kind, key=distance, default=None)


def cause_of_miss(parts: Mapping[str, Any], nearest: Mapping[str, Any] | None) -> str:
    """Say in a few words what makes a key new, for counting.

    `nothing stored`, `new piece`, `new model`, `new kind of call`, or the names of the parts that
    changed, such as `torch` or `cpu, threads`.
    """
    if nearest is None:
        return "nothing stored"
    for name, words in _SUBJECT.items():
        if parts.get(name) != nearest.get(name):
            return words
    changed = [n for n in sorted({*parts, *nearest}) if parts.get(n) != nearest.get(n)]
    return ", ".join(changed) or "nothing differs"


def explain_misses(
    misses: Sequence[dict[str, Any]], stored: Iterable[tuple[str, Mapping[str, Any]]]
) -> None:
    """Add to each miss its `cause`, the `nearest` stored key, and in which parts that `differs`.

    Args:
        misses: Each with its `key` and `parts`, and as `problem` why what is stored under that
            key does not serve, if something is.
        stored: Keys and their parts. What the misses themselves became by now is left out.
    """
    new = {miss["key"] for miss in misses if miss["problem"] is None}
    others = [other for other in stored if other[0].partition("-")[0] not in new]
    for miss in misses:
        if miss["problem"] is not None:
            miss |= {"cause": "outside contract", "nearest": None, "differs": [miss["problem"]]}
            continue
        nearest = find_nearest(miss["parts"], others)
        miss["cause"] = cause_of_miss(miss["parts"], nearest and nearest[1])
        miss["nearest"] = nearest and nearest[0]
        miss["differs"] = [] if nearest is None else HashComputer.explain(nearest[1], miss["parts"])


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts with those that are mappings taken apart: `compiler.version`."""
    flat = {}
    for name, value in parts.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": found for inner, found in _flat(value).items()})
        else:
            flat[name] = value
    return flat


def hasher_of(device: str, known: dict[Any, HashComputer]) -> HashComputer:
    """Return what computes keys for a device type, on the current GPU where that is its type.

    Args:
        device: The type.
        known: Those made so far, and the new one: GPUs of one machine may be of several kinds.
    """
    import torch

    kind = (device, torch.cuda.get_device_capability() if device == "cuda" else None)
    if kind not in known:
        known[kind] = HashComputer(device)
    return known[kind]


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
