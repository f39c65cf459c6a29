"""Figures of the process are its own, and grow with what it does."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from precast.monitoring.system import Gpus, process_figures, started_at, stored_bytes

linux = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")


@linux
def test_what_the_process_does_shows(tmp_path: Path) -> None:
    before = process_figures()
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    # Pages of its own: an allocator may give memory that the process held already.
    held = mmap.mmap(-1, 1 << 26)
    held.write(b"x" * (1 << 26))
    with (tmp_path / "file").open("wb") as file:
        file.write(held[: 1 << 24])
        file.flush()
        os.fsync(file.fileno())
    after = process_figures()
    assert after["cpu_seconds"] - before["cpu_seconds"] >= 0.05
    held.close()
    assert after["resident_bytes"] - before["resident_bytes"] >= 1 << 25
    assert after["peak_resident_bytes"] >= after["resident_bytes"] // 2
    assert after["disk_written_bytes"] >= before["disk_written_bytes"]
    assert after["network_received_bytes"] >= before["network_received_bytes"] >= 0


@linux
def test_a_process_is_known_by_when_it_began() -> None:
    assert started_at(os.getpid()) == started_at(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert started_at(child.pid) >= started_at(os.getpid())
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    assert started_at(child.pid) is None


class Nvml(types.ModuleType):
    """What `nvidia-ml-py` has, of a machine with two GPUs, one of them cut in parts."""

    class NVMLError(Exception):
        pass

    class Figures:
        gpu, used, total = 37, 3 << 30, 80 << 30

    num_inits = 0
    is_lost = False

    def nvmlInit(self) -> None:
        self.num_inits += 1

    def nvmlDeviceGetCount(self) -> int:
        if self.is_lost:
            raise self.NVMLError
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Figures:
        return self.Figures()

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Figures:
        if handle == 1:
            raise self.NVMLError
        return self.Figures()


def test_gpus_are_asked_for_what_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpus = Gpus()
    assert nvml.num_inits == 0
    memory = {"memory_used_bytes": 3 << 30, "memory_total_bytes": 80 << 30}
    assert gpus.figures() == [
        {"index": 0, "utilization": 0.37, **memory},
        {"index": 1, "utilization": None, **memory},
    ]
    nvml.is_lost = True
    assert gpus.figures() == []
    nvml.is_lost = False
    assert len(gpus.figures()) == 2
    assert nvml.num_inits == 2, "opened anew after the driver was lost"


def test_without_the_package_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus().figures() == []


def test_a_folder_is_as_large_as_its_files_each_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "blob").write_bytes(b"x" * 1000)
    (tmp_path / "deep" / "name").hardlink_to(tmp_path / "deep" / "blob")
    (tmp_path / "manifest").write_bytes(b"x" * 10)
    assert stored_bytes(str(tmp_path)) == 1010
    assert stored_bytes(str(tmp_path / "none")) is None
