"""`precast keys`: the keys that sign what is published, and those that are trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from precast.cli.options import JsonOption, settings

app = typer.Typer(no_args_is_help=True, help="Make and show keys for signing artifacts.")


@app.command("generate")
def generate(
    path: Annotated[Path, typer.Argument(help="Of the private key; the public is PATH.pub.")],
    as_json: JsonOption = False,
) -> None:
    """Make an Ed25519 key pair. Existing files are never replaced."""
    from precast.cache.trust import generate_key
    from precast.cli.output import print_json, print_line

    public = generate_key(path)
    if as_json:
        print_json({"private": str(path), "public": f"{path}.pub", "text": public})
        return
    print_line(f"private key: {path}, for the setting signing_key where artifacts are published")
    print_line(f"public key:  {path}.pub, for the setting trusted_keys where they are read:")
    print_line(public)


@app.command("show")
def show(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Private or public keys; else the settings'.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show public keys with their ids, by which manifests name who signed them."""
    from precast.cache.trust import load_private_key, load_public_keys, public_text
    from precast.cli.output import print_json, print_table

    config = settings(None)
    private = [config.signing_key] if config.signing_key is not None and not paths else []
    public = [] if paths else config.trusted_key_sources()
    for path in paths or ():
        holds_private = path.is_file() and b"PRIVATE KEY" in path.read_bytes()
        (private if holds_private else public).append(str(path))
    signing = [load_private_key(path) for path in private]
    found = [
        *({"id": key.key_id, "key": public_text(key.public_key), "signs": True} for key in signing),
        *(
            {"id": name, "key": public_text(key), "signs": False}
            for name, key in load_public_keys(public).items()
        ),
    ]
    if as_json:
        print_json(found)
        return
    print_table(
        ("id", "key", "use"),
        [
            (str(key["id"]), str(key["key"]), "signs" if key["signs"] else "trusted")
            for key in found
        ],
    )
