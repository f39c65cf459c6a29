"""`precast bundle`: what a model needs as one file, for images and machines without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from precast.cli.options import (
    CacheDirOption,
    JsonOption,
    find_keys,
    open_disk,
    open_tiers,
    read_trust,
    settings,
)

app = typer.Typer(no_args_is_help=True, help="Pack what models need into one file, and read it.")

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The bundle.")]


@app.command("create")
def create(
    file: FileArgument,
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY]...",
            help="Keys, their first characters, or names of models; else all that is kept.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write models and the pieces they need into a file; the same content gives the same bytes.

    Signed where the setting `signing_key` names a key.
    """
    from precast.cache.bundle_writing import create_bundle

    config = settings(cache_dir)
    tiers = open_tiers(config)
    wanted = None
    if keys:
        wanted = list(dict.fromkeys(found for key in keys for found in find_keys(tiers, key)))
    _show(create_bundle(file, tiers, wanted, trust=read_trust(config)), as_json)


@app.command("inspect")
def inspect(file: FileArgument, as_json: JsonOption = False) -> None:
    """Show what a bundle says it holds, and what it needs of a machine."""
    from precast.cache.bundle_reading import inspect_bundle
    from precast.cli.output import as_bytes, as_seconds, print_json, print_line, print_table

    found = inspect_bundle(file)
    if as_json:
        print_json(found)
        return
    print_table(
        ("key", "kind", "compiler", ">compiled in", ">size", "signed by"),
        [
            (
                manifest["key"][:12] + manifest["key"][64:],
                manifest["kind"] or "",
                manifest["compiler"] or "",
                as_seconds(manifest["seconds"]),
                as_bytes(manifest["bytes"]),
                manifest["signed_by"] or "nobody",
            )
            for manifest in found["manifests"]
        ],
    )
    print_line("")
    for name, values in found["needs"].items():
        for value in values:
            print_line(f"needs {name.rstrip('s')}: {_in_words(value)}")
    print_line(
        f"{len(found['manifests'])} manifests and {found['blobs']} files, "
        f"{as_bytes(found['bytes'])}, in {found['path']}"
    )


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)


@app.command("verify")
def verify(file: FileArgument, as_json: JsonOption = False) -> None:
    """Check every byte, that nothing is missing, and that trusted keys signed it.

    Unsigned content passes where the setting `allow_unsigned` says so.
    """
    from precast.cache.bundle_reading import verify_bundle

    _show(verify_bundle(file, read_trust(settings(None))), as_json)


@app.command("load")
def load(file: FileArgument, cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """Copy what a bundle holds into the cache, after checking all of it; needs no compiler."""
    from precast.cache.bundle_reading import load_bundle

    trust = read_trust(settings(cache_dir))
    _show(load_bundle(file, open_disk(cache_dir), trust=trust), as_json)


def _show(found: dict[str, Any], as_json: bool) -> None:
    from precast.cli.output import as_bytes, print_json, print_line

    if as_json:
        print_json(found)
        return
    signed = f", {found['signed']} signed by trusted keys" if "signed" in found else ""
    print_line(
        f"{found['path']}: {found['manifests']} manifests and {found['blobs']} files, "
        f"{as_bytes(found['bytes'])}{signed}"
    )
