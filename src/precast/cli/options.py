"""What several commands take: where the cache is, keys by their first characters, JSON or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Annotated

import typer

from precast.cache import DiskCache
from precast.cache.catalog import list_entries
from precast.cache.trust import Trust, open_trust
from precast.config import CompilationConfig, read_config

if TYPE_CHECKING:
    from precast.cache.interface import CacheInterface

#: Exit codes; 0: all is well.
PROBLEMS = 1
USAGE = 2

BYTE_UNITS = {
    name: 1024.0**power
    for power, letter in enumerate("bkmgt")
    for name in ((letter,) if letter == "b" else (letter, f"{letter}b", f"{letter}ib"))
}
AGE_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}

CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        help="The cache's folder; else as settings say.",
        metavar="DIR",
        file_okay=False,  # One that is not there yet is an empty cache.
        show_default=False,
    ),
]
TierOption = Annotated[
    str | None,
    typer.Option(
        "--tier",
        help="A tier of the setting `cache_url`, by its name; else the nearest.",
        metavar="NAME",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def settings(cache_dir: Path | None) -> CompilationConfig:
    """Return the settings of this user and folder, as a model started here would have them.

    Raises:
        ConfigError: One of them is not usable.
    """
    overrides = {} if cache_dir is None else {"cache_dir": cache_dir}
    return read_config(None, **overrides).config


def open_disk(cache_dir: Path | None) -> DiskCache:
    """Return the disk tier. It may not be there yet."""
    return DiskCache(settings(cache_dir).cache_path())


def open_tiers(config: CompilationConfig) -> list[CacheInterface]:
    """Return the tiers that outlive a process, nearest first; asks none of them.

    Raises:
        ConfigError: The setting `cache_url` is not usable.
    """
    if config.cache_url is None:
        return [DiskCache(config.cache_path())]
    import time

    from precast.cache.chain import open_chain

    chain = open_chain(config.cache_url, config.cache_path(), lambda event: None, time.monotonic)
    return [tier for tier in chain.tiers if not tier.is_in_memory]


def open_tier(cache_dir: Path | None, name: str | None) -> CacheInterface:
    """Return one tier: the nearest, or the one of a name.

    Raises:
        ConfigError: The setting `cache_url` is not usable.
        typer.BadParameter: No tier has that name.
    """
    return pick_tier(open_tiers(settings(cache_dir)), name)


def as_number(text: str, units: Mapping[str, float], example: str) -> float:
    """Return what a number with a unit stands for; without one it is in the smallest unit.

    Raises:
        typer.BadParameter: It is none, or negative.
    """
    number = text.rstrip("".join({*ascii_letters, " "}))
    unit = text[len(number) :].strip().lower()
    try:
        value = float(number) * (units[unit] if unit else 1.0)
    except (KeyError, ValueError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{text!r} is no amount; write it as {example}")
    return value


def pick_tier(tiers: Sequence[CacheInterface], name: str | None) -> CacheInterface:
    """Return the first tier, or the one of a name.

    Raises:
        typer.BadParameter: No tier has that name.
    """
    for tier in tiers:
        if name is None or tier.name == name:
            return tier
    names = [tier.name for tier in tiers]
    near = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
    raise typer.BadParameter(f"no tier is called {name!r}; {hint}")


def read_trust(config: CompilationConfig) -> Trust:
    """Return which keys sign and whose signatures count.

    Raises:
        ConfigError: A key cannot be read, or `cryptography` is missing.
    """
    return open_trust(
        signing_key=config.signing_key,
        trusted_keys=config.trusted_key_sources(),
        allow_unsigned=config.allow_unsigned,
    )


def find_keys(tiers: Sequence[CacheInterface], text: str) -> list[str]:
    """Return the keys that a text stands for: one by its first characters, or all of a model.

    Raises:
        StoreError: A tier failed.
        typer.BadParameter: There is none.
    """
    problem: typer.BadParameter | None = None
    for tier in tiers:
        try:
            return [find_key(tier, text)]
        except typer.BadParameter as error:
            problem = problem or error
            named = [entry["key"] for entry in list_entries(tier) if entry["model"] == text]
            if named:
                return named
    raise problem or typer.BadParameter("there is no tier to look in")


def find_key(tier: CacheInterface, text: str) -> str:
    """Return the one key of a tier that begins with a text, as git takes commits.

    Raises:
        StoreError: The tier failed.
        typer.BadParameter: There is none, or there are several.
    """
    keys = sorted(tier.manifest_keys())
    if text in keys:
        return text
    found = [key for key in keys if key.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(key[: len(text) + 6] for key in found[:4])
        raise typer.BadParameter(f"{text!r} begins {len(found)} keys: {some}; give more of it")
    raise typer.BadParameter(
        f"no key begins with {text!r}{_suggestion(text, keys)}; `precast cache ls` lists them"
    )


def _suggestion(text: str, keys: Iterable[str]) -> str:
    near = get_close_matches(text, {key[: len(text)] for key in keys}, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
