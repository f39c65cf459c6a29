"""What compiled code depends on, as far as this machine tells it without importing torch.

`graph/key.py` adds what only torch knows. Parts have the names that keys give them.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import Any

#: Stands for a word of a part that is not known.
UNKNOWN = "?"


def parts_without_torch(device: str) -> dict[str, Any]:
    """Return the parts of a toolchain that are known here; what torch alone knows is left out.

    Args:
        device: The type of device that the code is for.
    """
    import platform

    parts: dict[str, Any] = {"cpu": f"{platform.machine()} {UNKNOWN} {cpu_flags()}"}
    versions = _torch_versions()
    if "__version__" in versions:
        parts["torch"] = f"{versions['__version__']} {versions.get('git_version')}"
        if device != "cpu":
            parts["runtime"] = f"cuda {versions.get('cuda')} hip {versions.get('hip')}"
    return parts


def python_identity() -> str:
    """Return which Python's bytecode runs here."""
    return f"{sys.implementation.cache_tag} {sys.version_info[:3]}"


def machine_identity() -> str:
    """Return what processes of one running machine have in common, and no other machine has."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:  # noqa: PTH123
            return file.read(64).decode().strip()
    except OSError:
        import platform

        return platform.node()


def cpu_flags() -> str:
    """Return a digest of the CPU's feature flags; empty where they are not to be had."""
    from hashlib import sha256

    try:
        with open("/proc/cpuinfo", "rb") as file:  # noqa: PTH123 - no need of pathlib's import.
            # The first processor's entry; the file is made while it is read, page by page.
            text = file.read(8192)
    except OSError:
        return ""
    for line in text.splitlines():
        if line.startswith((b"flags", b"Features")):
            flags = b" ".join(sorted(line.partition(b":")[2].split()))
            return sha256(flags).hexdigest()[:16]
    return ""


def _torch_versions() -> dict[str, Any]:
    """Return the names that `torch/version.py` sets, read instead of run; empty without torch."""
    import ast
    import os
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    path = os.path.join(os.path.dirname(spec.origin), "version.py")  # noqa: PTH118, PTH120
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            tree = ast.parse(file.read())
    except (OSError, ValueError, SyntaxError):
        return {}
    found = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                found[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value)):
                found[name] = value
    return found
