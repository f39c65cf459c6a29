# ruff: noqa: PTH123
# PTH: `pathlib` costs a warm start a millisecond to import.
"""What the process and the GPUs take, read when asked: /proc, and NVML by the extra `gpu`.

What a machine does not tell is None, or left out. Nothing here runs by itself.
"""

from __future__ import annotations

import os
import sys
import threading

from precast.monitoring.recorder import resident_bytes  # There, since every start asks for it.

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import Any


def process_figures() -> dict[str, Any]:
    """Return what this process took so far.

    `network_*_bytes` are those of all interfaces but the loopback that the process sees: of its
    machine or container, since Linux counts no network traffic by process.
    """
    times = os.times()
    io = _fields("/proc/self/io")
    status = _fields("/proc/self/status")
    received, sent = _network_bytes()
    return {
        "cpu_seconds": times.user + times.system,
        "children_cpu_seconds": times.children_user + times.children_system,
        "resident_bytes": resident_bytes(),
        "peak_resident_bytes": _kilobytes(status.get("VmHWM")),
        "disk_read_bytes": _number(io.get("read_bytes")),
        "disk_written_bytes": _number(io.get("write_bytes")),
        "network_received_bytes": received,
        "network_sent_bytes": sent,
    }


def started_at(pid: int) -> int | None:
    """Return when a process began, by the kernel's clock; None: it is gone, or a zombie.

    With its id this names a process for good: ids are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def device_bytes() -> int | None:
    """Return what torch has allocated on the current GPU; None where this process uses none."""
    torch = used_gpu_torch()
    return None if torch is None else int(torch.cuda.memory_allocated())


def peak_device_bytes() -> int | None:
    """Return the most that torch had allocated on the current GPU."""
    torch = used_gpu_torch()
    return None if torch is None else int(torch.cuda.max_memory_allocated())


def used_gpu_torch() -> Any:
    """Return torch where this process has imported it and uses a GPU; else None."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return torch if cuda is not None and cuda.is_initialized() else None


class Gpus:
    """Asks NVML for utilisation and memory; opened at the first question.

    Needs `nvidia-ml-py` (`pip install 'precast[gpu]'`) and a driver: without either there are none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._is_missing = False
        self._pid = 0

    def figures(self) -> list[dict[str, Any]]:
        """Return `index`, `utilization` (0 to 1), used and total memory of each GPU of the machine.

        All that NVML shows, whatever `CUDA_VISIBLE_DEVICES` hides from torch.
        """
        with self._lock:
            nvml = self._open()
            if nvml is None:
                return []
            found = []
            try:
                for index in range(nvml.nvmlDeviceGetCount()):
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                    found.append(
                        {
                            "index": index,
                            "utilization": _utilization(nvml, handle),
                            "memory_used_bytes": int(memory.used),
                            "memory_total_bytes": int(memory.total),
                        }
                    )
            except nvml.NVMLError:
                self._nvml = None  # A driver that was reloaded, say: opened anew next time.
            return found

    def _open(self) -> Any:
        if self._is_missing:
            return None
        if self._nvml is None or self._pid != os.getpid():  # NVML does not outlive a fork.
            try:
                import pynvml
            except ImportError:
                self._is_missing = True
                return None
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError:
                self._is_missing = True
                return None
            self._nvml, self._pid = pynvml, os.getpid()
        return self._nvml


def _utilization(nvml: Any, handle: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:  # Not told of parts of a GPU (MIG).
        return None


def stored_bytes(folder: str) -> int | None:
    """Return the bytes of all files in a folder and below, each once whatever names it has.

    None where there is no such folder.
    """
    sizes: dict[int, int] = {}
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        sizes[entry.inode()] = _size(entry)
        except OSError:
            if not os.path.isdir(folder):  # noqa: PTH112 - see above.
                return None
    return sum(sizes.values())


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0  # Removed a moment ago.


def _fields(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return dict(_split(line) for line in file)
    except OSError:
        return {}


def _split(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name, value.strip()


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _kilobytes(text: str | None) -> int | None:
    number = None if text is None else _number(text.partition(" ")[0])
    return None if number is None else number * 1024


def _network_bytes() -> tuple[int | None, int | None]:
    interfaces = {name.strip(): value for name, value in _fields("/proc/self/net/dev").items()}
    rows = [
        value.split()
        for name, value in interfaces.items()
        if name != "lo" and len(value.split()) == 16
    ]
    if not interfaces:
        return None, None
    return sum(int(row[0]) for row in rows), sum(int(row[8]) for row in rows)
