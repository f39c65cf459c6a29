"""The code blocks of the documentation, and a program that runs those of one page in order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
#: The front page first: it shows a cold start, with a cache that nothing has filled yet.
PAGES = [
    ROOT / "docs" / "index.md",
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "index.md"),
]
SHELL = {"bash", "console", "sh", "shell"}
DATA = {"json", "toml", "yaml"}
#: Code of a page that takes part in its run.
RUN = {"python", *SHELL}

_FENCE = re.compile(r"^( *)```+ *([\w-]*)(?: +title=\"([^\"]+)\")?.*$")
_MARKER = re.compile(r"^ *<!-- (not run|output varies)(?:, (all \w+))?: (.+?) -->$")


class Block(NamedTuple):
    """One fenced block, or Python in a comment.

    `line` is that of its fence; `title` is the file it shows.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str
    not_run: str  # Why, from a comment before it; empty: it runs.
    output_varies: str

    @property
    def where(self) -> str:
        """Return page and line, for the name of a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, with what comments before them say of running them.

    `<!-- not run: reason -->` and `<!-- output varies: reason -->` concern the next block;
    `<!-- not run, all console: reason -->` all blocks of a language on the page. A comment that
    begins with `<!-- python` is run like a block: what a page takes as given.
    """
    lines = page.read_text().splitlines()
    found: list[Block] = []
    said: dict[str, str] = {}
    of_all: dict[tuple[str, str], str] = {}
    i = 0
    while i < len(lines):
        fence = _FENCE.match(lines[i])
        marker = _MARKER.match(lines[i])
        if marker:
            kind, scope, reason = marker.groups()
            if scope:
                of_all[kind, scope.removeprefix("all ")] = reason
            else:
                said[kind] = reason
        elif fence or lines[i] == "<!-- python":
            indent, language, title = fence.groups() if fence else ("", "python", "")
            last = "```" if fence else "-->"
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == last)
            found.append(
                Block(
                    page,
                    i + 1,
                    language,
                    title or "",
                    "".join(line.removeprefix(indent) + "\n" for line in lines[i + 1 : end]),
                    said.get("not run", of_all.get(("not run", language), "")),
                    said.get("output varies", of_all.get(("output varies", language), "")),
                )
            )
            said = {}
            i = end
        elif lines[i].strip():
            assert not said, f"{page.name}:{i + 1}: a marker belongs directly before its block"
        i += 1
    return found


class Command(NamedTuple):
    """One command of a shell block and what the page shows of its output; None: nothing."""

    line: str
    shown: str | None


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a shell block: its lines, or those after a `$` and their output."""
    if not block.text.startswith("$ "):
        return [Command(block.text, None)]
    commands = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, rest = part.partition("\n")
        while line.endswith("\\"):
            more, _, rest = rest.partition("\n")
            line = f"{line}\n{more}"
        commands.append(Command(line, rest))
    return commands


def script_of(page: Path, blocks: list[Block]) -> str:
    """Return a program with the blocks of a page at the very lines where they stand there.

    Python is Python; in place of a shell block `run_shell` is called with its number. Files that
    blocks show are written before.
    """
    lines = ["" for _ in page.read_text().splitlines()]
    lines[0] = "from runpage import run_shell as _run_shell"
    for number, block in enumerate(blocks):
        if block.not_run or block.title or block.language not in RUN:
            continue
        if block.language == "python":
            lines[block.line : block.line + block.text.count("\n")] = block.text.splitlines()
        else:
            lines[block.line] = f"_run_shell({number})"
    return "\n".join(lines) + "\n"


def files_of(blocks: list[Block]) -> dict[str, str]:
    """Return the files that a page shows, by name; blocks of one title are parts of one file."""
    files: dict[str, str] = {}
    for block in blocks:
        if block.title:
            joint = "\n\n" if block.title in files else ""
            files[block.title] = files.get(block.title, "") + joint + block.text
    return files


def shell_of(blocks: list[Block]) -> str:
    """Return what `run_shell` needs of each block, as JSON."""
    return json.dumps(
        [
            {
                "where": block.where,
                "commands": commands_of(block) if block.language in SHELL else [],
                "output_varies": bool(block.output_varies),
            }
            for block in blocks
        ]
    )
