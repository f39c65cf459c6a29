"""What `precast doctor` looks at: whether this machine can compile, keep and load.

Each check yields findings as plain data. What imports torch, runs a compiler or opens what it made
happens in child processes: that is where it may crash.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precast.cache import DiskCache
from precast.errors import StoreError

if TYPE_CHECKING:
    from precast.cache.interface import CacheInterface

#: The versions of torch whose internals `torch_private.py` knows: from, and up to without it.
TORCH_RANGE = ((2, 11), (2, 14))

#: Optional packages, and the extra that brings them.
OPTIONAL = {
    "cryptography": "trust",
    "redis": "redis",
    "rich": "cli",
    "s3fs": "s3",
    "typer": "cli",
}

_LOW_SPACE_BYTES = 1 << 30
_MOST_SKEW_S = 5.0
_CHILD_TIMEOUT_S = 120.0

# What compiled pieces need of a C++ compiler: threads, and a standard library shared with torch's.
# A library of its own, linked statically, crashes in regular expressions once torch is loaded.
_PROBE_SOURCE = r"""
#include <omp.h>
#include <regex>
#include <sstream>
#include <string>
extern "C" int precast_probe(int number) {
  std::ostringstream digits;
  digits << number;
  return std::regex_match(digits.str(), std::regex("[0-9]+")) && omp_get_max_threads() > 0
      ? number : -1;
}
"""
_PROBE_TORCH = r"""
import ctypes, json, sys
import torch
found = {
    "version": torch.__version__,
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "cuda": torch.version.cuda or torch.version.hip,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}
print("torch " + json.dumps(found), flush=True)
if len(sys.argv) > 1:
    print("probe", ctypes.CDLL(sys.argv[1]).precast_probe(42), flush=True)
"""

Finding = dict[str, Any]


def finding(check: str, status: str, message: str, remedy: str = "") -> Finding:
    """Return one result: `status` is `ok`, `note` (nothing is wrong), `warning` or `failed`."""
    return {"check": check, "status": status, "message": message, "remedy": remedy}


def check_python() -> Iterable[Finding]:
    """Look at the interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    yield finding("python", "ok", f"{sys.implementation.name} {found}, {sys.executable}")


def check_torch_version() -> Iterable[Finding]:
    """Look at torch's version, without importing it."""
    low, high = TORCH_RANGE
    wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    try:
        found = version("torch")
    except PackageNotFoundError:
        yield finding("torch", "failed", "it is not installed", f"pip install 'torch{wanted}'")
        return
    if low <= _release(found) < high:
        yield finding("torch", "ok", found)
    else:
        yield finding("torch", "failed", f"{found} is not {wanted}", f"pip install 'torch{wanted}'")


def _release(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: `2.13.0+cpu` is (2, 13)."""
    numbers = [int(part) for part in text.partition("+")[0].split(".")[:2] if part.isdecimal()]
    return tuple(numbers)


def check_compiler(run_child: Callable[..., subprocess.CompletedProcess[str]]) -> Iterable[Finding]:
    """Compile a small library, and open it beside torch; say what torch is on the way."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    with tempfile.TemporaryDirectory(prefix="precast-doctor-") as folder:
        library = _compile_probe(command, folder, run_child)
        if isinstance(library, str):
            yield finding("C++ compiler", "ok", f"{' '.join(command)}: {_first_line(command)}")
        else:
            yield library
        path = [library] if isinstance(library, str) else []
        yield from _open_probe(command, path, run_child)


def _compile_probe(
    command: list[str], folder: str, run_child: Callable[..., subprocess.CompletedProcess[str]]
) -> str | Finding:
    source, library = Path(folder) / "probe.cpp", str(Path(folder) / "probe.so")
    source.write_text(_PROBE_SOURCE)
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp")
    remedy = "Install g++, or name another compiler in the variable CXX"
    try:
        done = run_child([*command, *flags, str(source), "-o", library])
    except FileNotFoundError:
        return finding("C++ compiler", "failed", f"{command[0]!r} is not there", remedy)
    except subprocess.TimeoutExpired:
        return finding("C++ compiler", "failed", f"{command[0]!r} did not end", remedy)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[0]
        return finding("C++ compiler", "failed", f"{' '.join(command)} said: {said}", remedy)
    return library


def _first_line(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown version"])[0]


def _open_probe(
    command: list[str],
    library: list[str],
    run_child: Callable[..., subprocess.CompletedProcess[str]],
) -> Iterable[Finding]:
    """Import torch in a child process, then open the library there and call it."""
    try:
        done = run_child([sys.executable, "-c", _PROBE_TORCH, *library])
    except subprocess.TimeoutExpired:
        yield finding("torch import", "failed", "it did not end", "Run `python -c 'import torch'`")
        return
    lines = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    if "torch" not in lines:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield finding("torch import", "failed", said, "Install torch anew")
        return
    found = json.loads(lines["torch"])
    yield finding("torch import", "ok", f"CPU code for {found['cpu']}")
    yield from _gpu_findings(found)
    if not library:
        return
    is_static = b"libstdc++.so" not in Path(library[0]).read_bytes() and b"libc++.so" not in (
        Path(library[0]).read_bytes()
    )
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    remedy = "Use a compiler that links the system's C++ library, such as CXX=/usr/bin/g++"
    cause = " It links the C++ library statically." if is_static else ""
    if lines.get("probe") != "42":
        message = f"what {command[0]} makes crashes beside torch ({how}).{cause}"
        yield finding("compiled code", "failed", message, remedy)
    elif is_static:
        message = f"{command[0]} links the C++ library statically, which crashes beside torch's"
        yield finding("compiled code", "failed", message, remedy)
    else:
        yield finding("compiled code", "ok", "a library loads and runs beside torch")


def _gpu_findings(found: dict[str, Any]) -> Iterable[Finding]:
    if found["devices"]:
        names = ", ".join(found["devices"])
        yield finding("GPU", "ok", f"{names} (torch built with {found['cuda']})")
    elif Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        why = "cannot use it" if found["cuda"] else "is built for CPUs"
        yield finding("GPU", "warning", f"there is one, but torch {why}", "Install a torch for it")
    else:
        yield finding("GPU", "note", "none; models run on the CPU")


def check_folder(path: Path) -> Iterable[Finding]:
    """Look at the disk tier's folder: whose it is, whether it can be used, the space left."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    where = str(path) if place == path else f"{path} (not made yet)"
    if not place.is_dir():
        yield finding("cache folder", "failed", f"{place} is no folder", "Set `cache_dir`")
        return
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        message = f"{place} may not be read and written by this user"
        yield finding("cache folder", "failed", message, "Change its rights, or set `cache_dir`")
        return
    try:
        # Rights are not all: a full disk, or a file system where nothing can be made.
        with tempfile.TemporaryDirectory(prefix="precast-doctor-", dir=place):
            pass
    except OSError as error:
        message = f"nothing can be made in {place}: {error.strerror}"
        yield finding("cache folder", "failed", message, "Set `cache_dir` to another folder")
        return
    try:
        DiskCache(path).read_manifest("doctor")  # Refuses what others could have written to.
    except StoreError as error:
        yield finding("cache folder", "failed", error.problem, error.remedy)
    else:
        yield finding("cache folder", "ok", where)
    system = os.statvfs(place)
    if system.f_flag & os.ST_NOEXEC:
        message = f"{place} is mounted so that no code in it may run (noexec)"
        yield finding("cache folder", "failed", message, "Set `cache_dir` to another file system")
    free = system.f_bavail * system.f_frsize
    status = "ok" if free >= _LOW_SPACE_BYTES else "warning"
    remedy = "" if status == "ok" else "Make room, or set `cache_dir` elsewhere"
    yield finding("space", status, f"{free / 2**30:.1f} GiB free", remedy)


def check_clock(path: Path, now: Callable[[], float] = time.time) -> Iterable[Finding]:
    """Compare this machine's clock with that of the file system that holds the cache."""
    place = path
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            before_s = now()
            file.write(b".")
            file.flush()
            skew_s = os.fstat(file.fileno()).st_mtime - before_s
    except OSError:
        return  # `check_folder` has said so.
    yield skew_finding("disk", skew_s)


def skew_finding(tier: str, skew_s: float) -> Finding:
    """Return whether a tier's clock and this machine's agree."""
    if abs(skew_s) < _MOST_SKEW_S:
        return finding("clock", "ok", f"agrees with tier {tier!r}")
    message = f"tier {tier!r} is {skew_s:+.0f} s from this machine's clock"
    remedy = "Nothing breaks, but ages are judged by the tier's; set the clocks (NTP)"
    return finding("clock", "warning", message, remedy)


def check_tiers(
    tiers: Iterable[CacheInterface], clock: Callable[[], float] = time.perf_counter
) -> Iterable[Finding]:
    """Ask each shared tier for something twice: first with making contact, then without."""
    for tier in tiers:
        if not tier.is_shared:
            continue
        try:
            seconds = []
            for _ in range(2):
                started_s = clock()
                tier.read_manifest("doctor")
                seconds.append(clock() - started_s)
        except StoreError as error:
            yield finding(f"tier {tier.name}", "failed", error.problem, error.remedy)
            continue
        how = "" if tier.is_writable else ", read-only"
        message = f"answers in {seconds[1] * 1e3:.1f} ms (first {seconds[0] * 1e3:.0f} ms){how}"
        yield finding(f"tier {tier.name}", "ok", message)


def check_packages() -> Iterable[Finding]:
    """List the optional packages."""
    for package, extra in OPTIONAL.items():
        try:
            yield finding("package", "ok", f"{package} {version(package)}")
        except PackageNotFoundError:
            yield finding("package", "note", f"{package} is not installed (extra {extra!r})")


def run_child(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return what it said.

    Raises:
        FileNotFoundError: There is no such program.
        subprocess.TimeoutExpired: It did not end.
    """
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=_CHILD_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )


def examine(
    cache_dir: Path, tiers: Iterable[CacheInterface], *, is_quick: bool
) -> Iterable[Finding]:
    """Yield the findings of all checks, as they come.

    Args:
        cache_dir: The disk tier's folder.
        tiers: All tiers; of these the shared ones are asked whether they answer.
        is_quick: Leave out what takes seconds: the compiler, and importing torch.
    """
    yield from check_python()
    yield from check_torch_version()
    if not is_quick:
        yield from check_compiler(run_child)
    yield from check_folder(cache_dir)
    yield from check_clock(cache_dir)
    yield from check_tiers(tiers)
    yield from check_packages()
