"""`precast cache`: list, show, remove and check what a tier keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from precast.cache import DiskCache
from precast.cache.catalog import (
    copy_entries,
    find_damage,
    list_entries,
    read_payload,
    with_named,
)
from precast.cache.names import is_internal_key
from precast.cli.options import (
    AGE_UNITS,
    BYTE_UNITS,
    PROBLEMS,
    CacheDirOption,
    JsonOption,
    TierOption,
    as_number,
    find_key,
    find_keys,
    open_tier,
    open_tiers,
    pick_tier,
    read_trust,
    settings,
)
from precast.errors import StoreError
from precast.events import Event, TierFailed

if TYPE_CHECKING:
    from precast.cache.interface import CacheInterface

app = typer.Typer(no_args_is_help=True, help="Look after the artifacts that a tier keeps.")

KeysArgument = Annotated[
    list[str], typer.Argument(metavar="KEY...", help="Keys, or their first characters.")
]
SomeKeysArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY]...",
        help="Keys, their first characters, or names of models; else all.",
        show_default=False,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")
]

_SORTS = {
    "kind": lambda entry: (entry["kind"], entry["model"] or "", entry["key"]),
    "size": lambda entry: -entry["file_bytes"],
    "seconds": lambda entry: -(entry["seconds"] or 0),
    "key": lambda entry: entry["key"],
}


@app.command("ls")
def list_cache(
    kind: Annotated[
        str | None,
        typer.Option(help="Only of this kind: `assembly`, `piece`.", show_default=False),
    ] = None,
    sort: Annotated[str, typer.Option(help=f"By {', '.join(_SORTS)}.")] = "kind",
    tier_name: TierOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is kept: assemblies (models) and the pieces that they share."""
    if sort not in _SORTS:
        raise typer.BadParameter(f"{sort!r} is none of {', '.join(_SORTS)}", param_hint="--sort")
    tier = open_tier(cache_dir, tier_name)
    entries = sorted(list_entries(tier), key=_SORTS[sort])
    entries = [entry for entry in entries if kind is None or entry["kind"] == kind]
    sizes = {digest: 0 for entry in entries for digest in entry["files"].values()}
    total = sum(entry["file_bytes"] + entry["manifest_bytes"] for entry in entries)
    if as_json:
        from precast.cli.output import print_json

        print_json({"tier": tier.name, "place": _place(tier), "entries": entries})
        return
    from precast.cli.output import as_bytes, as_seconds, print_line, print_table

    if not entries:
        print_line(f"Nothing is kept in {_place(tier)}.")
        return
    print_table(
        ("key", "kind", "what", "device", ">compiled in", ">size"),
        [
            (
                entry["key"][:12] + entry["key"][64:],
                entry["kind"],
                _what(entry),
                entry["device"] or "",
                as_seconds(entry["seconds"]),
                as_bytes(entry["file_bytes"] + entry["manifest_bytes"]),
            )
            for entry in entries
        ],
    )
    print_line(
        f"\n{len(entries)} entries with {len(sizes)} files, {as_bytes(total)}, in {_place(tier)}"
    )


def _place(tier: CacheInterface) -> str:
    """Say where a tier is: its folder, or its name."""
    return tier.root if isinstance(tier, DiskCache) else f"tier {tier.name}"


def _what(entry: dict[str, Any]) -> str:
    """Say in a few words what an entry is."""
    if entry["problem"] is not None:
        return f"damaged: {entry['problem']}"
    if entry["model"] is not None:
        return f"{entry['model']}, {entry['num_pieces'] or 0} pieces"
    users = ", ".join(entry["used_by"])
    return f"{entry['compiler'] or ''}{f', for {users}' if users else ''}"


@app.command("show")
def show(
    key: Annotated[str, typer.Argument(help="A key, or its first characters.")],
    text: Annotated[bool, typer.Option("--text", help="Print a piece's text, no more.")] = False,
    tier_name: TierOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one entry: what it was made from, its files, how it was verified."""
    from precast.cli.output import print_json, print_line

    tier = open_tier(cache_dir, tier_name)
    key = find_key(tier, key)
    payload = read_payload(tier, key) or {}
    if text:
        source = (payload.get("piece") or {}).get("text") or (payload.get("execution") or {}).get(
            "source"
        )
        if source is None:
            raise typer.BadParameter(f"{key[:12]} has no text")
        print_line(source.rstrip())
        return
    shown = describe_entry(payload)
    if as_json:
        print_json(shown)
        return
    for name, value in shown.items():
        if isinstance(value, dict):
            print_line(f"{name}:")
            for inner, found in value.items():
                print_line(f"  {inner}: {found}")
        elif isinstance(value, list):
            print_line(f"{name}:")
            for found in value:
                print_line(f"  {found}")
        elif value is not None:
            print_line(f"{name}: {value}")


def describe_entry(payload: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says, without code and other long things."""
    sizes = payload.get("sizes", {})
    shown = {
        "key": payload.get("key"),
        "kind": payload.get("kind"),
        "model": payload.get("model"),
        "compiler": payload.get("compiler"),
        "compile_seconds": payload.get("seconds"),
        "parts": payload.get("parts"),
        "files": {
            name: f"{digest}  {sizes.get(name)} bytes"
            for name, digest in payload.get("files", {}).items()
        },
        "verified": payload.get("verification"),
    }
    if payload.get("kind") == "assembly":
        shown["conditions"] = payload["call_check"]["conditions"][1:]
        shown["pieces"] = [
            f"{record['key']}  {record['compiler']}"
            if record.get("files") is not None
            else f"eager: {(record.get('reason') or {}).get('message', 'by choice')}"
            for record in payload["pieces"]
        ]
    return {name: value for name, value in shown.items() if value not in (None, {}, [])}


@app.command("rm")
def remove(
    keys: KeysArgument,
    dry_run: DryRunOption = False,
    tier_name: TierOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget entries: what needs them is captured or compiled again.

    Files that others may share stay until `precast cache prune`.
    """
    from precast.cli.output import print_json, print_line

    tier = open_tier(cache_dir, tier_name)
    found = list(dict.fromkeys(find_key(tier, key) for key in keys))
    if not dry_run:
        _check_writable(tier, "delete manifest")
        for key in found:
            tier.delete_manifest(key)
    if as_json:
        print_json({"tier": tier.name, "is_dry_run": dry_run, "removed": found})
        return
    for key in found:
        print_line(f"{'would remove' if dry_run else 'removed'} {key}")


@app.command("prune")
def prune_cache(
    max_size: Annotated[
        str | None,
        typer.Option(help="Such as 10GiB; else `cache_max_bytes`.", show_default=False),
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(
            help="Since the last use, such as 30d; else `cache_max_age`.", show_default=False
        ),
    ] = None,
    dry_run: DryRunOption = False,
    tier_name: TierOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what was not used for long, the least recently used of too much, and unused files.

    Starts do that by themselves for the disk, now and then. What is younger than an hour stays.
    """
    import time

    from precast.cache.collect import prune
    from precast.cli.output import as_bytes, print_json, print_line

    config = settings(cache_dir)
    max_bytes = config.cache_max_bytes
    if max_size is not None:
        max_bytes = int(as_number(max_size, BYTE_UNITS, "10GiB"))
    max_age_s = config.cache_max_age
    if max_age is not None:
        max_age_s = as_number(max_age, AGE_UNITS, "30d")
    failures: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, TierFailed):
            failures.append(event.reason.message)

    tier = open_tier(cache_dir, tier_name)
    _check_writable(tier, "collect")
    done = prune(
        [tier],
        emit=note,
        clock=time.perf_counter,
        max_bytes=max_bytes,
        max_age_s=max_age_s,
        is_trial=dry_run,
    )
    if as_json:
        print_json({"is_dry_run": dry_run, "tiers": [pruned.as_dict() for pruned in done]})
    else:
        for pruned in done:
            if pruned.skipped is not None:
                print_line(f"{pruned.tier}: left as it is: {pruned.skipped}")
                continue
            for key in pruned.keys:
                print_line(f"{'would remove' if dry_run else 'removed'} {key}")
            sizes = (as_bytes(pruned.num_bytes_before), as_bytes(pruned.num_bytes_after))
            print_line(
                f"{pruned.tier}: {pruned.num_manifests} entries and {pruned.num_blobs} files "
                f"{'would go' if dry_run else 'are gone'}, {sizes[0]} before, {sizes[1]} after"
            )
    if failures:
        raise typer.Exit(PROBLEMS)


@app.command("verify")
def verify(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Only these; else all.", show_default=False),
    ] = None,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Move what is damaged into quarantine.")
    ] = False,
    tier_name: TierOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every manifest and file and compare digests; exit code 1 where one does not match.

    Damage does no harm: starts check what they use, and compile again. It is set aside then, or by
    `--set-aside` now.
    """
    from precast.cli.output import as_bytes, print_json, print_line, print_table

    tier = open_tier(cache_dir, tier_name)
    wanted = (
        with_named(tier, [find_key(tier, key) for key in keys])
        if keys
        else sorted(tier.manifest_keys())
    )
    found = find_damage(tier, wanted, should_set_aside=set_aside)
    if as_json:
        print_json(found)
    else:
        if found["problems"]:
            print_table(
                ("key", "file", "problem"),
                [(p["key"][:12], p["file"] or "manifest", p["problem"]) for p in found["problems"]],
            )
            print_line("")
        outcome = f"{len(found['problems'])} problems" if found["problems"] else "all sound"
        outcome += "; set aside" if found["is_set_aside"] else ""
        print_line(
            f"{found['num_manifests']} manifests and {found['num_blobs']} files, "
            f"{as_bytes(found['num_bytes'])}: {outcome}"
        )
    if found["problems"]:
        raise typer.Exit(PROBLEMS)


def _check_writable(tier: CacheInterface, operation: str) -> None:
    """Refuse a tier that is only read.

    Raises:
        StoreError: It cannot be written.
    """
    if not tier.is_writable:
        raise StoreError(tier.name, operation, "it is read-only, or may not be written by us")


@app.command("push")
def push(
    keys: SomeKeysArgument = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="Only to this tier; else to all shared.", show_default=False),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy from the nearest tier to the shared ones of the setting `cache_url`.

    Assemblies take the pieces that they need along. Signed where `signing_key` names a key.
    """
    config = settings(cache_dir)
    source, *others = open_tiers(config)
    targets = [pick_tier(others, to)] if to else [tier for tier in others if tier.is_writable]
    if not targets:
        raise typer.BadParameter("no tier to push to; name one in `cache_url`: 'disk,redis://host'")
    done = []
    wanted = _wanted(source, keys)
    for target in targets:
        _check_writable(target, "write manifest")
        done.append(copy_entries(source, target, wanted, trust=read_trust(config)))
    _show_copies(done, as_json)


@app.command("pull")
def pull(
    keys: SomeKeysArgument = None,
    source_name: Annotated[
        str | None,
        typer.Option("--from", help="Only from this tier; else from all.", show_default=False),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy from the other tiers of the setting `cache_url` to the nearest, to start without them.

    Only what a key of `trusted_keys` signed, or anything where `allow_unsigned` is set.
    """
    config = settings(cache_dir)
    target, *others = open_tiers(config)
    sources = [pick_tier(others, source_name)] if source_name else others
    if not sources:
        raise typer.BadParameter("no tier to pull from; name one in `cache_url`")
    _check_writable(target, "write manifest")
    done = []
    for source in sources:
        wanted = _wanted(source, keys)
        done.append(copy_entries(source, target, wanted, trust=read_trust(config)))
    _show_copies(done, as_json)


def _wanted(source: CacheInterface, keys: list[str] | None) -> list[str]:
    """Return the keys to copy, what an assembly needs before it."""
    found = (
        [found for key in keys for found in find_keys([source], key)]
        if keys
        else sorted(key for key in source.manifest_keys() if not is_internal_key(key))
    )
    return with_named(source, found)


def _show_copies(done: list[dict[str, Any]], as_json: bool) -> None:
    from precast.cli.output import as_bytes, print_json, print_line

    if as_json:
        print_json(done)
    else:
        for copy in done:
            for problem in copy["problems"]:
                print_line(f"left out {problem['key'][:12]}: {problem['problem']}")
            print_line(
                f"{copy['from']} to {copy['to']}: {len(copy['copied'])} copied, "
                f"{as_bytes(copy['num_bytes'])}; {len(copy['present'])} were there"
            )
    if any(copy["problems"] for copy in done):
        raise typer.Exit(PROBLEMS)
