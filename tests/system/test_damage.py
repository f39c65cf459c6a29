"""A broken cache: right output each time, the bad file set aside, the next start warm."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.events import (
    ArtifactPublished,
    ArtifactQuarantined,
    AssemblyRejected,
    Event,
    TierFailed,
)
from precast.testing import every_fault
from system.models import Filed, assert_same, compiled, eager, make_net, make_plain, names

INPUTS = torch.linspace(-2, 2, 24).reshape(3, 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = (truncate, empty, flip_a_bit, replace_by_folder, append)


@pytest.fixture(scope="module")
def filed_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with one assembly and its pieces, all as files."""
    folder = tmp_path_factory.mktemp("filed")
    events = start(folder, "filed")
    assert "PieceCompiled" in names(events), events
    return folder


@pytest.fixture
def cache(filed_cache: Path, tmp_path: Path) -> Path:
    """Return a copy of it for one test."""
    return Path(shutil.copytree(filed_cache, tmp_path / "cache"))


def start_small(folder: Path) -> list[Event]:
    """Start a model that is captured in no time; the same otherwise."""
    model, events = compiled(make_plain(), folder, on_error="eager")
    x = torch.ones(3, 16)
    with torch.no_grad():
        assert_same(model(x), eager(model, x))
    return events


def start(folder: Path, compiler: str = "eager", **settings: Any) -> list[Event]:
    """Start a model anew, compare it with eager, and return what happened."""
    chosen: Any = Filed() if compiler == "filed" else compiler
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRECAST_WORKER_WARM", "0")  # Nothing here needs Inductor.
        model, events = compiled(
            make_net(),
            folder,
            compiler=chosen,
            compile_threads=1,
            on_error="eager",
            compilation_level="full",
            **settings,
        )
        with torch.no_grad():
            assert_same(model(INPUTS), eager(model, INPUTS))
            assert_same(model(INPUTS[:2]), eager(model, INPUTS[:2]))
    return events


def manifests(folder: Path, kind: str) -> list[Path]:
    found = [p for p in (folder / "v1" / "ac").rglob("*.json") if f'"{kind}"' in p.read_text()]
    assert found
    return found


def blobs(folder: Path) -> list[Path]:
    found = [p for p in (folder / "v1" / "cas").rglob("*") if p.is_file()]
    assert found
    return found


def is_warm(events: list[Event]) -> bool:
    return "AssemblyLoaded" in names(events) and "CaptureFinished" not in names(events)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_assembly(damage: Callable[[Path], None], cache: Path) -> None:
    """It is set aside and made again; its pieces are found, nothing is compiled."""
    [path] = manifests(cache, "assembly")
    damage(path)
    events = start(cache, "filed")
    [aside] = [event for event in events if isinstance(event, ArtifactQuarantined)]
    assert Path(aside.path).exists()
    assert aside.reason.code == "artifact-corrupt"
    assert aside.reason.message
    assert "PieceLoaded" in names(events)
    assert "PieceCompiled" not in names(events)
    assert is_warm(start(cache, "filed"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blob(damage: Callable[[Path], None], cache: Path) -> None:
    """It is never opened. Where nothing may be compiled the model runs eager, and says so."""
    for path in blobs(cache):
        damage(path)
    events = start(cache, "filed", mode="cache_only")
    aside = [event for event in events if isinstance(event, ArtifactQuarantined)]
    assert aside[0].reason.code == "artifact-corrupt"
    assert Path(aside[0].path).exists()
    assert any(isinstance(event, AssemblyRejected) for event in events)
    assert "FellBack" in names(events)
    assert "PieceCompiled" not in names(events)


def test_a_damaged_blob_is_compiled_again(cache: Path) -> None:
    """And the next start is warm."""
    for path in blobs(cache):
        flip_a_bit(path)
    events = start(cache, "filed")
    assert any(isinstance(event, ArtifactQuarantined) for event in events)
    assert any(isinstance(event, AssemblyRejected) for event in events)
    assert "PieceCompiled" in names(events)
    assert is_warm(start(cache, "filed"))


def test_a_missing_blob(cache: Path) -> None:
    """The assembly is refused with a reason, the piece compiled again."""
    for path in blobs(cache):
        path.unlink()
    events = start(cache, "filed")
    assert any(isinstance(event, AssemblyRejected) for event in events)
    assert "PieceCompiled" in names(events)
    assert is_warm(start(cache, "filed"))


def test_all_is_damaged(cache: Path) -> None:
    """Every file there is."""
    for path in [path for path in cache.rglob("*") if path.is_file()]:
        truncate(path)
    events = start(cache, "filed")
    assert "ArtifactQuarantined" in names(events)
    assert is_warm(start(cache, "filed"))


def test_an_assembly_of_a_damaged_code(cache: Path) -> None:
    """Sound bytes that hold no sense: refused with a reason, and replaced."""
    from precast.cache.manifest import complete_payload, decode_manifest, encode_manifest

    [path] = manifests(cache, "assembly")
    whole = decode_manifest(path.stem, path.read_bytes(), "test")
    for name in ("call_check", "contract", "entry", "execution", "pieces"):
        for value in ({}, None, "text", [[9, "no such piece"]]):
            start_over = cache.parent / f"{name}-{value!s:.4}".replace("[", "-")
            shutil.copytree(cache, start_over, dirs_exist_ok=True)
            payload = complete_payload(path.stem, {**_own(whole), name: value}, {})
            (start_over / path.relative_to(cache)).write_bytes(encode_manifest(payload))
            events = start(start_over, "filed")
            assert any(isinstance(event, AssemblyRejected) for event in events), (name, value)
            assert "PieceCompiled" not in names(events)


def _own(manifest: dict[str, Any]) -> dict[str, Any]:
    from precast.cache.manifest import complete_payload

    added = complete_payload("abcd", {}, {})
    return {name: value for name, value in manifest.items() if name not in added}


# ---------------------------------------------------------------------------
# Disks that cannot be written


def test_a_disk_that_is_full_at_any_moment(tmp_path: Path) -> None:
    """From one write on, all fail: the output is right, and once there is space starts are warm."""
    for fault in every_fault(
        error_number=errno.ENOSPC, operations=("write", "fsync", "mkdir", "replace"), lasting=True
    ):
        folder = tmp_path / str(fault.n)
        with fault:
            events = start_small(folder)
        is_warm_again = is_warm(start_small(folder))
        if fault.operation is not None:
            failures = [event for event in events if isinstance(event, TierFailed)]
            # Statistics come last, after all that matters: that they are not there is not told.
            assert failures or is_warm_again
            assert all("No space left" in event.reason.message for event in failures[:1])
        assert is_warm_again or is_warm(start_small(folder))


_FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
import torch
from system.models import compiled, make_plain, names, assert_same, eager
def start(folder):
    model, events = compiled(make_plain(), folder, on_error='eager')
    with torch.no_grad():
        assert_same(model(torch.ones(3, 16)), eager(model, torch.ones(3, 16)))
    return events
first = start(Path(sys.argv[1]))
assert "AssemblyLoaded" not in names(first) and "TierFailed" in names(first), first
second = start(Path(sys.argv[1]))
assert "AssemblyLoaded" not in names(second), second
"""


def test_a_disk_that_the_kernel_calls_full(tmp_path: Path, run_python: Any) -> None:
    """No file longer than 1 KiB can be written, in a process of its own."""
    run_python(_FULL, tmp_path / "cache", PYTHONDONTWRITEBYTECODE="1")
    assert not list((tmp_path / "cache").rglob("*.json"))
    start_small(tmp_path / "cache")
    assert is_warm(start_small(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("where", "compiler"),
    [
        ("below a file", "eager"),
        ("below a file", "filed"),  # A worker takes seconds to start: one such place will do.
        ("a file", "eager"),
        ("/proc/precast", "eager"),
        ("/dev/null/cache", "eager"),
    ],
)
def test_an_impossible_directory(where: str, compiler: str, tmp_path: Path) -> None:
    """What cannot be kept on disk is kept in memory, as long as the process lives."""
    (tmp_path / "file").touch()
    folder = {"below a file": tmp_path / "file" / "cache", "a file": tmp_path / "file"}.get(
        where, Path(where)
    )
    events = start(folder, compiler)
    assert any(isinstance(event, TierFailed) for event in events)
    assert all(event.reason.message for event in events if isinstance(event, TierFailed))
    assert (tmp_path / "file").read_bytes() == b""


def test_a_directory_that_may_only_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is used, what is new is not kept, and nothing is changed."""
    before = sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*"))
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(cache)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert is_warm(start(cache, "filed"))
    events = start(cache, "eager")
    assert "CaptureFinished" in names(events)
    assert "TierFailed" in names(events)
    assert sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*")) == before


@pytest.mark.parametrize("folder", ["cache", "/proc/precast"])
def test_a_disabled_cache_reads_and_writes_nothing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the cache's folder, not even a look whether it exists."""
    path = tmp_path / folder
    start(path, cache_max_bytes=None, cache_max_age=None)  # Nothing collects it later on.
    touched = []
    for operation in ("open", "stat", "mkdir", "listdir", "replace", "unlink", "link"):
        real = getattr(os, operation)

        def watched(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if args and str(args[0]).startswith(str(path)):
                touched.append(args)
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, operation, watched)
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        events = start(path, disable_compile_cache=True)
        assert not is_warm(events)
        assert "CaptureFinished" in names(events)
        # What this process compiles lies in a private folder that goes with it.
        assert {e.tier for e in events if isinstance(e, ArtifactPublished)} <= {"scratch"}
    assert touched == []
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------
# Real artifacts: opening a damaged library would end the process


@pytest.mark.compile
@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_a_damaged_library_is_never_opened(
    damage: Callable[[Path], None], real_cache: Path, tmp_path: Path
) -> None:
    """The digest is compared first; the model runs eager where nothing may be compiled."""
    folder = Path(shutil.copytree(real_cache, tmp_path / "copy"))
    for path in blobs(folder):
        damage(path)
    model, events = compiled(
        make_plain(), folder, compiler="auto", compilation_level="full", mode="cache_only"
    )
    x = torch.ones(3, 16)
    with torch.no_grad():
        assert_same(model(x), eager(model, x))
    assert "PieceLoaded" not in names(events)
    assert "ArtifactQuarantined" in names(events)
    assert "AssemblyRejected" in names(events)
