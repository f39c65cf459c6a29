"""`precast doctor`: whether this machine can compile, keep and load."""

from __future__ import annotations

from typing import Annotated

import typer

from precast.cli.options import PROBLEMS, CacheDirOption, JsonOption, open_tiers, settings


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Neither run the compiler nor import torch.")
    ] = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: compiler, torch, GPU, folders, tiers, clocks. Exit code 1: one failed."""
    from precast.cli.checks import examine
    from precast.cli.output import print_json, print_line

    config = settings(cache_dir)
    findings = []
    for found in examine(config.cache_path(), open_tiers(config), is_quick=quick):
        findings.append(found)
        if not as_json:
            print_line(f"{found['status']:8}{found['check']:14}{found['message']}")
            if found["remedy"]:
                print_line(f"{'':22}{found['remedy']}.")
    num_failed = sum(found["status"] == "failed" for found in findings)
    if as_json:
        print_json({"num_failed": num_failed, "findings": findings})
    if num_failed:
        raise typer.Exit(PROBLEMS)
