"""What a page's program calls for its shell blocks. Runs beside the page, not in pytest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

#: One shell after the other: what one exports, and where it goes, the next finds.
_STATE = {"cwd": str(Path.cwd()), "env": dict(os.environ)}


def run_shell(number: int) -> None:
    """Run a block's commands one by one; one that fails, or says other things, ends the page."""
    block = json.loads(Path(os.environ["PAGE_SHELL"]).read_text())[number]
    for line, shown in block["commands"]:
        said = _run(line, where=block["where"])
        if shown is not None and not block["output_varies"]:
            expected, found = normalised(shown), normalised(said)
            pattern = ".*".join(map(re.escape, expected.split("…")))
            if not re.fullmatch(pattern, found, re.DOTALL):
                sys.exit(f"{block['where']}: $ {line}\nshown:\n{expected}\nfound:\n{found}")


def _run(line: str, where: str) -> str:
    with tempfile.NamedTemporaryFile("w+") as output, tempfile.NamedTemporaryFile() as after:
        # A program that the page leaves running keeps its output; a pipe would never end.
        program = f"set -eo pipefail\n{line}\n{{ pwd; env -0; }} > {after.name}"
        done = subprocess.run(
            ["bash", "-c", program],
            cwd=_STATE["cwd"],
            env=_STATE["env"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
        said = Path(output.name).read_text()
        if done.returncode:
            sys.exit(f"{where}: $ {line}\nended with {done.returncode}:\n{said[-3000:]}")
        folder, _, variables = Path(after.name).read_bytes().decode().partition("\n")
        _STATE["cwd"] = folder
        _STATE["env"] = dict(pair.split("=", 1) for pair in variables.split("\0") if pair)
        return said


def normalised(text: str) -> str:
    """Return a text with digests, numbers, dates and runs of spaces made equal."""
    text = re.sub(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,}(-\d)?\b", "#", text)
    text = re.sub(r"\d+([.,:-]\d+)*(e[+-]?\d+)?", "#", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)
