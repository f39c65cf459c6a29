from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from precast.background.limits import gpu_names, lower_priority


def test_workers_are_given_gpus_by_the_names_that_this_process_was_given() -> None:
    assert gpu_names([0, 1], None) == ["0", "1"]
    assert gpu_names([0, 2], "4, 5,GPU-6") == ["4", "GPU-6"]
    assert gpu_names([1], "4,5") == ["5"]
    assert gpu_names([], None) == []


GIVE_WAY = """
import sys
from pathlib import Path
from precast.background.limits import lower_priority

lower_priority(3)
print(Path("/proc/self/autogroup").read_text().split()[-1])
"""


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="sessions have no share of the machine here"
)
def test_only_the_first_of_a_session_lowers_the_share_of_all() -> None:
    """
    Else a worker that shared its parent's would slow the server down.
    """

    def nice_of_session(program: list[str]) -> str:
        return subprocess.run(
            program, capture_output=True, text=True, check=True, start_new_session=True
        ).stdout.strip()

    program = [sys.executable, "-c", GIVE_WAY]
    # The shell leads the session of the second; `true` keeps it from becoming the program.
    member = ["/bin/sh", "-c", f"{shlex.join(program)}; true"]

    assert nice_of_session(program) == str(os.nice(0) + 3)
    assert nice_of_session(member) == "0"


def test_a_share_that_may_not_be_changed_yet_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Linux lets users but root change ten a second, all of them together.
    """
    written: list[str] = []

    def write(_path: Path, text: str) -> None:
        written.append(text)
        if len(written) < 3:
            raise BlockingIOError

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "nice", lambda increment: increment)
    monkeypatch.setattr(os, "getsid", lambda _pid: os.getpid())
    monkeypatch.setattr(Path, "write_text", write)

    lower_priority(7)

    assert written == ["7", "7", "7"]
