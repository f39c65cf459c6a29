"""`precast check`: whether a model computes the same compiled, and what stays eager and why."""

from __future__ import annotations

from typing import Any

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
from precast.cli.options import PROBLEMS, CacheDirOption, JsonOption, settings


def check(
    model: ModelArgument,
    shapes: ShapesOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    report: ReportOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a model compiled with eager at sizes where compiled code may go wrong.

    Names each graph break with its line, and each reason for which something stays eager.
    Exit code 1: something differs, breaks the graph, or failed.
    """
    from precast.cli.output import print_json, print_line

    settings(cache_dir)  # What is not usable is refused here, before anything starts.
    result: dict[str, Any] = {}
    job = model_job(
        "check", model, shapes, dtype, device, cache_dir,
        report=output_file(report, "--report", REPORT_ENDINGS),
    )  # fmt: skip
    for row in run_trial(job):
        result = row
        if not as_json and "problem" in row:
            outcome = row["problem"] or (
                "equal"
                if not row["max_abs_error"]
                else f"off by {row['max_rel_error']:.1e} at most"
            )
            print_line(f"{'differs' if row['problem'] else 'ok':8}({row['call']}): {outcome}")
    result["verdict"] = verdict(result)
    if as_json:
        print_json(result)
    else:
        print_line("")
        for found in result["graph_breaks"]:
            print_line(f"graph break at {found['location'] or 'an unknown line'}: {found['why']}")
            if found["line"]:
                print_line(f"    {found['line']}")
        show_reasons(result["reasons"])
        if result["report"] is not None:
            print_line(f"{result['report']} has a page about it.")
        print_line(result["verdict"])
    if result["has_failures"]:
        raise typer.Exit(PROBLEMS)


def verdict(result: dict[str, Any]) -> str:
    """Return what a check came to, in one sentence."""
    from precast.cli.output import as_count

    calls, num_different = as_count(len(result["calls"]), "call"), result["num_different"]
    places = result["places"]
    num_places = places["compiled"] + places["eager"]
    if num_different:
        same = f"{result['model']} differs from eager in {num_different} of {calls}"
    else:
        largest = result["max_rel_error"]
        how_far = f"off by {largest:.1e} of the largest value at most" if largest else "to the bit"
        same = f"{result['model']} computes the same as eager in {calls} ({how_far})"
    if result["graph_breaks"]:
        breaks = as_count(len(result["graph_breaks"]), "graph break")
        parts = places["compiled"]
        runs = f"{as_count(parts, 'piece')} run{'s' if parts == 1 else ''} compiled, the rest eager"
        how = f"has {breaks}: {runs if parts else 'all of it runs eager'}"
    elif not num_places:
        how = "is not compiled"
    elif places["eager"] and result["reasons"]:
        how = f"{places['eager']} of {num_places} pieces stay eager"
    elif result["reasons"]:
        how = "not all of its calls are compiled"
    elif places["eager"]:
        how = f"runs {as_count(num_places, 'piece')} as eager code, as the settings say"
    else:
        how = f"runs compiled ({as_count(num_places, 'piece')})"
    join = "and" if not num_different and not result["has_failures"] else "but"
    return f"{same}, {join if not num_different else 'and'} {how}."
