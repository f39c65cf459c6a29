"""`precast explain`: which named part of a key made it another one than the nearest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precast.cache.catalog import read_payload, stored_parts
from precast.cache.disk import BUCKET
from precast.cli.options import CacheDirOption, JsonOption, find_keys, open_disk
from precast.errors import StoreError
from precast.graph.key import HashComputer, cause_of_miss, find_nearest
from precast.monitoring.stats import read_stats

if TYPE_CHECKING:
    from precast.cache.interface import CacheInterface


def explain_key(tier: CacheInterface, text: str, other: str | None) -> dict[str, Any]:
    """Return in which parts a stored key differs from another, or from the nearest one.

    Args:
        tier: Where both lie.
        text: A key, its first characters, or the name of a model.
        other: The same; None for the nearest.

    Raises:
        StoreError: The tier failed.
        ArtifactCorruptError: One of both is damaged.
        typer.BadParameter: There is no such key, or it does not say what it was made from.
    """
    stored = dict(stored_parts(tier, time.perf_counter))
    key = _find(tier, text)
    parts = _parts(stored, key)
    if other is not None:
        nearest: str | None = _find(tier, other)
        nearest_parts: Any = _parts(stored, nearest or "")
        if nearest_parts.get("kind") != parts.get("kind"):
            raise typer.BadParameter("one is an assembly and the other a piece: nothing to compare")
    else:
        stem = key.partition("-")[0]
        others = [item for item in stored.items() if item[0].partition("-")[0] != stem]
        nearest, nearest_parts = find_nearest(parts, others) or (None, None)
    return {
        "key": key,
        "kind": parts.get("kind"),
        "nearest": nearest,
        "cause": cause_of_miss(parts, nearest_parts),
        "differs": [] if nearest is None else HashComputer.explain(nearest_parts, parts),
        "text": _text_difference(tier, nearest, key),
    }


def _find(tier: CacheInterface, text: str) -> str:
    """Return a key by its first characters, or that of a model by its name."""
    found = find_keys([tier], text)
    if len(found) > 1:
        some = ", ".join(key[:12] for key in found[:4])
        raise typer.BadParameter(f"{len(found)} assemblies are of {text}: {some}; give a key")
    return found[0]


def _parts(stored: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    if key not in stored:
        raise typer.BadParameter(f"{key!r} does not say what it was made from")
    return stored[key]


def _text_difference(tier: CacheInterface, old: str | None, new: str) -> list[str]:
    """Return how the texts of two pieces differ, as a unified diff; empty for other things."""
    if old is None:
        return []
    before, after = (
        str(((read_payload(tier, key) or {}).get("piece") or {}).get("text", "")).splitlines()
        for key in (old, new)
    )
    import difflib

    return list(difflib.unified_diff(before, after, old[:12], new[:12], lineterm=""))


def explain_last(folder: str) -> list[dict[str, Any]]:
    """Return the misses of the last start that had any, with their causes.

    Raises:
        StoreError: The statistics cannot be read.
    """
    try:
        lines = [line for line in read_stats(folder) if line["misses"]]
    except OSError as error:
        raise StoreError("disk", "read statistics", f"{error.strerror}: {folder}") from error
    return [{"at": line["at"], **miss} for line in lines[-1:] for miss in line["misses"]]


def explain(
    key: Annotated[
        str | None,
        typer.Argument(help="A key, its first characters, or a model's name.", show_default=False),
    ] = None,
    other: Annotated[
        str | None,
        typer.Argument(help="What to compare it with; else the nearest.", show_default=False),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="Explain the last recorded misses.")] = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which part of a key differs from the nearest one: why there was no hit."""
    from precast.cli.output import as_time, print_json, print_line

    if (key is None) != last:
        raise typer.BadParameter("give a key, or `--last`")
    tier = open_disk(cache_dir)
    if last:
        misses = explain_last(f"{tier.root}/{BUCKET}/stats")
        if as_json:
            print_json(misses)
            return
        if not misses:
            print_line("No miss was recorded.")
        for miss in misses:
            print_line(
                f"{as_time(miss['at'])}  {miss['kind']} {miss['name']} ({miss['key'][:12]}): "
                f"{miss.get('cause', 'not explained')}"
            )
            _show_difference(miss.get("nearest"), miss.get("differs", []))
        return
    assert key is not None
    found = explain_key(tier, key, other)
    if as_json:
        print_json(found)
        return
    print_line(f"{found['kind']} {found['key']}: {found['cause']}")
    _show_difference(found["nearest"], found["differs"])
    for line in found["text"]:
        print_line(f"  {line}")


def _show_difference(nearest: str | None, differs: list[str]) -> None:
    from precast.cli.output import print_line

    if nearest is not None:
        print_line(f"  nearest: {nearest}")
    for sentence in differs:
        print_line(f"  {sentence}")
