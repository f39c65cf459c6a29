"""A chain of tiers as text, and the tiers that it stands for.

    disk,redis://host/0?readonly=1,s3://bucket/prefix

`docs/cache.md` explains it. Opening a chain touches neither disk nor network. What a tier does is
its own business; which guards it gets is decided here.
"""

from __future__ import annotations

from precast.cache.disk import DiskCache
from precast.cache.guarded import CONNECT_DEADLINE_S, GuardedCache
from precast.cache.memory import MemoryCache
from precast.cache.readonly import ReadOnlyCache
from precast.cache.writer import BackgroundWriter
from precast.config import without_secrets
from precast.errors import ConfigError
from precast.plugins import BUILT_IN, find_plugin, known_names, load_plugin
from precast.values import Value

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from precast.cache.interface import CacheInterface
    from precast.events import Emit

#: How long a tier may move nothing, by scheme; object stores take their time.
DEADLINES_S = {"redis": 0.25, "rediss": 0.25, "unix": 0.25}
DEADLINE_S = 1.0

#: What each tier takes; a tier's own options come on top.
OPTIONS = ("readonly", "write", "deadline_ms", "connect_ms", "name")
_LOCAL_OPTIONS = ("readonly", "write", "name", "shared")
_SYNTAX = "Write tiers with commas between, as in 'disk,redis://host/0,s3://bucket/prefix'"


class Chain:
    """The tiers of a chain, nearest first, and how each is written."""

    __slots__ = ("read_only", "tiers", "writer")

    def __init__(
        self,
        tiers: tuple[CacheInterface, ...],
        writer: BackgroundWriter | None,
        read_only: frozenset[str],
    ) -> None:
        self.tiers = tiers
        self.writer = writer
        self.read_only = read_only


class TierEntry(Value):
    """One tier of a chain: `scheme`, the whole without options, and its options."""

    scheme: str
    target: str
    options: dict[str, str]

    @property
    def is_url(self) -> bool:
        """Whether it is `scheme://…` and not `memory` or `disk`."""
        return "://" in self.target


def parse_chain(text: str) -> list[TierEntry]:
    """Read a chain; what the options mean is seen when it is opened.

    Raises:
        ConfigError: It is not a chain of tiers.
    """
    entries = [_parse_entry(part.strip()) for part in text.split(",")]
    if any(entry.target == "memory" for entry in entries[1:]):
        raise _error("memory", "the first tier, or left out", "Memory always comes first")
    return entries


def open_chain(
    text: str, cache_dir: str | os.PathLike[str], emit: Emit, clock: Callable[[], float]
) -> Chain:
    """Return the tiers of a chain, with memory before them.

    Args:
        text: The chain.
        cache_dir: Where `disk` without a path lies.
        emit: Is told what happens.
        clock: Seconds that only go forward.

    Raises:
        ConfigError: Says what is wrong with the chain, and what would be right.
    """
    entries = parse_chain(text)
    if entries[0].target != "memory":
        entries.insert(0, TierEntry("memory", "memory", {}))
    tiers: list[CacheInterface] = []
    behind: set[str] = set()
    read_only: set[str] = set()
    for entry in entries:
        name = entry.options.get("name") or entry.scheme
        names = {tier.name for tier in tiers}
        if name in names and "name" not in entry.options:
            name = next(f"{name}-{i}" for i in range(2, 99) if f"{name}-{i}" not in names)
        if name in names:
            raise _error(entry.target, "a name of its own for each tier", f"{name!r} is taken")
        tier, policy = _open_tier(entry, name, cache_dir, emit, clock)
        tiers.append(tier)
        if policy == "behind":
            behind.add(tier.name)
        elif policy == "never":
            read_only.add(tier.name)
    writer = BackgroundWriter(behind, emit) if behind else None
    return Chain(tuple(tiers), writer, frozenset(read_only))


def _parse_entry(part: str) -> TierEntry:
    head, _, query = part.partition("?")
    scheme, colon, rest = head.partition(":")
    is_local = scheme in ("disk", "memory") and not rest.startswith("//")
    if not scheme or (not is_local and not rest.startswith("//")):
        raise _error(part, "a tier: 'disk', 'disk:/path' or a URL", _SYNTAX)
    if is_local and ((colon and not rest) or (scheme == "memory" and rest)):
        raise _error(part, "'disk' or 'disk:/path'", _SYNTAX)
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, equals, value = pair.partition("=")
        if not name or not equals or name in options:
            raise _error(part, "followed by options, each once, as in '?readonly=1'", _SYNTAX)
        if "%" in value or "+" in value:
            from urllib.parse import unquote

            value = unquote(value)
        options[name] = value
    return TierEntry(scheme, head, options)


def _open_tier(
    entry: TierEntry,
    name: str,
    cache_dir: str | os.PathLike[str],
    emit: Emit,
    clock: Callable[[], float],
) -> tuple[CacheInterface, str]:
    """Return a tier, and when it is written: `now`, `behind` the caller's back or `never`."""
    options = {key: value for key, value in entry.options.items() if key not in OPTIONS}
    knock: Callable[[float], None] | None = None
    prepare: Callable[[], None] | None = None
    tier: CacheInterface
    if entry.is_url:
        tier = _open_store(entry, name, options)
        knock, prepare = getattr(tier, "knock", None), getattr(tier, "prepare", None)
    else:
        if unknown := [option for option in entry.options if option not in _LOCAL_OPTIONS]:
            wanted = "an option of a local tier: " + ", ".join(_LOCAL_OPTIONS)
            raise _error(unknown[0], wanted, "Leave it out")
        tier = _open_local(entry, name, cache_dir)
    policy = _write_policy(entry, tier)
    if tier.is_shared:
        deadline_s = DEADLINES_S.get(entry.scheme, DEADLINE_S)
        tier = GuardedCache(
            tier,
            emit,
            clock,
            deadline_s=_milliseconds(entry.options, "deadline_ms", deadline_s),
            connect_deadline_s=_milliseconds(entry.options, "connect_ms", CONNECT_DEADLINE_S),
            knock=knock,
            prepare=prepare,
        )
    return (ReadOnlyCache(tier) if policy == "never" else tier), policy


def _open_local(entry: TierEntry, name: str, cache_dir: str | os.PathLike[str]) -> CacheInterface:
    if entry.scheme == "memory":
        return MemoryCache()
    path = entry.target.partition(":")[2]
    if path.startswith("~"):
        from pathlib import Path

        path = str(Path(path).expanduser())
    return DiskCache(path or cache_dir, name=name, is_shared=_flag(entry.options, "shared"))


def _open_store(entry: TierEntry, name: str, options: Mapping[str, str]) -> CacheInterface:
    """Return the tier of a URL: ours, a plug-in's, or what else fsspec reaches."""
    scheme = entry.scheme
    make = None if scheme in ("disk", "memory") else find_plugin("stores", scheme)
    if make is None:
        from fsspec.registry import known_implementations

        if scheme not in known_implementations:
            import difflib

            known = [*known_names("stores"), *known_implementations]
            near = difflib.get_close_matches(scheme, known, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Install what brings {scheme}://"
            built_in = ", ".join(BUILT_IN["stores"])
            raise _error(scheme, f"one of {built_in}, or a scheme that fsspec knows", remedy)
        make = load_plugin("stores", "s3")
    try:
        tier: CacheInterface = make(entry.target, name=name, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _error(entry.target, "a URL that its tier can use", f"It said: {error}") from error
    return tier


def _write_policy(entry: TierEntry, tier: CacheInterface) -> str:
    policy = entry.options.get("write", "behind" if tier.is_shared else "now")
    if policy not in ("now", "behind", "never"):
        raise _error(f"write={policy}", "write=now, write=behind or write=never", "Choose one")
    return "never" if _flag(entry.options, "readonly") else policy


def _flag(options: Mapping[str, str], name: str) -> bool:
    value = options.get(name, "0").lower()
    if value not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise _error(f"{name}={value}", f"{name}=1 or {name}=0", "Write 1 or 0")
    return value in ("1", "true", "yes", "on")


def _milliseconds(options: Mapping[str, str], name: str, default_s: float) -> float:
    if name not in options:
        return default_s
    try:
        milliseconds = float(options[name])
    except ValueError:
        milliseconds = 0.0
    if not 0 < milliseconds < float("inf"):
        found = f"{name}={options[name]}"
        raise _error(found, f"a positive number of milliseconds, as {name}=100", "Write a number")
    return milliseconds / 1e3


def _error(value: str, wanted: str, remedy: str) -> ConfigError:
    return ConfigError("cache_url", without_secrets(value), wanted, remedy)
