"""The stored assemblies that may serve a call: several may have one key.

They are of one structure and signature, with other constants or other ranges of sizes. Which of
them fits the model and the call at hand is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from types import FunctionType
from typing import Any

from precast.assembly import Assembly, LoadedAssembly, open_assembly
from precast.cache.trust import is_unsigned
from precast.errors import ArtifactError, Reason, in_words
from precast.events import AssemblyRejected
from precast.runtime.gpu import on_gpu
from precast.runtime.slot import Slot, SlotTable
from precast.session import Session

_MOST_CANDIDATES = 8  # Of one key.


class Candidates:
    """What the cache has for one model."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._unsound: set[str] = set()
        self._next: dict[str, str] = {}  # For each key the first name that was not there.

    def sound(
        self, key: str, known: Set[str], function: FunctionType, gpu: int | None
    ) -> Iterator[LoadedAssembly]:
        """Load one stored assembly after the other, those that are not sound left out.

        Args:
            key: What all of them are stored for.
            known: Names of those that are loaded already.
            function: What they are to serve.
            gpu: The number of the GPU that the model is on.
        """
        for number in range(_MOST_CANDIDATES):
            candidate = f"{key}-{number}"
            if candidate in known:
                continue
            manifest = self._session.loader.manifest(candidate)
            if manifest is None:
                self._next[key] = candidate
                return
            try:
                loaded = self._open(manifest, candidate, function, gpu)
            except Exception as error:
                if self._session.config.on_error == "raise" and not isinstance(
                    error, ArtifactError | LookupError
                ):
                    raise
                self._reject(candidate, in_words(error))
                continue
            if loaded is None:
                self._reject(candidate, "an artifact of it is missing or damaged")
            elif isinstance(loaded, str):
                self._reject(candidate, loaded, "stale-assembly")
            else:
                yield loaded

    def is_new(self, key: str) -> bool:
        """Whether there is an assembly that was not when `sound` came to its end."""
        return key in self._next and self._session.loader.peek(self._next[key]) is not None

    def free_name(self, key: str, known: Set[str], assembly: Assembly) -> str:
        """Return the first name that no sound other assembly has, or the last one to replace."""
        for number in range(_MOST_CANDIDATES):
            candidate = f"{key}-{number}"
            if candidate in known:
                continue
            manifest = self._session.loader.manifest(candidate)
            if manifest is None or candidate in self._unsound or _is_same(manifest, assembly):
                return candidate
        return f"{key}-{_MOST_CANDIDATES - 1}"

    def _reject(self, key: str, problem: str, code: str = "artifact-incompatible") -> None:
        self._unsound.add(key)
        self._session.emit(
            AssemblyRejected(
                self._session.name,
                key,
                Reason(
                    code,
                    f"{problem}; the model is captured again",
                    "Nothing to do: a new assembly takes its place",
                ),
            )
        )

    def _open(
        self, manifest: Mapping[str, Any], key: str, function: FunctionType, gpu: int | None
    ) -> LoadedAssembly | str | None:
        """Load the code of a stored assembly; None where an artifact is not sound.

        A text says why it is not to be used any more although it is sound.
        """
        assembly = Assembly.from_json(manifest)
        calls = []
        for record in assembly.pieces:
            if not self._session.manager.failures.still_stands(record):
                return "a piece of it failed, and may be tried again now"
            with on_gpu(assembly.gpu_for(gpu)):
                call = self._session.manager.stored.load(
                    record, name=self._session.name, unsigned=is_unsigned(manifest)
                )
            if call is None:
                return None
            calls.append(call)
        slots = SlotTable()
        for number, name in assembly.slots:
            if number is None:
                slots.add(None, None)
                continue
            record = assembly.pieces[number]
            slots.add(calls[number], self._slot_of_record(name, record))
        return open_assembly(assembly, key, slots, function, gpu)

    def _slot_of_record(self, name: str, record: Mapping[str, Any]) -> Slot:
        reason = self._session.manager.failures.reason_of(record)
        timing = record.get("timing")
        if "eager" in record:
            return Slot(name, compiler="eager", reason=reason, timing=timing)
        return Slot(
            name,
            compiler=record["compiler"],
            tier="cache",
            reason=reason,
            seconds_saved=record["seconds"],
            passes=record["details"].get("passes", ()),
            timing=timing,
        )


def _is_same(manifest: Mapping[str, Any], assembly: Assembly) -> bool:
    """Whether a stored assembly asks for the same as another, which may then take its place."""
    stored: Any = manifest.get("call_check")
    return (
        manifest.get("contract") == assembly.contract
        and manifest.get("gpu") == assembly.gpu
        and manifest.get("packs") == assembly.packs
        and isinstance(stored, Mapping)
        and stored.get("source") == assembly.call_check["source"]
        and stored.get("constants") == assembly.call_check["constants"]
    )
