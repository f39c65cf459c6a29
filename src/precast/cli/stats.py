"""`precast stats`: what the cache did over all processes of this user."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from precast.cache.disk import BUCKET
from precast.cli.options import CacheDirOption, JsonOption, settings
from precast.errors import StoreError
from precast.monitoring.stats import KEPT_DAYS, add_up, read_stats


def collect_stats(folder: str, since_s: float) -> dict[str, Any]:
    """Return the sums of all lines since a time, and the misses of the last cold start.

    Raises:
        StoreError: The folder cannot be read.
    """
    try:
        lines = list(read_stats(folder, since_s))
    except OSError as error:
        raise StoreError("disk", "read statistics", f"{error.strerror}: {folder}") from error
    total = add_up(lines)
    starts = total.get("starts", {})
    with_misses = [line for line in lines if line["misses"]]
    return {
        "since": since_s,
        "num_lines": len(lines),
        "starts": {
            kind: starts.get(kind, {"count": 0, "seconds": 0.0}) for kind in ("warm", "cold")
        },
        "seconds_saved": total.get("seconds_saved", 0.0),
        "compiles": total.get("compiles", {"count": 0, "seconds": 0.0, "bytes": 0}),
        "loads": total.get("loads", {"count": 0, "seconds": 0.0}),
        "hits": total.get("hits", {}),
        "misses": total.get("misses", {}),
        "published": total.get("published", {}),
        "reasons": total.get("reasons", {}),
        "second_looks": total.get("second_looks", {}),
        "last_misses": [
            {"at": line["at"], **miss} for line in with_misses[-1:] for miss in line["misses"]
        ],
    }


def stats(
    days: Annotated[
        int, typer.Option(min=1, max=KEPT_DAYS, help="How far to look back.")
    ] = KEPT_DAYS,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show hits by tier, misses by cause, seconds saved and spent, bytes and reasons.

    Sums over all processes that used this cache folder.
    """
    folder = settings(cache_dir).cache_path() / BUCKET / "stats"
    found = collect_stats(str(folder), time.time() - days * 86400)
    if as_json:
        from precast.cli.output import print_json

        print_json({"folder": str(folder), **found})
        return
    _show(found, days, str(folder))


def _show(found: dict[str, Any], days: int, folder: str) -> None:
    from precast.cli.output import as_bytes, as_seconds, print_line, print_table

    if not found["num_lines"]:
        print_line(f"Nothing was recorded in {folder} in the last {days} days.")
        return
    rows = []
    for kind in ("warm", "cold"):
        start = found["starts"][kind]
        each = start["seconds"] / start["count"] if start["count"] else None
        note = "" if each is None else f"{as_seconds(each)} each"
        rows.append((f"{kind} starts", f"{start['count']}", note))
    compiles = found["compiles"]
    rows += [
        ("seconds saved", as_seconds(found["seconds_saved"]), "of compile workers"),
        (
            "seconds compiling",
            as_seconds(compiles["seconds"]),
            f"for {compiles['count']} artifacts",
        ),
    ]
    print_line(f"The last {days} days, all processes\n")
    print_table(("", ">", ""), rows)
    traffic = {**found["hits"], **found["published"]}
    if traffic:
        print_line("")
        print_table(
            ("tier", ">hits", ">read", ">published", ">written"),
            [
                (
                    tier,
                    str(found["hits"].get(tier, {}).get("count", 0)),
                    as_bytes(found["hits"].get(tier, {}).get("bytes", 0)),
                    str(found["published"].get(tier, {}).get("count", 0)),
                    as_bytes(found["published"].get(tier, {}).get("bytes", 0)),
                )
                for tier in sorted(traffic)
            ],
        )
    causes = [
        (kind, cause, str(number))
        for kind, by_cause in sorted(found["misses"].items())
        for cause, number in sorted(by_cause.items(), key=lambda item: -item[1])
    ]
    if causes:
        print_line("")
        print_table(("missed", "because of", ">times"), causes)
    if found["reasons"]:
        print_line("")
        ranked = sorted(found["reasons"].items(), key=lambda item: -item[1])
        print_table(("reason", ">times"), [(code, str(number)) for code, number in ranked])
    if found["last_misses"]:
        print_line("\n`precast explain --last` says more about the last misses.")
