"""`precast warm`, `check` and `bench` as people run them: real processes, and a cache of theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servers import RedisServer

ROOT = Path(__file__).parents[2]

Precast = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trial-cache")


@pytest.fixture
def precast(shared_cache: Path) -> Precast:
    """Return what runs the program and expects its exit code; pieces are text, not compiled."""

    def run(
        *arguments: object, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "precast", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT / "tests",  # From where `system.trial_models` can be imported.
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "src"),
                "PRECAST_CACHE_DIR": str(shared_cache),
                "PRECAST_COMPILER": "eager",
                "OMP_NUM_THREADS": "1",  # Threads of several processes would wait for each other.
                **environment,
            },
        )
        assert done.returncode == code, (done.stdout, done.stderr[-3000:])
        return done

    return run


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_a_second_warm_finds_all_and_says_so(precast: Precast, tmp_path: Path) -> None:
    """
    What the factory prints is not among the answers, and a model started with the same call is
    warm: the command made the calls of a service.
    """
    command = ("warm", "system.trial_models:make", "--shapes", "1..8x8", "--cache-dir", tmp_path)
    first = answer(precast(*command, "--json"))
    assert [row["call"] for row in first["calls"]] == [f"float32[{n}, 8]" for n in (8, 2, 1)]
    assert [row["num_kinds"] for row in first["calls"]] == [1, 0, 0]
    assert (first["is_warm"], first["reasons"]) == (False, [])

    second = precast(*command)
    assert "the factory prints" in second.stderr
    assert "the factory prints" not in second.stdout
    assert "Warm already: 3 calls, 1 kind of call" in second.stdout
    assert str(tmp_path) in second.stdout
    served = precast("stats", "--json", "--cache-dir", tmp_path)
    assert answer(served)["starts"]["warm"]["count"] == 1


def test_a_call_that_stays_eager_is_a_failure_and_told(precast: Precast) -> None:
    done = precast("warm", "system.trial_models:make_branching", "--shapes", "2x8", code=1)
    assert "capture-failed, Branching at" in done.stdout
    assert "trial_models.py" in done.stdout
    assert "What to do: Rewrite that line" in done.stdout


def test_what_could_not_be_kept_is_a_failure_and_told(precast: Precast, tmp_path: Path) -> None:
    """
    A build step that fills no cache must not pass; the model itself ran.
    """
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"  # Cannot be made.
    command = ("warm", "system.trial_models:make", "--shapes", "2x8", "--allow-eager")
    done = precast(*command, "--cache-dir", folder, code=1)
    assert f"1 of 1 kind of call not kept in {folder}" in done.stdout
    assert "tier-failed: tier 'disk' failed to " in done.stdout
    assert "What to do: Check that the tier" in done.stdout
    assert "It lies in" not in done.stdout


def test_what_is_warmed_is_pushed_and_bundled(
    precast: Precast, redis_server: RedisServer, tmp_path: Path
) -> None:
    """
    Another machine, with an empty disk, starts warm from the server; a bundle holds the same.
    """
    url = f"disk,{redis_server.url}/0?prefix=trial"
    settings = {"PRECAST_CACHE_URL": url, "PRECAST_ALLOW_UNSIGNED": "1"}
    command = ("warm", "system.trial_models:make_pair", "--shapes", "x=4x8", "--json")
    here, there, bundle = tmp_path / "here", tmp_path / "there", tmp_path / "pair.bundle"
    page = tmp_path / "page.html"
    done = precast(
        *(*command, "--push", "--bundle", bundle, "--report", page),
        PRECAST_CACHE_DIR=str(here),
        **settings,
    )
    found = answer(done)
    (pushed,) = found["pushed"]
    assert pushed["problems"] == []
    assert len(pushed["copied"]) + len(pushed["present"]) >= len(found["keys"]) == 1
    assert found["bundle"]["path"] == str(bundle)
    assert found["report"] == str(page)
    assert page.read_text().startswith("<!doctype html>")

    elsewhere = answer(precast(*command, PRECAST_CACHE_DIR=str(there), **settings))
    assert elsewhere["is_warm"]
    listed = answer(precast("bundle", "inspect", bundle, "--json"))
    assert found["keys"][0] in [manifest["key"] for manifest in listed["manifests"]]


def test_a_push_needs_a_shared_tier_before_anything_is_done(precast: Precast) -> None:
    done = precast("warm", "system.trial_models:make", "--shapes", "2x8", "--push", code=2)
    assert "no shared tier to push to" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("option", "file", "said"),
    [
        ("--report", "page.pdf", "has to end in .html or .json"),
        ("--report", ".", "is a folder"),
        ("--bundle", "nowhere/model.bundle", "there is no folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_done(
    precast: Precast, tmp_path: Path, option: str, file: str, said: str
) -> None:
    command = ("warm", "system.trial_models:make", "--shapes", "2x8", option, tmp_path / file)
    done = precast(*command, code=2, COLUMNS="400")
    assert said in done.stderr
    assert "the factory prints" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("system.trial_modles:make",), 2, "Did you mean 'system.trial_models'?"),
        (("system.trial_models:fail",), 1, "ValueError: no weights here. Mend it."),
        (("system.trial_models:make", "--shapes", "4xx8"), 2, "'' is no size"),
        (("system.trial_models:make", "--shapes", "2x9"), 1, "the call (float32[2, 9]) failed at "),
        (("system.trial_models:make_dying",), 1, "ended with signal 9"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_a_sentence_and_an_exit_code(
    precast: Precast, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = precast("check", *arguments, code=code)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert said in done.stderr


def test_check_names_each_graph_break_with_its_line(precast: Precast) -> None:
    found = answer(
        precast("check", "system.trial_models:make_branching", "--shapes", "2x8", "--json", code=1)
    )
    source = (ROOT / "tests/system/trial_models.py").read_text().splitlines()
    branches = [(number, text) for number, text in enumerate(source, 1) if "if x." in text]
    assert [
        (int(each["location"].rpartition(":")[2]), each["line"]) for each in found["graph_breaks"]
    ] == [(number, text.strip()) for number, text in branches]
    assert found["num_different"] == 0
    assert "but has 2 graph breaks" in found["verdict"]


@pytest.mark.compile
def test_what_a_compiler_made_is_found_and_checked(
    precast: Precast, real_cache: Path, tmp_path: Path
) -> None:
    settings = {
        "PRECAST_CACHE_DIR": str(shutil.copytree(real_cache, tmp_path / "copy")),
        "OMP_NUM_THREADS": "2",  # Code for one thread is other code.
        "PRECAST_COMPILER": "auto",
        "PRECAST_COMPILATION_LEVEL": "full",
    }
    command = ("system.models:make_plain", "--shapes", "1..20x16", "--json")
    assert answer(precast("warm", *command, **settings))["is_warm"]
    found = answer(precast("check", *command, **settings))
    assert "and runs compiled (1 piece)." in found["verdict"]
    assert 0 < found["max_rel_error"] < 2e-5


def test_bench_startup_is_warm_from_the_second_process_on(precast: Precast) -> None:
    command = ("bench", "startup", "system.trial_models:make", "--shapes", "2x8")
    found = answer(precast(*command, "--repeats", "1", "--json"))
    assert sorted(found["ways"]) == ["eager", "precast cold", "precast warm"]
    assert [run["is_warm"] for run in found["ways"]["precast cold"]["runs"]] == [False]
    assert found["is_warm"]
    assert found["ways"]["precast warm"]["against_eager"] > 0
    assert found["reasons"] == []


def test_bench_call_compares_with_eager_call_by_call(precast: Precast) -> None:
    command = ("bench", "call", "system.trial_models:make", "--shapes", "2x8", "--seconds", "0.05")
    found = answer(precast(*command, "--repeats", "1", "--json"))
    (row,) = found["calls"]
    assert sorted(row["ways"]) == ["eager", "precast"]
    assert row["ways"]["eager"]["against_eager"] == 1.0


@pytest.mark.parametrize("command", [["warm"], ["check"], ["bench", "call"], ["bench", "startup"]])
def test_each_command_helps_and_has_json(precast: Precast, command: list[str]) -> None:
    printed = precast(*command, "--help", COLUMNS="200", NO_COLOR="1").stdout
    assert "--json" in printed
    assert "--shapes" in printed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(precast: Precast, shell: str) -> None:
    printed = precast("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_PRECAST_COMPLETE" in printed.stdout


def test_completion_is_installed_and_knows_the_commands(precast: Precast, tmp_path: Path) -> None:
    settings = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    precast("--install-completion", "bash", **settings)
    assert "precast" in (tmp_path / ".bashrc").read_text()
    found = precast(
        _PRECAST_COMPLETE="complete_bash", COMP_WORDS="precast ch", COMP_CWORD="1", **settings
    )
    assert found.stdout.split() == ["check"]
