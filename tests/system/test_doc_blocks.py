"""Every code block of the documentation: run, read, or listed with the reason why not.

A page is one program: its blocks of Python, and its shell commands between them, in order, in an
empty folder. Blocks with a title are files there. What cannot run here says so in a comment before
it, `<!-- not run: reason -->`, and is listed among the skipped tests.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from docblocks import (
    DATA,
    PAGES,
    ROOT,
    RUN,
    SHELL,
    Block,
    blocks_of,
    commands_of,
    files_of,
    script_of,
    shell_of,
)
from precast.config import CompilationConfig
from servers import free_port
from system.conftest import CALM

BLOCKS = {page: blocks_of(page) for page in PAGES}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
#: `text` is for what is no code, such as a drawing; a Dockerfile is run by `test_images.py`.
LANGUAGES = RUN | DATA | {"text", "dockerfile"}
#: Whatever is timed must not decide a test; nor do second looks belong to what pages show.
SETTINGS = {**CALM, "PRECAST_REVALIDATE": "never"}
#: Pages whose models take long to compile: all is done but the compiler's own work, which tests of
#: the examples do for like models.
UNCOMPILED = {"diffusers.md", "transformers-generate.md"}


def name_of(value: Any) -> str:
    return value.where if isinstance(value, Block) else str(value.relative_to(ROOT))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which all pages share a cache, and find `precast` and `python`."""
    folder = tmp_path_factory.mktemp("pages")
    programs = folder / "bin"
    programs.mkdir()
    for name, command in {"python": "", "precast": "-m precast"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "PRECAST_CACHE_DIR": str(folder / "cache"),
        "XDG_CONFIG_HOME": str(folder / "no-config"),
        "HF_HUB_OFFLINE": "1",
        **SETTINGS,
    }


@pytest.fixture
def run_page(shared: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    """Return a function that runs a page's program; what it leaves running is ended afterwards."""
    groups: list[int] = []

    def run(page: Path) -> tuple[int, str]:
        blocks = BLOCKS[page]
        port = str(free_port())
        files = {
            **files_of(blocks),
            "page.py": script_of(page, blocks),
            "page_shell.json": shell_of(blocks),
        }
        for name, text in files.items():
            (tmp_path / name).write_text(text.replace("8000", port))
        with (tmp_path / "page.out").open("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "page.py"],
                cwd=tmp_path,
                env={
                    **os.environ,
                    **shared,
                    **({"PRECAST_COMPILER": "eager"} if page.name in UNCOMPILED else {}),
                    "PAGE_SHELL": str(tmp_path / "page_shell.json"),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            groups.append(process.pid)
            code = process.wait(timeout=400)
        return code, (tmp_path / "page.out").read_text()

    yield run
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.mark.compile
@pytest.mark.parametrize(
    "page",
    [
        page
        for page, blocks in BLOCKS.items()
        if any(b.language in RUN and not b.title and not b.not_run for b in blocks)
    ],
    ids=name_of,
)
def test_the_page_runs(page: Path, run_page: Any) -> None:
    code, said = run_page(page)
    assert code == 0, said[-5000:]


@pytest.mark.parametrize("block", [b for b in ALL if b.not_run], ids=name_of)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert len(block.not_run.split()) >= 3, "say why, in a sentence"
    pytest.skip(block.not_run)


@pytest.mark.parametrize("block", ALL, ids=name_of)
def test_a_block_has_a_language_that_is_looked_after(block: Block) -> None:
    assert block.language in LANGUAGES, "give it a language; `text` for what is no code"


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.title and b.language == "python" and not b.not_run], ids=name_of
)
def test_a_file_is_used_by_its_page(block: Block) -> None:
    """
    A file runs because a command or another block names it; else nobody would have tried it.
    """
    others = [b.text for b in BLOCKS[block.page] if b.title != block.title and not b.not_run]
    assert any(Path(block.title).stem in text for text in others)


@pytest.mark.parametrize("block", [b for b in ALL if b.language in DATA], ids=name_of)
def test_data_can_be_read(block: Block) -> None:
    match block.language:
        case "json":
            json.loads(block.text)
        case "yaml":
            import yaml

            assert list(yaml.safe_load_all(block.text))
        case _:
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            read = tomllib.loads(block.text)
            assert read
            CompilationConfig(**read.get("tool", {}).get("precast", {}))


def precast_commands() -> list[tuple[str, str]]:
    """Return each command line of `precast` that any page shows, run or not, with its place."""
    found = []
    for block in ALL:
        if block.language not in SHELL:
            continue
        for command in commands_of(block):
            for line in command.line.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True, posix=True)
                if "precast" not in words:
                    continue
                first = words.index("precast")
                before = [word for word in words[:first] if word not in ("exec", "python", "-m")]
                if all("=" in word for word in before):
                    end = next(
                        (i for i, w in enumerate(words) if w.rstrip(";") != w or w in "|&><;"),
                        len(words) - 1,
                    )
                    words[end] = words[end].rstrip(";")
                    rest = [w for w in words[first + 1 : end + 1] if w not in ("|", "&", "&&", ">")]
                    found.append((block.where, shlex.join(rest)))
    return found


@pytest.mark.parametrize(("where", "line"), precast_commands())
def test_the_command_line_understands(where: str, line: str) -> None:
    """
    Commands and options exist, also where the page's example cannot be run.
    """
    import typer.main

    from precast.cli.app import app

    command: Any = typer.main.get_command(app)
    words = shlex.split(line)
    context = command.context_class(command, info_name="precast")
    while True:
        _, rest, _ = command.make_parser(context).parse_args(list(words))
        if not hasattr(command, "commands"):
            return
        assert rest, f"{where}: {line!r} names no command"
        assert rest[0] in command.commands, f"{where}: there is no command {rest[0]!r}"
        command, words = command.commands[rest[0]], rest[1:]
        context = command.context_class(command, info_name=rest[0], parent=context)
