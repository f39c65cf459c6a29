from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precast.background import limits
from precast.background.limits import gpu_names, lower_priority


def test_workers_are_given_gpus_by_the_names_that_this_process_was_given() -> None:
    assert gpu_names([0, 1], None) == ["0", "1"]
    assert gpu_names([0, 2], "4, 5,GPU-6") == ["4", "GPU-6"]
    assert gpu_names([1], "4,5") == ["5"]
    assert gpu_names([], None) == []


GIVE_WAY = """
import os, sys, time
from pathlib import Path
from precast.background.limits import lower_priority

def nice(pid):
    # Empty for init, and for all that never left its session.
    return int((Path(f"/proc/{pid}/autogroup").read_text().split() or ["0"])[-1])

lower_priority(3)
wanted = int(sys.argv[1])
deadline = time.monotonic() + 20
while nice("self") != nice(os.getppid()) + wanted and time.monotonic() < deadline:
    time.sleep(0.01)
print(nice("self") - nice(os.getppid()))
"""
CAN_LOWER = """
from pathlib import Path
group = Path("/proc/self/autogroup")
try:
    group.write_text("1")
except BlockingIOError:
    pass
except OSError:
    raise SystemExit  # No such groups, or none that may be changed.
print(group.read_text())
"""


def in_a_session(*program: str) -> str:
    """Return what a program prints that leads a session of its own."""
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_worker_gives_way_as_a_session_too() -> None:
    if not in_a_session(sys.executable, "-c", CAN_LOWER):
        pytest.skip("sessions have no share of the machine here, or none that may be changed")

    assert in_a_session(sys.executable, "-c", GIVE_WAY, "3") == "3"
    # The shell leads that session, and what shares it must not slow it down. `true` keeps the
    # shell from becoming the program.
    member = shlex.join([sys.executable, "-c", GIVE_WAY, "0"])
    assert in_a_session("/bin/sh", "-c", f"{member}; true") == "0"
    # Its parent is init, once the shell has ended.
    orphan = shlex.join(["setsid", sys.executable, "-c", GIVE_WAY, "3"])
    assert in_a_session("/bin/sh", "-c", f"{orphan} &") == "3"


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
    monkeypatch.setattr(limits, "_nice_of_session", lambda _pid: 2)
    monkeypatch.setattr(limits, "_SESSION_TRIES", 2)  # None once this test is over.
    monkeypatch.setattr(Path, "write_text", write)

    lower_priority(7)

    deadline = time.monotonic() + 30
    while len(written) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert written == ["9", "9", "9"]
