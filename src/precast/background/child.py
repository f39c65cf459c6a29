"""How a process of ours starts: `python -m precast.background.child MODULE NICE PARENT FOLDER`.

It gives way and dies with its parent before it imports anything else: torch alone keeps a core
busy for seconds, beside calls that are served.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO

from precast.background.limits import die_with_parent, lower_priority


def start_child(
    module: str,
    nice: int,
    environment: Mapping[str, str],
    stderr: IO[bytes],
    folder: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a clean process in a session of its own that runs `main()` of a module.

    Args:
        module: Its name.
        nice: How much lower than ours its priority is, see `limits.lower_priority`.
        environment: Its own, in which it can also import what this process can: user's modules.
        stderr: Where its standard error goes; the other two are pipes.
        folder: Removed when we end and it does not.
    """
    program = "precast.background.child"
    return subprocess.Popen(
        [sys.executable, "-m", program, module, str(nice), str(os.getpid()), folder or ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        },
        start_new_session=True,  # A group of its own, so that what it starts can be ended with it.
    )


def main() -> None:
    """Do what the arguments say."""
    module, nice, parent, folder = sys.argv[1:]
    die_with_parent(int(parent), folder or None)  # First: it is about threads that start later.
    lower_priority(int(nice))
    import_module(module).main()


if __name__ == "__main__":
    main()
