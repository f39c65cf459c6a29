"""The cache under real processes: several at once, killed ones, full and read-only disks.

Each program runs with nothing but `precast.cache`, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from precast.cache import open_cache
from precast.events import Event

SOURCE = Path(__file__).parents[2] / "src"

#: What the programs share. Contents follow from key and version, so that a reader can tell a whole
#: value from a mixture without having written it.
COMMON = f"""
import hashlib, os, random, sys, time
sys.path.insert(0, {str(SOURCE)!r})
from precast.cache import open_cache

events = []
KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(4)]

def contents(key, version):
    seed = hashlib.sha256(f"{{key}} {{version}}".encode()).digest()
    return {{"piece.so": seed * 4000, "kernel.cubin": seed[::-1] * 500}}

def publish(storage, key, version):
    return storage.publish(key, {{"version": version}}, contents(key, version))

def check(loader, key):
    manifest = loader.manifest(key)
    if manifest is None:
        return False
    wanted = contents(key, manifest["version"])
    paths = loader.files(manifest["files"])
    assert paths is not None, "a manifest was found before its blobs"
    for name, path in paths.items():
        with open(path, "rb") as file:
            assert file.read() == wanted[name], path
    return True

def open_here():
    return open_cache(sys.argv[1], disabled=False, emit=events.append, clock=time.monotonic)
"""

WRITER = """
_, storage = open_here()
print("ready", flush=True)
version = 0
while True:
    for key in KEYS:
        version += 1
        publish(storage, key, f"{os.getpid()} {version}")
        assert {type(event).__name__ for event in events} == {"ArtifactPublished"}, events
        events.clear()
    if len(sys.argv) > 2 and version >= int(sys.argv[2]):
        break
"""

READER = """
print("ready", flush=True)
found = 0
while not os.path.exists(sys.argv[2]):
    loader, _ = open_here()
    for key in KEYS:
        found += check(loader, key)
    bad = [e for e in events if type(e).__name__ not in ("CacheHit", "CacheMiss")]
    assert not bad, bad
    events.clear()
print(found, flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program and wait until it is past its imports."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", COMMON + program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def run(program: str, *arguments: object) -> str:
    return finish(start("print('ready', flush=True)\n" + program, *arguments))


@contextmanager
def reading(root: Path, stop: Path) -> Iterator[None]:
    """Have another process read all the while, and check that it found only what was right."""
    reader = start(READER, root, stop)
    try:
        yield
        stop.touch()
        assert int(finish(reader)) > 0
    finally:
        reader.kill()
        reader.wait()


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    """
    Writers of the same keys do not wait for each other, and the reader sees whole values.
    """
    root = tmp_path / "cache"
    with reading(root, tmp_path / "stop"):
        for writer in [start(WRITER, root, 60), start(WRITER, root, 60)]:
            finish(writer)
    assert files_in(root / "v1" / "tmp") == []
    assert files_in(root / "v1" / "quarantine") == []


def test_writers_killed_at_any_moment_leave_whole_values(tmp_path: Path) -> None:
    """
    Thirty writers killed while writing, with a reader running: never a wrong byte, and the next
    writer works.
    """
    root = tmp_path / "cache"
    delays = random.Random(0)
    num_left_behind = 0
    with reading(root, tmp_path / "stop"):
        for _ in range(30):
            writer = start(WRITER, root)
            time.sleep(delays.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
            _, errors = writer.communicate()
            assert writer.returncode == -signal.SIGKILL, errors
        num_left_behind = len(files_in(root / "v1" / "tmp"))
        run("for key in KEYS: publish(open_here()[1], key, 'last')", root)
    assert num_left_behind > 0  # Else no kill came while a file was being written.
    for path in files_in(root / "v1" / "tmp"):
        os.utime(path, (0, 0))  # An hour later
    run("_, storage = open_here(); publish(storage, KEYS[0], 'an hour later')", root)
    assert files_in(root / "v1" / "tmp") == []


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """
    The kernel cuts each file short at 64 KiB: the manifest never appears, nothing half is left,
    and the process itself goes on with what it has.
    """
    root = tmp_path / "cache"
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
loader, storage = open_here()
published = publish(storage, KEYS[0], 1)
[failure] = events
assert type(failure).__name__ == "TierFailed" and failure.reason.code == "tier-failed", failure
assert "File too large" in failure.reason.message, failure
assert loader.manifest(KEYS[0]) == published
assert loader.files(published["files"]) is None  # The private folder is as full.
loader.close()
"""
    run(program, root)
    [left] = files_in(root)  # The smaller of two blobs, which did fit, and is whole.
    assert hashlib.sha256(left.read_bytes()).hexdigest() == left.name
    run("assert not check(open_here()[0], KEYS[0]); publish(open_here()[1], KEYS[0], 2)", root)
    run("assert check(open_here()[0], KEYS[0])", root)


@pytest.fixture
def foreign_root() -> Iterator[Path]:
    """Return a directory that others may enter, which those that pytest makes are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "cache"
    shutil.rmtree(folder)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become another user"
)
def test_a_directory_of_another_user_is_read_and_left_alone(foreign_root: Path) -> None:
    """
    As root no permission binds, so the program becomes nobody before it opens the cache.
    """
    root = foreign_root
    run("publish(open_here()[1], KEYS[0], 1)", root)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = sorted(root.rglob("*"))
    program = """
import tempfile, weakref, shutil  # Loaded later, when this user may not read them.
os.setgid(65534); os.setuid(65534)
loader, storage = open_here()
assert check(loader, KEYS[0])
assert [type(event).__name__ for event in events] == ["CacheHit"], events
events.clear()
published = publish(storage, KEYS[1], 1)
assert [type(event).__name__ for event in events] == ["TierFailed"], events
assert check(loader, KEYS[1])
loader.close()
"""
    run(program, root)
    assert sorted(root.rglob("*")) == before


def test_a_directory_that_may_not_even_be_read(tmp_path: Path) -> None:
    """
    A root below a regular file: nothing is found, nothing is written, nothing raises.
    """
    (tmp_path / "file").write_text("I am no directory")
    program = """
loader, storage = open_here()
assert not check(loader, KEYS[0])
publish(storage, KEYS[0], 1)
assert check(loader, KEYS[0])
loader.close()
"""
    run(program, tmp_path / "file" / "cache")
    assert files_in(tmp_path) == [tmp_path / "file"]


def test_the_directory_may_be_deleted_under_running_processes(tmp_path: Path) -> None:
    """
    People do that. It is a miss, or what is open already; the writers make it again.
    """
    root = tmp_path / "cache"
    events: list[Event] = []
    loader, storage = open_cache(root, disabled=False, emit=events.append, clock=time.monotonic)
    writer = start("print('ready', flush=True)\n_, s = open_here()\n" + _WRITE_FOR_A_WHILE, root)
    while writer.poll() is None:
        with suppress(OSError):
            shutil.rmtree(root)
        time.sleep(0.02)
    finish(writer)
    storage.publish("0123abcd", {}, {"a": b"a", "b": b"b"})
    manifest = loader.manifest("0123abcd")
    assert manifest is not None
    assert loader.files(manifest["files"]) is not None


_WRITE_FOR_A_WHILE = """
end = time.monotonic() + 1
while time.monotonic() < end:
    publish(s, KEYS[0], random.random())
    loader, _ = open_here()
    manifest = loader.manifest(KEYS[0])
    if manifest is not None:
        loader.files(manifest["files"])
    loader.close()
"""
