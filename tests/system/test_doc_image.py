"""The Dockerfile of the documentation, step by step in folders: there is no docker here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docblocks import ROOT, blocks_of, files_of
from system.conftest import CALM

PAGE = ROOT / "docs" / "how-to" / "container-image.md"


def run_image(context: Path, root: Path, secrets: dict[str, str]) -> str:
    """Do what a Dockerfile says and return what its last command printed.

    Each stage is a folder, in which `/app` is a folder too. What installs packages is left out.
    """
    text = (context / "Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, Path] = {}
    stage, workdir, variables = root, root, dict[str, str]()
    said = ""

    def run(command: str, **more: str) -> str:
        done = subprocess.run(
            ["sh", "-ec", command.replace("/app", str(stage / "app"))],
            cwd=workdir,
            env={
                "PATH": f"{root / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
                "PYTHONPATH": str(ROOT / "src"),
                "HOME": str(stage / "home"),
                **CALM,
                **{k: v.replace("/app", str(stage / "app")) for k, v in variables.items()},
                **more,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"
        return done.stdout

    (root / "bin").mkdir(parents=True, exist_ok=True)
    (root / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (root / "bin" / "python").chmod(0o755)
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        match word:
            case "FROM":
                name = rest.partition(" AS ")[2] or "last"
                stage = stages[name] = workdir = root / name
                variables = {}
                (stage / "home").mkdir(parents=True, exist_ok=True)
            case "WORKDIR":
                workdir = stage / rest.lstrip("/")
                workdir.mkdir(parents=True)
            case "ENV":
                variables |= [rest.split("=", 1)]
            case "COPY":
                *sources, target = rest.split()
                origin = context
                if sources[0].startswith("--from="):
                    origin = stages[sources.pop(0).removeprefix("--from=")]
                for source in sources:
                    shutil.copy(origin / source.lstrip("/"), workdir / target)
            case "RUN":
                mount = re.match(r"--mount=type=secret,id=(\w+),target=(\S+)\s+(.*)", rest)
                if mount:
                    secret, target, rest = mount.groups()
                    rest = rest.replace(target, secrets[secret])
                if "pip install" not in rest:
                    run(rest)
            case "CMD":
                program = " ".join(re.findall(r'"([^"]+)"', rest))
                # The slim image has no compiler.
                said = run(program, CXX="/nonexistent", CC="/nonexistent")
            case _:
                raise AssertionError(f"unknown instruction: {line}")
    return said


@pytest.mark.compile
def test_the_image_starts_warm_only_from_a_bundle_of_a_trusted_key(tmp_path: Path) -> None:
    """
    Signed by the key that the image trusts: warm, without a compiler. By another one: eager.
    """
    context = tmp_path / "context"
    context.mkdir()
    for name, text in files_of(blocks_of(PAGE)).items():
        (context / name).write_text(text)
    for name in ("signing.pem", "foreign.pem"):
        subprocess.run(
            [sys.executable, "-m", "precast", "keys", "generate", name],
            cwd=context,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    signed = run_image(context, tmp_path / "signed", {"signing_key": str(context / "signing.pem")})
    assert signed == "warm []\n"

    # The same image, whose bundle somebody else made of the same artifacts.
    cache = tmp_path / "signed" / "build" / "home" / ".cache"
    foreign = tmp_path / "foreign"
    shutil.copytree(cache, foreign / "build" / "home" / ".cache")
    said = run_image(context, foreign, {"signing_key": str(context / "foreign.pem")})
    assert "untrusted" in said
    assert said.endswith("cold ['not-recorded']\n")
