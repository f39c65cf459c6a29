"""The program that `precast warm`, `check` and `bench` start: one job, in a process of its own.

    python -m precast.trial FD JOB

`JOB` is JSON with `do` and what that takes. Answers are JSON lines on the file descriptor `FD`:
`{"row": …}` for each step that is done, at last `{"result": …}` or `{"error": …}`. Standard output
and error are the model's, for whatever its code prints.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from typing import Any

from precast.errors import ConfigError, ModelError, PrecastError

_DOERS = {
    "warm": "precast.trial.warm:warm",
    "check": "precast.trial.check:check",
    "start": "precast.trial.bench:measure_start",
    "calls": "precast.trial.bench:measure_calls",
}


def main() -> int:
    """Do the job that the arguments hold; 0 also where the answer is an error."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as channel:

        def tell(**message: Any) -> None:
            # What the model printed so far comes before what is said of it.
            with contextlib.suppress(AttributeError, ValueError, OSError):
                sys.stdout.flush()
            channel.write(json.dumps(message, default=str) + "\n")
            channel.flush()

        job = json.loads(sys.argv[2])
        module, _, name = _DOERS[job["do"]].partition(":")
        try:
            do = getattr(importlib.import_module(module), name)
            tell(result=do(job, lambda row: tell(row=row)))
        except ModelError as error:
            tell(error={"message": error.sentences, "is_usage": error.is_usage})
        except PrecastError as error:
            tell(error={"message": str(error), "is_usage": isinstance(error, ConfigError)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
