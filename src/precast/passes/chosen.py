"""Which passes run for a model, in order: from the setting to identities, objects and messages.

Identities of built-in passes are read without importing one: a warm start needs no more.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from precast.errors import ConfigError
from precast.passes.builtin import DEFAULT, ON_WHOLE_GRAPH, PACKING, VERSIONS

if TYPE_CHECKING:
    from precast.passes.interface import InductorPass


class CannotSend(Exception):  # noqa: N818 - a finding that is answered, not an error that is shown.
    """A pass that another process cannot be given; says which and why."""


class ChosenPasses:
    """An ordered list of passes that is one value; each is loaded when it first runs.

    `identities` has all of them by name, `piece_identities` those that a piece's text does not
    show.
    """

    def __init__(self, entries: Sequence[Any]) -> None:
        self._entries = tuple(entries)
        self._loaded: dict[int, InductorPass] = {}
        self._messages: list[list[str]] | None = None
        self.identities: dict[str, str] = {}
        self.piece_identities: dict[str, str] = {}
        for number, entry in enumerate(self._entries):
            name, identity = self._identify(number, entry)
            while name in self.identities:
                name += "+"
            self.identities[name] = identity
            if self._is_on_pieces(entry):
                self.piece_identities[name] = identity

    def _identify(self, number: int, entry: Any) -> tuple[str, str]:
        if isinstance(entry, str) and entry in VERSIONS:
            return entry, VERSIONS[entry]
        found = self._load(number)
        # What has no text is right for this process alone.
        return found.name, found.identity() or f"process {os.urandom(16).hex()}"

    def _load(self, number: int) -> InductorPass:
        if number not in self._loaded:
            self._loaded[number] = load_pass(self._entries[number])
        return self._loaded[number]

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def may_pack(self) -> bool:
        """Whether a pass wants to pack weights."""
        return not self.identities.keys().isdisjoint(PACKING)

    @property
    def names_on_whole_graph(self) -> tuple[str, ...]:
        """The names of those that change a graph before it is cut: all that a capture needs."""
        return tuple(entry for entry in self._entries if not self._is_on_pieces(entry))

    def on_whole_graph(self) -> Iterator[tuple[str, Any]]:
        """Yield name and pass of those that change a graph before it is cut, in order."""
        for number, entry in enumerate(self._entries):
            if not self._is_on_pieces(entry):
                yield entry, self._load(number)

    @property
    def runs_on_pieces(self) -> bool:
        """Whether any pass is left once a piece is written."""
        return bool(self.piece_identities)

    def on_pieces(self) -> list[InductorPass]:
        """Return the passes that run on pieces, loaded, in order."""
        return [self._load(i) for i, entry in enumerate(self._entries) if self._is_on_pieces(entry)]

    def messages(self) -> list[list[str]]:
        """Return the passes for pieces as a worker is told of them.

        Raises:
            CannotSend: One of them cannot be sent.
        """
        if self._messages is None:
            self._messages = [
                ["name", entry] if isinstance(entry, str) else ["pickle", _pickled(entry)]
                for entry in self._entries
                if self._is_on_pieces(entry)
            ]
        return self._messages

    @staticmethod
    def _is_on_pieces(entry: Any) -> bool:
        return not (isinstance(entry, str) and entry in ON_WHOLE_GRAPH)


def choose(setting: Any, *, may_pack: bool = True) -> ChosenPasses:
    """Return the passes that the setting `passes` asks for; None: those that are on by default.

    Args:
        setting: As a person gave it.
        may_pack: Unset: those that move weights are left out.

    Raises:
        ConfigError: A name is unknown, or something is no pass.
    """
    if setting is None:
        setting = DEFAULT
    elif isinstance(setting, str):
        names = [] if setting == "off" else setting.split(",")
        setting = [name.strip() for name in names if name.strip()]
    return ChosenPasses([p for p in setting if may_pack or not _moves_weights(p)])


def _moves_weights(entry: Any) -> bool:
    return isinstance(entry, str) and entry in PACKING


def load_pass(entry: Any) -> InductorPass:
    """Return the pass that a name, `module:attribute`, a class, a function or an object is.

    Raises:
        ConfigError: There is no such pass.
    """
    from precast.passes.interface import as_pass
    from precast.plugins import load_plugin

    value = entry
    if isinstance(entry, str) and ":" in entry:
        module, _, path = entry.partition(":")
        try:
            value = import_module(module)
            for name in path.split("."):
                value = getattr(value, name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                "passes",
                entry,
                "the name of a pass that can be imported",
                f"Importing it said {str(error)!r}",
            ) from error
    elif isinstance(entry, str):
        value = load_plugin("passes", entry)
    try:
        return as_pass(value)
    except TypeError as error:
        raise ConfigError(
            "passes",
            entry,
            "names of passes, InductorPass objects or functions of a graph",
            "See docs/how-to/write-a-pass.md",
        ) from error


def receive(messages: Sequence[Sequence[str]]) -> list[InductorPass]:
    """Return the passes that `messages` describe, in another process of the same user."""
    from precast.passes.interface import as_pass

    # The parent's own bytes, straight from its pipe: never from a tier.
    return [
        load_pass(text) if kind == "name" else as_pass(pickle.loads(base64.b64decode(text)))
        for kind, text in messages
    ]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if getattr(value, "__module__", None) == "__main__" and hasattr(value, "__qualname__"):
            raise CannotSend(f"{value.__qualname__} is defined in the main script")
        return NotImplemented


def _pickled(entry: Any) -> str:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(entry)
    except CannotSend:
        raise
    except Exception as error:
        name = getattr(entry, "name", None) or getattr(entry, "__qualname__", type(entry).__name__)
        raise CannotSend(f"{name}: {error}") from error
    return base64.b64encode(buffer.getvalue()).decode()


NO_PASSES = ChosenPasses(())


def matches_as_dict(matches: int | Mapping[str, int] | None) -> dict[str, int]:
    """Return a pass's matches by pattern; one that does not tell patterns apart has `matched`."""
    if matches is None:
        return {}
    if isinstance(matches, Mapping):
        return {str(name): int(count) for name, count in matches.items()}
    return {"matched": int(matches)}
