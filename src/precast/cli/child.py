"""Commands that run a model do so in a child process: that imports torch, and this does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from precast.cli.options import PROBLEMS, USAGE
from precast.trial.shapes import parse_dtype, parse_shapes, to_json

#: What `precast.save_report` writes.
REPORT_ENDINGS = (".html", ".json")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`package.module:factory`, a function without arguments that returns an nn.Module or "
        "(module, example inputs); or a directory that transformers' save_pretrained() wrote.",
        show_default=False,
    ),
]
ShapesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        metavar="INPUTS",
        help="Inputs: `1..8x128` by position, `input_ids=1..8x128:int64,attention_mask=1..8x128` "
        "by keyword; a range stands for several calls. May be given several times.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Of the weights and of inputs without one.", show_default=False),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1.", show_default=False),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write a page about it too: pieces, what stays eager, figures.",
        show_default=False,
    ),
]


def model_job(
    do: str,
    model: str,
    shapes: list[str] | None,
    dtype: str | None,
    device: str | None,
    cache_dir: Path | None,
    **more: Any,
) -> dict[str, Any]:
    """Return a job for `run_trial`; what is mistyped is refused here, before anything starts.

    Raises:
        ModelError: Shapes or the dtype cannot be read.
    """
    return {
        "do": do,
        "model": model,
        "shapes": [to_json(parse_shapes(text)) for text in shapes or ()],
        "dtype": None if dtype is None else parse_dtype(dtype),
        "device": device,
        "cache_dir": None if cache_dir is None else str(cache_dir.absolute()),
        **more,
    }


def output_file(path: Path | None, option: str, endings: tuple[str, ...] = ()) -> str | None:
    """Return where a job shall write; what cannot work is refused before minutes of compiling.

    Raises:
        typer.BadParameter: It is a folder, has another ending, or lies where nothing can be made.
    """
    if path is None:
        return None
    folder = path.absolute().parent
    if path.is_dir():
        problem = f"{path} is a folder; name a file"
    elif endings and path.suffix not in endings:
        problem = f"{path} has to end in {' or '.join(endings)}"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"{folder} may not be written by this user"
    else:
        return str(path.absolute())
    raise typer.BadParameter(problem, param_hint=option)


def run_trial(job: Mapping[str, Any], **environment: str) -> Iterator[dict[str, Any]]:
    """Run a job in a fresh process; yield its rows as they come, and its result at last.

    What the model's code prints goes to standard error, so that ours stays what we say. Ends the
    command where the job cannot be done.

    Args:
        job: As `model_job` returns it.
        **environment: Variables for that process.
    """
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "precast.trial", str(writing), json.dumps(job)]
    with os.fdopen(reading, encoding="utf-8") as channel:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # Standard error.
            pass_fds=(writing,),
            env={**os.environ, **environment},
        ) as child:
            os.close(writing)
            is_answered = False
            for line in channel:
                message = json.loads(line)
                if "error" in message:
                    typer.echo(f"Error: {message['error']['message']}", err=True)
                    raise typer.Exit(USAGE if message["error"]["is_usage"] else PROBLEMS)
                is_answered = is_answered or "result" in message
                yield message.get("row") or message["result"]
                if is_answered:
                    break  # A process that the model's code left behind may hold the channel open.
        if not is_answered:
            code = child.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            typer.echo(f"Error: the process that ran {job['model']} ended with {how}.", err=True)
            raise typer.Exit(PROBLEMS)


def show_reasons(reasons: list[dict[str, Any]]) -> None:
    """Print why something runs eager, where, and what to do."""
    from precast.cli.output import print_line

    for reason in reasons:
        times = f" ({reason['count']} times)" if reason["count"] > 1 else ""
        at = f" at {reason['location']}" if reason["location"] else ""
        print_line(f"{reason['code']}{times}, {reason['where']}{at}: {reason['message']}")
        print_line(f"  What to do: {reason['remedy']}")
