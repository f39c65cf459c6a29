"""`precast report`: from a recording, or the newest of a folder, to a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from precast.cli.app import app
from recordings import recording


def run(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "start.json"
    path.write_text(json.dumps(recording()))
    return path


def test_the_page_lies_beside_the_recording(path: Path) -> None:
    code, output = run(path)
    assert code == 0
    assert output.startswith("5 of 6 pieces of Decoder run compiled")
    page = path.with_suffix(".html")
    assert f"{page}: " in output
    assert page.read_text().startswith("<!doctype html>")


def test_the_page_lies_where_it_is_asked_for(path: Path, tmp_path: Path) -> None:
    code, _ = run(path, "-o", tmp_path / "page.html")
    assert code == 0
    assert (tmp_path / "page.html").exists()
    assert not path.with_suffix(".html").exists()


def test_json_writes_no_page_unless_asked(path: Path, tmp_path: Path) -> None:
    code, output = run(path, "--json")
    assert code == 0
    found = json.loads(output)
    assert found["compiled"] == 5
    assert found["page"] is None
    assert not path.with_suffix(".html").exists()
    found = json.loads(run(path, "--json", "-o", tmp_path / "p.html")[1])
    assert found["page"] == str(tmp_path / "p.html")


def test_of_a_folder_the_newest_recording_is_taken(path: Path, tmp_path: Path) -> None:
    newer = tmp_path / "a.json"
    newer.write_text(json.dumps(recording(name="Newer")))
    os.utime(path, (1, 1))
    code, output = run(tmp_path)
    assert code == 0
    assert "of Newer run" in output


def test_without_an_argument_the_setting_says_where(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0] == 2
    monkeypatch.setenv("PRECAST_RECORD", str(tmp_path))
    code, output = run()
    assert code == 0
    assert str(path.with_suffix(".html")) in output


def test_open_shows_it_in_the_browser(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert run(path, "--open", "--json")[0] == 0
    assert opened == [path.with_suffix(".html").as_uri()]


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_what_is_no_recording_is_a_sentence_and_exit_code_1(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    code, output = run(path)
    assert code == 1
    assert "Error: recording" in output
    assert "save_report" in output


def test_a_page_that_cannot_be_written_is_exit_code_1(path: Path, tmp_path: Path) -> None:
    code, output = run(path, "-o", tmp_path / "none" / "page.html")
    assert code == 1
    assert "cannot be written: No such file" in output


def test_it_imports_no_torch(path: Path) -> None:
    program = (
        "import sys; from precast.cli import main\n"
        f"sys.argv = ['precast', 'report', {str(path)!r}]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
