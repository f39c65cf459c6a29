"""A bundle starts a model where there is no compiler, in a process that never saw it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from precast.cache import DiskCache
from precast.cache.bundle_format import write_bundle
from precast.cache.manifest import decode_manifest, encode_manifest
from precast.cache.trust import generate_key
from precast.errors import BundleIncompleteError
from precast.events import ArtifactRefused
from system.models import compiled, make_net, make_plain

_START = """
import json, shutil, sys, torch
from system.models import compiled, make_plain, make_net, names
kind, settings = sys.argv[1], json.loads(sys.argv[2])
assert shutil.which("g++") is None and shutil.which("c++") is None
torch.manual_seed(0)
if kind == "plain":
    settings |= dict(compiler="auto", compilation_level="full")
model, events = compiled(make_plain() if kind == "plain" else make_net(), **settings)
x = torch.ones(3, 16) if kind == "plain" else torch.ones(3, 8)
with torch.no_grad():
    compiled_output = model(x)
print(*names(events))
print(json.dumps(compiled_output.tolist()))
print([r["code"] for r in __import__("precast").status(model)["reasons"]])
print([event.tier for event in events if type(event).__name__ == "CacheHit"])
"""

_LOAD = """
import sys
from precast.cache.bundle_reading import load_bundle
from precast.cache import DiskCache
from precast.cache.trust import Trust, load_public_keys
load_bundle(sys.argv[1], DiskCache(sys.argv[2]), trust=Trust(load_public_keys([sys.argv[3]])))
assert "torch" not in sys.modules
"""

Run = Callable[..., str]


def start(run_python: Run, kind: str, **settings: Any) -> list[str]:
    """Start a model in a new process without a compiler, which may not compile either."""
    settings = {"mode": "cache_only", **settings}
    return run_python(_START, kind, json.dumps(settings), PATH="/nowhere").splitlines()


def bundle_of(kind: str, cache: Path, path: Path, **settings: Any) -> list[float]:
    """Bundle what a start from a cache uses; return what the model computes."""
    torch.manual_seed(0)
    if kind == "plain":
        settings |= {"compiler": "auto", "compilation_level": "full"}
    model, _ = compiled(make_plain() if kind == "plain" else make_net(), cache, **settings)
    x = torch.ones(3, 16) if kind == "plain" else torch.ones(3, 8)
    with torch.no_grad():
        output = model(x)
    precast.save_bundle(model, path)
    precast.release(model)
    return output.tolist()  # type: ignore[no-any-return]


@pytest.mark.compile
def test_a_signed_bundle_starts_warm_without_a_compiler(
    real_cache: Path, tmp_path: Path, run_python: Run
) -> None:
    """Read in place, or copied into a cache by a process that does not so much as import torch."""
    text = generate_key(tmp_path / "key")
    bundle = tmp_path / "model.bundle"
    shutil.copytree(real_cache, tmp_path / "copy")
    expected = bundle_of("plain", tmp_path / "copy", bundle, signing_key=tmp_path / "key")
    happened, output, reasons, tiers = start(
        run_python,
        "plain",
        cache_dir=str(tmp_path / "empty"),
        bundle=str(bundle),
        trusted_keys=[text],
    )
    assert "AssemblyLoaded" in happened.split()
    assert "PieceLoaded" in happened.split()
    assert json.loads(output) == expected
    assert reasons == "[]"
    assert tiers == "['bundle model.bundle']"
    run_python(_LOAD, bundle, tmp_path / "loaded", text, PATH="/nowhere")
    happened, output, reasons, _ = start(run_python, "plain", cache_dir=str(tmp_path / "loaded"))
    assert "PieceLoaded" in happened.split()
    assert json.loads(output) == expected


def test_an_unsigned_bundle_is_used_where_the_user_admits_it(
    tmp_path: Path, run_python: Run
) -> None:
    """And only there: elsewhere the model runs eager, right, and with the reason."""
    bundle = tmp_path / "model.bundle"
    expected = bundle_of("net", tmp_path / "cache", bundle)
    common = {"bundle": str(bundle), "cache_dir": str(tmp_path / "other")}
    happened, output, reasons, _ = start(run_python, "net", allow_unsigned=True, **common)
    assert "AssemblyLoaded" in happened.split()
    assert json.loads(output) == expected
    happened, output, reasons, _ = start(run_python, "net", **common)
    assert "ArtifactRefused" in happened.split()
    assert "AssemblyLoaded" not in happened.split()
    torch.testing.assert_close(torch.tensor(json.loads(output)), torch.tensor(expected))
    assert reasons == "['not-recorded']"
    # In this process, to see what is said.
    model, _ = compiled(make_net(), tmp_path / "third", mode="cache_only", bundle=bundle)
    with torch.no_grad():
        model(torch.ones(3, 8))
    status = precast.status(model)
    assert {reason["code"] for reason in status["refused"]} == {"untrusted"}
    assert status["refused"][0]["message"] in status["reasons"][0]["message"]


def test_an_unsigned_assembly_cannot_have_anything_unpickled(tmp_path: Path) -> None:
    """Whatever it says that its pieces are, and though unsigned code is admitted."""
    expected = bundle_of("net", tmp_path / "cache", tmp_path / "b")
    cache = DiskCache(tmp_path / "cache")
    [key] = cache.manifest_keys()
    payload = decode_manifest(key, cache.read_manifest(key) or b"", "here")
    artifact = b"pickles"
    digest = sha256(artifact).hexdigest()
    payload["pieces"] = [
        {
            "key": "0123",
            "compiler": "inductor_standalone",
            "details": {"entry": "artifact.bin"},
            "files": {"artifact.bin": digest},
            "seconds": 1.0,
        }
        for _ in payload["pieces"]
    ]
    forged = tmp_path / "forged.bundle"
    write_bundle(str(forged), {key: encode_manifest(payload)}, [digest], lambda _: artifact)
    torch.manual_seed(0)
    settings = {"bundle": forged, "allow_unsigned": True, "mode": "cache_only"}
    model, events = compiled(make_net(), tmp_path / "empty", **settings)
    with torch.no_grad():
        output = model(torch.ones(3, 8))
    torch.testing.assert_close(output, torch.tensor(expected))
    refused = [event for event in events if isinstance(event, ArtifactRefused)]
    assert ["unpickles" in event.reason.message for event in refused] == [True]


def test_a_model_that_has_served_nothing_has_no_bundle(tmp_path: Path) -> None:
    model, _ = compiled(make_net(), tmp_path / "cache")
    with pytest.raises(BundleIncompleteError, match="served no call"):
        precast.save_bundle(model, tmp_path / "b")
    with pytest.raises(BundleIncompleteError):
        precast.save_bundle(make_net(), tmp_path / "b")


def test_a_key_that_cannot_be_read_stops_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(precast.PrecastError, match="signing_key"):
        precast.compile(make_net(), signing_key=tmp_path / "absent")
    with pytest.raises(precast.PrecastError, match="trusted_keys"):
        precast.compile(make_net(), trusted_keys=("ed25519:nonsense",))


def test_a_key_that_cannot_be_read_is_no_matter_where_precast_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECAST_DISABLE", "1")
    model = make_net()
    assert precast.compile(model, signing_key=tmp_path / "absent") is model
