"""All commands as one program; what goes wrong in one becomes a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from precast import __version__
from precast.cli import bench, bundle, cache, check, doctor, explain, keys, report, stats, warm
from precast.cli.options import PROBLEMS, USAGE
from precast.errors import ConfigError, ModelError, PrecastError


class _Program(TyperGroup):
    """A group of commands whose errors are told in words."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(USAGE) from error
        except ModelError as error:
            typer.echo(f"Error: {error.sentences}", err=True)
            raise typer.Exit(USAGE if error.is_usage else PROBLEMS) from error
        except PrecastError as error:
            # Not what an error says of models: here is none that could run eager.
            typer.echo(f"Error: {error.summary}. {error.remedy}.", err=True)
            raise typer.Exit(PROBLEMS) from error
        except BrokenPipeError:
            # Whoever reads us has seen enough (`| head`). Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"precast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Compile models before they serve, and look after what is kept: cache, statistics, machine.

    Exit codes: 0 all is well, 1 problems were found, 2 the command cannot be followed.
    """


app.add_typer(cache.app, name="cache")
app.add_typer(bundle.app, name="bundle")
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")
app.command("warm")(warm.warm)
app.command("check")(check.check)
app.command("stats")(stats.stats)
app.command("explain")(explain.explain)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
