"""`precast bundle` and `precast keys`, with real files, keys and signatures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stored import OTHER_TEXT, Stored

pytest.importorskip("cryptography")

Run = Callable[..., str]
RunJson = Callable[..., Any]


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    """Return where a bundle is to be."""
    return str(tmp_path / "model.bundle")


def test_a_bundle_goes_from_one_cache_to_another(
    stored: Stored,
    run: Run,
    run_json: RunJson,
    bundle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piece = stored.add_piece()
    assembly = stored.add_assembly(piece)
    stored.add_piece(OTHER_TEXT)
    monkeypatch.setenv("PRECAST_ALLOW_UNSIGNED", "1")
    assert "2 manifests and 1 files" in run("bundle", "create", bundle, "Decoder")
    found = run_json("bundle", "inspect", bundle)
    assert {manifest["key"] for manifest in found["manifests"]} == {piece, assembly}
    assert f"{assembly[:12]}-0" in run("bundle", "inspect", bundle)
    assert run_json("bundle", "verify", bundle)["signed"] == 0
    everything = run_json("bundle", "create", f"{bundle}-2")
    assert everything["manifests"] == 3


def test_a_bundle_for_another_machine_is_refused(
    stored: Stored, run: Run, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = stored.add_piece(cpu="riscv64 none 0000")
    monkeypatch.setenv("PRECAST_ALLOW_UNSIGNED", "1")
    run("bundle", "create", bundle, piece[:8])
    assert "riscv64" in run("bundle", "load", bundle, code=1)


def test_signed_bundles_pass_by_trusted_keys_only(
    stored: Stored,
    run: Run,
    run_json: RunJson,
    bundle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, foreign = str(tmp_path / "key.pem"), str(tmp_path / "foreign.pem")
    public = run_json("keys", "generate", key)["text"]
    assert public in run("keys", "show", f"{key}.pub")
    run("keys", "generate", foreign)
    assert Path(key).stat().st_mode & 0o777 == 0o600
    stored.add_piece()
    monkeypatch.setenv("PRECAST_SIGNING_KEY", key)
    run("bundle", "create", bundle)
    (shown,) = run_json("keys", "show")
    assert shown["signs"]
    assert run_json("bundle", "inspect", bundle)["manifests"][0]["signed_by"] == shown["id"]

    monkeypatch.delenv("PRECAST_SIGNING_KEY")
    monkeypatch.setenv("PRECAST_TRUSTED_KEYS", public)
    assert "1 signed by trusted keys" in run("bundle", "verify", bundle)
    monkeypatch.setenv("PRECAST_TRUSTED_KEYS", f"{foreign}.pub")
    assert "not a trusted one" in run("bundle", "verify", bundle, code=1)


def test_keys_are_never_replaced(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    run("keys", "generate", str(path))
    before = path.read_bytes()
    assert "never replaced" in run("keys", "generate", str(path), code=2)
    assert path.read_bytes() == before


def test_damage_and_missing_things_are_told(stored: Stored, run: Run, bundle: str) -> None:
    stored.add_piece()
    assert "no key begins with 'Unknown'" in run("bundle", "create", bundle, "Unknown", code=2)
    run("bundle", "create", bundle)
    content = bytearray(Path(bundle).read_bytes())
    content[-1] ^= 1
    Path(bundle).write_bytes(content)
    assert "cannot be used" in run("bundle", "verify", bundle, code=1)
    assert "No such file" in run("bundle", "inspect", f"{bundle}-2", code=1)
