"""Temporary folders go with their process, and those of killed ones with the next collection."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from precast.cache.collect import prune
from precast.cache.scratch import OwnFolder, ScratchCache, sweep_dead_folders
from precast.testing import BLOB, DIGEST

SOURCE = Path(__file__).parents[3] / "src"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a place for temporary files of this test's own."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def make_old(place: Path) -> None:
    for path in place.iterdir():
        os.utime(path, (0, time.time() - 3600), follow_symlinks=False)


def test_a_folder_goes_at_the_end_of_its_use(temporary: Path) -> None:
    with OwnFolder("compile") as folder:
        (Path(folder.path) / "file").write_text("x")
        assert Path(folder.path).parent == temporary
        assert Path(folder.path).name.startswith(f"precast-{os.getpid()}-compile-")
        assert Path(folder.path).stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []
    kept = OwnFolder("kept")
    kept.make()
    assert len(list(temporary.iterdir())) == 1
    del kept
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_folders_in_use_are_not_swept(temporary: Path) -> None:
    scratch = ScratchCache()
    scratch.write_blob(DIGEST, BLOB)
    with OwnFolder("compile"):
        make_old(temporary)
        assert sweep_dead_folders() == 0
        assert len(list(temporary.iterdir())) == 2
    scratch.close()


PROGRAM = f"""
import os, signal, sys, tempfile, time
sys.path.insert(0, {str(SOURCE)!r})
from hashlib import sha256
from precast.cache.scratch import OwnFolder, ScratchCache
tempfile.tempdir = sys.argv[1]
if sys.argv[2] == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
scratch = ScratchCache()
scratch.write_blob(sha256(b"x").hexdigest(), b"x")
folders = [OwnFolder("kept"), OwnFolder("compile")]
for folder in folders:
    folder.make()
print("ready", flush=True)
if sys.argv[2] != "exit":
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "number"), [("exit", 0), ("polite", signal.SIGTERM), ("rude", signal.SIGKILL)]
)
def test_ends_of_a_process(temporary: Path, how: str, number: int) -> None:
    """
    It cleans up where it can: at exit, and on a signal that it handles. After SIGKILL, and only
    then, others do.
    """
    with subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM, str(temporary), how],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if number:
            assert len(list(temporary.iterdir())) == 3
            make_old(temporary)
            assert sweep_dead_folders() == 0, "it is alive"
            process.send_signal(number)
        process.wait(30)
    assert len(list(temporary.iterdir())) == (3 if how == "rude" else 0)
    prune([], emit=lambda _: None, max_bytes=None, max_age_s=None)
    assert list(temporary.iterdir()) == []


def test_strangers_are_left_alone(temporary: Path, tmp_path: Path) -> None:
    """
    Young ones, other names (a cache of user 1000 among the temporary files), files and links.
    """
    for name in ("precast-1000", "precast-x-compile-1", "other-1-compile-1"):
        (temporary / name).mkdir()
    (temporary / "precast-1-compile-file").write_text("x")
    (tmp_path / "precious").mkdir()
    (temporary / "precast-1-compile-link").symlink_to(tmp_path / "precious")
    make_old(temporary)
    (temporary / "precast-1-compile-young").mkdir()
    before = set(temporary.iterdir())
    assert sweep_dead_folders() == 0
    assert set(temporary.iterdir()) == before
    assert (tmp_path / "precious").is_dir()
    assert sweep_dead_folders(str(tmp_path / "absent")) == 0
