"""How much memory a process took. Imports nothing of torch or of Precast: it is measured too."""

from __future__ import annotations

from pathlib import Path


def peak_memory_mb() -> float:
    """Return this process's largest resident size so far (not `ru_maxrss`: a child inherits it)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0
