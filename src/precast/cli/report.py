"""`precast report`: a page about a start, from what a process recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from precast.cli.options import JsonOption, settings


def report(
    recording: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECORDING",
            help="A recording, or a folder of them: then the newest. Else the setting `record`.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the page; else beside the recording, as .html.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    should_open: Annotated[
        bool, typer.Option("--open", help="Show the page in the browser.")
    ] = False,
) -> None:
    """Write a page about a model's start: its pieces, what does not run compiled and why, figures.

    Recordings come from the setting `record`, or from `precast.save_report(model, "start.json")`.
    With `--json` what the page begins with is printed, and a page is written only with `-o`.
    """
    from precast.cli.output import as_bytes, print_json, print_line
    from precast.monitoring.recording import newest_of, read_recording
    from precast.monitoring.report import Story, write_report

    if recording is None:
        recording = settings(None).record_path()
    if recording is None:
        raise typer.BadParameter("give a recording, or set `record` to a folder of them")
    path = newest_of(recording) if recording.is_dir() else recording
    found = read_recording(path)
    target = output
    if target is None and (should_open or not as_json):
        target = path.with_suffix(".html")
    num_bytes = None if target is None else write_report(target, found)
    story = Story(found)
    if as_json:
        page = None if target is None else str(target)
        print_json({"recording": str(path), "page": page, **story.summary()})
    else:
        print_line(story.verdict())
        print_line(f"{target}: {as_bytes(num_bytes or 0)}")
    if should_open and target is not None:
        import webbrowser

        webbrowser.open(target.absolute().as_uri())
