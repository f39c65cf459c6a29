"""The command line: `precast warm`, `cache`, `doctor` and others. Answers without importing torch.

Each module is a group of commands, thin over functions that return plain data; `docs/cli.md` shows
them all. Exit codes: 0 all is well, 1 problems were found, 2 the command cannot be followed.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line with this process's arguments; ends the process."""
    for package in ("typer", "rich"):  # Looked for only: importing rich takes its time.
        if find_spec(package) is None:
            print(
                f"The command line needs the package {package!r}: "
                "run `pip install 'precast[cli]'`.",
                file=sys.stderr,
            )
            raise SystemExit(2)
    from precast.cli.app import app

    app(prog_name="precast")
