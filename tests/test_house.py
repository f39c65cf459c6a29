"""Rules of the house that a machine can keep: names, errors, the code map, imports, plug-ins."""

from __future__ import annotations

import importlib
import pickle
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import precast
from precast import errors, plugins
from precast.compilers.verify import VerifyMismatchError
from precast.errors import REASON_CODES, PrecastError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "precast"

PUBLIC_NAMES = [
    "CompilationConfig",
    "CompilationCounter",
    "InductorPass",
    "MetricsCollector",
    "PerformanceMonitor",
    "PrecastError",
    "SplitAtLayers",
    "SplitAtOps",
    "SplitByCompute",
    "SplitByMemory",
    "compile",
    "pattern_pass",
    "release",
    "save_bundle",
    "save_report",
    "status",
    "wait",
]

#: One of each error; a new class without an entry fails below.
ERRORS: list[PrecastError] = [
    errors.ConfigError("mode", "fast", "one of 'blocking'", "Leave it out"),
    errors.ModelError("there is no module 'app'", "Did you mean 'apps'?", is_usage=True),
    errors.CaptureError("Decoder", "a graph break", "model.py:12"),
    errors.TracedCodeRaisedError("Net", "it raised KeyError('f')", "model.py:12"),
    errors.CaptureCrashedError("Decoder", "the child ended with exit code -9"),
    errors.CaptureAbortedError("Decoder", "OSError: Too many open files"),
    errors.CompileUnavailableError("layer", "worker", "OSError: Too many open files"),
    errors.SplitError("SplitAtOps", "linear_3", "no such op"),
    errors.PassError("fuse_norms", "add_2", "dangling node"),
    errors.CompileError("layer", "inductor", "no lowering for foo"),
    errors.CompileTimeoutError("layer", "inductor", 600.0),
    errors.CompileMemoryError("layer", "inductor", 2**30, 2**31),
    errors.CompileCrashedError("layer", "inductor", signal=11, stderr="Segmentation fault"),
    errors.ArtifactError("cas/ab", "it is empty"),
    errors.ArtifactCorruptError("cas/ab", "digest 1", "digest 2"),
    errors.ArtifactIncompatibleError("cas/ab", "avx512", "avx2"),
    errors.ArtifactUnopenedError("aot_inductor", "OSError: no rights"),
    VerifyMismatchError("layer", "inductor", "output 0 is off by 1"),
    errors.BundleError("a.bundle", "it is cut off"),
    errors.BundleIncompatibleError("a.bundle", "it is for sm_90"),
    errors.BundleIncompleteError("a.bundle", "no tier has 0123"),
    errors.BundleUntrustedError("a.bundle", "it is not signed"),
    errors.UnsafeStoreError("disk", "read blob", "it belongs to user 7", "chown it"),
    errors.RecordingError("start.json", "it is no recording"),
    errors.RecordingUnwritableError("start.json", "No such file or directory"),
    errors.StoreError("disk", "write", "No space left on device"),
    errors.TierSkippedError("redis", "read manifest"),
]


def test_the_public_names_are_the_listed_ones_and_load() -> None:
    assert sorted(precast.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(precast, name) is not None
        assert name in dir(precast)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = precast.nonsense


def test_the_version_is_the_projects() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert precast.__version__ == declared[1]


def test_every_error_is_listed_above() -> None:
    def subclasses(kind: type[PrecastError]) -> set[type[PrecastError]]:
        return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))

    ours = {kind for kind in subclasses(PrecastError) if kind.__module__.startswith("precast.")}
    assert {type(error) for error in ERRORS} == ours - {PrecastError}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_pickles_and_says_what_to_do(error: PrecastError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert error.code in REASON_CODES
    assert error.outcome in str(error)
    assert error.remedy in str(error)
    assert pickle.loads(pickle.dumps(error.reason)) == error.reason


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in SOURCE.rglob("__init__.py")),
    ids=lambda path: path.name,
)
def test_the_code_map_lists_every_folder(folder: Path) -> None:
    if folder != SOURCE:
        name = folder.relative_to(SOURCE).as_posix()
        assert f"`{name}/`" in (ROOT / "ARCHITECTURE.md").read_text()


def test_the_code_map_lists_every_module_of_the_top_folder() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    modules = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in text] == []


def test_every_folder_is_a_package() -> None:
    """
    A folder without `__init__.py` would be a namespace that linters and wheels overlook.
    """
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("precast", ["torch", "typing", "dataclasses", "precast.config"]),
        ("precast.config, precast.events", ["torch", "typing", "dataclasses", "pathlib"]),
        ("precast.plugins, precast.monitoring.counter, precast.monitoring.log", ["torch"]),
        ("precast.monitoring.performance, precast.monitoring.metrics", ["torch", "pynvml"]),
        ("precast.monitoring.prometheus", ["torch", "prometheus_client"]),
        ("precast.monitoring.opentelemetry", ["torch", "opentelemetry"]),
        ("precast.monitoring.progress", ["torch", "rich"]),
        ("precast.cache", ["torch", "cryptography", "precast.cache.bundle_format"]),
        ("precast.cache.bundle", ["torch", "cryptography", "precast.cache.bundle_writing"]),
        ("precast.cache.bundle_reading, precast.cache.bundle_writing", ["torch", "cryptography"]),
        ("precast.cache.trust", ["torch", "cryptography"]),
    ],
)
def test_imports_stay_light(module: str, absent: list[str]) -> None:
    """
    A warm start is counted in milliseconds. Isolated and without `site`, since what an environment
    imports at start-up (editable installs, coverage) would be counted too.
    """
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import {module}; "
        f"print([name for name in {absent!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in plugins.BUILT_IN.items() for name in names]
)
def test_every_built_in_name_loads(kind: plugins.Kind, name: str) -> None:
    assert callable(plugins.load_plugin(kind, name))


def test_the_door_of_torch_compile_is_declared() -> None:
    found = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "precast"]
    if not found:
        pytest.skip("precast is not installed, so that it has no entry points")
    assert callable(found[0].load())


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.name)
def test_every_module_says_what_it_is(path: Path) -> None:
    name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    assert importlib.import_module(name.removesuffix(".__init__")).__doc__
