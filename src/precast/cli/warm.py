"""`precast warm`: fill the cache in a build step, so that a service starts warm at once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from precast.cli.child import (
    REPORT_ENDINGS,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    ReportOption,
    ShapesOption,
    model_job,
    output_file,
    run_trial,
    show_reasons,
)
from precast.cli.options import (
    PROBLEMS,
    CacheDirOption,
    JsonOption,
    open_tiers,
    read_trust,
    settings,
)
from precast.errors import StoreError


def warm(
    model: ModelArgument,
    shapes: ShapesOption = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Call generate() of a transformers model, for so many tokens and with a static "
            "cache, instead of the model itself.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    push: Annotated[
        bool, typer.Option("--push", help="Wait until the shared tiers of `cache_url` have it.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it into one file too.", show_default=False),
    ] = None,
    report: ReportOption = None,
    allow_eager: Annotated[
        bool, typer.Option("--allow-eager", help="Exit code 0 also where something stayed eager.")
    ] = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile a model's calls into the cache, in a build step; a second run finds all of it.

    Calls have to be like the service's: the same arguments, dtypes, device and settings.
    Exit code 1: something stayed eager, or the cache or a shared tier has not got it.
    """
    from precast.cli.output import print_json

    config = settings(cache_dir)
    if push and not any(tier.is_shared and tier.is_writable for tier in open_tiers(config)):
        raise typer.BadParameter(
            "no shared tier to push to; name one in `cache_url`: 'disk,redis://host'"
        )
    job = model_job(
        "warm", model, shapes, dtype, device, cache_dir,
        generate=generate, bundle=output_file(bundle, "--bundle"),
        report=output_file(report, "--report", REPORT_ENDINGS),
    )  # fmt: skip
    result: dict[str, Any] = {}
    num_kinds = 0
    for row in run_trial(job):
        result = row
        num_kinds += row["num_kinds"]
        if not as_json and "call" in row:
            _show_row(row, num_kinds)
    result["not_kept"] = [] if result["is_warm"] else _not_kept(config, result["keys"])
    pushed = _push(config, result["keys"]) if push else []
    if as_json:
        print_json({**result, "pushed": pushed})
    else:
        _show(result, pushed)
    has_problems = result["not_kept"] or any(copy["problems"] for copy in pushed)
    if has_problems or (result["has_failures"] and not allow_eager):
        raise typer.Exit(PROBLEMS)


def _not_kept(config: Any, keys: list[str]) -> list[str]:
    """Return the assemblies that no tier has got: a start would not find them."""
    missing = keys
    for tier in open_tiers(config):
        with suppress(StoreError):  # Then it has none that a start could read.
            missing = [key for key in missing if tier.read_manifest(key) is None]
    return missing


def _push(config: Any, keys: list[str]) -> list[dict[str, Any]]:
    """Make sure that each shared tier has assemblies and their pieces; most arrived by themselves.

    Raises:
        StoreError: A tier failed.
    """
    from precast.cache.catalog import copy_entries, with_named
    from precast.cache.names import earlier_keys

    nearest, *others = open_tiers(config)
    # A start tries the assemblies of one key in turn, until there is none.
    before = [key for given in keys for key in earlier_keys(given) if nearest.read_manifest(key)]
    wanted = with_named(nearest, dict.fromkeys([*before, *keys]))
    return [
        copy_entries(nearest, tier, wanted, trust=read_trust(config))
        for tier in others
        if tier.is_shared and tier.is_writable
    ]


def _show_row(row: dict[str, Any], num_kinds: int) -> None:
    from precast.cli.output import as_count, as_seconds, print_line

    if not row["num_kinds"]:
        outcome = (
            "no new kind of call" if num_kinds else "nothing that a start could load, see below"
        )
    else:
        pieces = f"{as_count(row['num_pieces'], 'piece')}, {row['num_unique']} different"
        made = f"{row['num_compiled']} compiled, {row['num_from_cache']} from the cache"
        outcome = f"{pieces}: {made}; {as_seconds(row['seconds'])}"
    print_line(f"({row['call']})")
    print_line(f"  {outcome}")


def _show(result: dict[str, Any], pushed: list[dict[str, Any]]) -> None:
    from precast.cli.output import as_bytes, as_count, as_seconds, print_line

    print_line("")
    calls = as_count(len(result["calls"]), "call")
    kinds = as_count(result["num_kinds"], "kind of call", "kinds of call")
    if result["is_warm"] and result["num_kinds"]:
        took = as_seconds(sum(row["seconds"] for row in result["calls"]))
        saved = as_seconds(result["seconds_saved"])
        print_line(
            f"Warm already: {calls}, {kinds}; what they need was found in {took}. "
            f"Compiling it took {saved} of workers."
        )
    else:
        print_line(
            f"{calls}, {kinds}: {as_count(result['num_compiled'], 'piece')} compiled, "
            f"{result['num_from_cache']} from the cache, in {as_seconds(result['seconds'])}."
        )
    if result["not_kept"]:
        _show_not_kept(result)
    else:
        print_line(f"It lies in {result['cache_dir']}.")
    for copy in pushed:
        print_line(
            f"{copy['to']}: has all {len(copy['copied']) + len(copy['present'])} entries"
            if not copy["problems"]
            else f"{copy['to']}: {len(copy['problems'])} entries are not there"
        )
        for problem in copy["problems"]:
            print_line(f"  {problem['key'][:12]}: {problem['problem']}")
    if result["bundle"] is not None:
        print_line(f"{result['bundle']['path']}: {as_bytes(result['bundle']['bytes'])}.")
    if result["report"] is not None:
        print_line(f"{result['report']} has a page about it.")
    show_reasons(result["reasons"])


def _show_not_kept(result: dict[str, Any]) -> None:
    from precast.cli.output import as_count, print_line

    num, of = (
        len(result["not_kept"]),
        as_count(result["num_kinds"], "kind of call", "kinds of call"),
    )
    print_line(f"{num} of {of} not kept in {result['cache_dir']}: a start compiles again.")
    for failure in result["tier_failures"]:
        print_line(f"{failure['code']}: {failure['message']}")
        print_line(f"  What to do: {failure['remedy']}")
