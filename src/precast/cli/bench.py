"""`precast bench`: what a start and what calls take, compiled and eager, in fresh processes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from precast.cli.child import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    ShapesOption,
    model_job,
    run_trial,
    show_reasons,
)
from precast.cli.options import PROBLEMS, CacheDirOption, JsonOption, settings

app = typer.Typer(
    no_args_is_help=True, help="Measure starts and calls of a model, compiled against eager."
)

NAMES = {"eager": "eager", "precast": "Precast", "compile": "torch.compile"}

AgainstOption = Annotated[
    str | None,
    typer.Option(help="Measure torch.compile too: `--against compile`.", show_default=False),
]
RepeatsOption = Annotated[
    int, typer.Option(min=1, help="Fresh processes for each figure, which is their median.")
]


def _ways(against: str | None) -> list[str]:
    if against not in (None, "eager", "compile"):
        raise typer.BadParameter(f"--against {against!r}: write compile, or eager")
    return ["eager", "precast", *(["compile"] if against == "compile" else [])]


@app.command("startup")
def startup(
    model: ModelArgument,
    shapes: ShapesOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    against: AgainstOption = None,
    repeats: RepeatsOption = 3,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how long a model takes until its first output: eager, cold, and warm.

    Cold is measured once, from an empty cache made for it, which warm starts then use. With
    `--cache-dir` that cache is used as it is, and the first start may be warm.
    """
    from precast.cli.output import print_json

    settings(cache_dir)
    runs: dict[str, list[dict[str, Any]]] = {"eager": []}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="precast-bench-")))
        job = model_job("start", model, shapes, dtype, device, cache_dir or scratch / "cache")

        def run(name: str, way: str) -> None:
            variables = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
            (result,) = run_trial({**job, "way": way}, **variables)
            runs.setdefault(name, []).append(result)
            if not as_json:
                _show_start(name, result)

        ways = _ways(against)
        for way in ways[1:]:
            run(f"{way} cold", way)
        for _ in range(repeats):  # In turn, so that a busy minute hits all of them.
            for way in ways:
                run(way if way == "eager" else f"{way} warm", way)
    found = summarize_starts(model, runs)
    if as_json:
        print_json(found)
    else:
        _show_starts(found)
    if found["has_failures"]:
        raise typer.Exit(PROBLEMS)


def summarize_starts(model: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians by way, what they are against eager, and how noisy that was."""
    figures = ("start_s", "first_output_s", "call_s", "peak_memory_mb")
    ways = {
        name: {
            **{figure: statistics.median(run[figure] for run in done) for figure in figures},
            "spread": _range(run["first_output_s"] for run in done),
            "runs": done,
        }
        for name, done in runs.items()
    }
    for way in ways.values():
        way["against_eager"] = way["first_output_s"] / ways["eager"]["first_output_s"]
    warm = runs["precast warm"]
    return {
        "model": model,
        "call": warm[0]["call"],
        "torch": warm[0]["torch"],
        "device": warm[0]["device"],
        "threads": warm[0]["threads"],
        "ways": ways,
        "noise": max(way["spread"] for way in ways.values()),
        "is_warm": all(run["is_warm"] for run in warm),
        "reasons": warm[-1]["reasons"],
        "has_failures": any(run["has_failures"] or not run["is_warm"] for run in warm),
    }


def _range(values: Iterable[float]) -> float:
    """Return how far figures reach from the least to the largest, by their median."""
    known = sorted(values)
    middle = statistics.median(known)
    return (known[-1] - known[0]) / middle if middle else 0.0


def _title(name: str) -> str:
    way, _, how = name.partition(" ")
    return f"{NAMES[way]}, {how}" if how else NAMES[way]


def _show_start(name: str, result: dict[str, Any]) -> None:
    import sys

    from precast.cli.output import as_seconds

    took = as_seconds(result["first_output_s"])
    print(f"  {_title(name)}: first output after {took}", file=sys.stderr, flush=True)


def _show_starts(found: dict[str, Any]) -> None:
    from precast.cli.output import as_count, as_seconds, print_line, print_table

    print_line(f"{found['model']} ({found['call']}), {_machine(found)}\n")
    print_table(
        ("", ">start", ">first output", ">against eager", ">a call", ">peak memory"),
        [
            (
                _title(name),
                "" if name == "eager" else as_seconds(way["start_s"]),
                as_seconds(way["first_output_s"]),
                f"{way['against_eager']:.2f}",
                _as_time(way["call_s"]),
                f"{way['peak_memory_mb']:.0f} MB",
            )
            for name, way in found["ways"].items()
        ],
    )
    repeats = as_count(len(found["ways"]["eager"]["runs"]), "process", "processes")
    print_line(
        f"\nMedians of {repeats}; cold once. Noise: first outputs of one way "
        f"±{_as_share(found['noise'] / 2)}."
    )
    if "compile warm" in found["ways"]:
        ours, theirs = (found["ways"][f"{way} warm"]["start_s"] for way in ("precast", "compile"))
        if ours > 0:
            print_line(f"A warm start takes torch.compile {theirs / ours:.1f} times as long.")
    if not found["is_warm"]:
        print_line("The second start was not warm: nothing that it could load was kept.")
    show_reasons(found["reasons"])


@app.command("call")
def call(
    model: ModelArgument,
    shapes: ShapesOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    against: AgainstOption = None,
    repeats: RepeatsOption = 3,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="How long each process measures each input.")
    ] = 2.0,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a call takes once everything is loaded, compiled against eager.

    All ways take turns call by call. What the cache lacks is compiled into it first.
    """
    from precast.cli.output import print_json

    settings(cache_dir)
    job = model_job(
        "calls", model, shapes, dtype, device, cache_dir, ways=_ways(against), seconds=seconds
    )
    runs = []
    for _ in range(repeats):
        *_, result = run_trial(job)
        runs.append(result)
    found = summarize_calls(model, runs)
    if as_json:
        print_json(found)
    else:
        _show_calls(found)
    if found["has_failures"]:
        raise typer.Exit(PROBLEMS)


def summarize_calls(model: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians by call and way, what they are against eager, and how noisy that was."""
    calls = []
    for number, first in enumerate(runs[0]["calls"]):
        rows = [run["calls"][number] for run in runs]
        ways = {
            way: {
                **{
                    figure: statistics.median(row["ways"][way][figure] for row in rows)
                    for figure in ("median_s", "spread", "against_eager")
                },
                "ratio_spread": _range(row["ways"][way]["against_eager"] for row in rows),
            }
            for way in first["ways"]
        }
        calls.append({"call": first["call"], "ways": ways})
    every_way = [way for one in calls for way in one["ways"].values()]
    return {
        "model": model,
        **{name: runs[0][name] for name in ("torch", "device", "threads")},
        "calls": calls,
        "noise": {
            "within": max(way["spread"] for way in every_way),
            "between": max(way["ratio_spread"] for way in every_way),
        },
        "reasons": runs[-1]["reasons"],
        "has_failures": any(run["has_failures"] for run in runs),
        "runs": runs,
    }


def _show_calls(found: dict[str, Any]) -> None:
    from precast.cli.output import as_count, print_line, print_table

    print_line(f"{found['model']}, {_machine(found)}\n")
    names = list(found["calls"][0]["ways"])
    print_table(
        ("call", *(f">{NAMES[way]}" for way in names), ">eager / Precast"),
        [
            (
                one["call"],
                *(_as_time(one["ways"][way]["median_s"]) for way in names),
                f"{one['ways']['precast']['against_eager']:.2f}",
            )
            for one in found["calls"]
        ],
    )
    noise = found["noise"]
    print_line(
        f"\nMedians of {as_count(len(found['runs']), 'process', 'processes')}. Noise: half of the "
        f"calls of one way ±{_as_share(noise['within'])} around their median, ratios of processes "
        f"±{_as_share(noise['between'] / 2)}."
    )
    closest = min(abs(one["ways"]["precast"]["against_eager"] - 1) for one in found["calls"])
    if len(found["runs"]) > 1 and closest < noise["between"]:
        print_line("Ratios that are nearer to 1 than that say nothing.")
    show_reasons(found["reasons"])


def _machine(found: dict[str, Any]) -> str:
    from precast.cli.output import as_count

    threads = f", {as_count(found['threads'], 'thread')}" if found["device"] == "CPU" else ""
    return f"{found['device']}{threads}, torch {found['torch']}"


def _as_share(noise: float) -> str:
    """Return noise as people read it; beyond its own size it is no figure any more."""
    return f"{noise:.0%}" if noise <= 1 else "over 100%"


def _as_time(seconds: float) -> str:
    """Return the time of a call, three digits of it."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"
