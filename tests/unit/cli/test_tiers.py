"""Commands over a chain of tiers, the shared one a real Redis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servers import RedisServer, free_port
from stored import OTHER_TEXT, Stored

Run = Callable[..., str]
RunJson = Callable[..., Any]


@pytest.fixture
def chain(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Set a chain of the disk and a Redis, and return the entry of the Redis."""
    entry = f"{redis_server.url}?prefix={tmp_path.name}&deadline_ms=5000&connect_ms=5000"
    monkeypatch.setenv("PRECAST_CACHE_URL", f"disk,{entry}")
    return entry


def test_models_are_pushed_to_a_server_and_pulled_from_it(
    chain: str,
    stored: Stored,
    run: Run,
    run_json: RunJson,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cryptography")
    piece = stored.add_piece()
    assembly = stored.add_assembly(piece)
    stored.add_piece(OTHER_TEXT)
    public = run_json("keys", "generate", str(tmp_path / "key.pem"))["text"]
    monkeypatch.setenv("PRECAST_SIGNING_KEY", str(tmp_path / "key.pem"))
    (pushed,) = run_json("cache", "push", "Decoder")
    assert pushed["copied"] == [piece, assembly]
    assert "0 copied" in run("cache", "push", "Decoder", "--to", "redis")
    listed = run_json("cache", "ls", "--tier", "redis")
    assert {entry["key"] for entry in listed["entries"]} == {piece, assembly}
    assert "all sound" in run("cache", "verify", "--tier", "redis")

    monkeypatch.delenv("PRECAST_SIGNING_KEY")
    monkeypatch.setenv("PRECAST_CACHE_DIR", str(tmp_path / "other"))
    assert "which is not a trusted one" in run("cache", "pull", code=1)
    assert run_json("cache", "ls")["entries"] == []
    monkeypatch.setenv("PRECAST_TRUSTED_KEYS", public)
    assert "redis to disk: 2 copied" in run("cache", "pull")
    assert {entry["key"] for entry in run_json("cache", "ls")["entries"]} == {piece, assembly}
    assert "all sound" in run("cache", "verify")

    assert run_json("cache", "rm", piece[:10], "--tier", "redis")["removed"] == [piece]
    assert len(run_json("cache", "ls", "--tier", "redis")["entries"]) == 1
    assert len(run_json("cache", "ls")["entries"]) == 2


def test_unsigned_artifacts_are_pulled_only_where_that_is_allowed_and_stay_marked(
    chain: str, stored: Stored, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = stored.add_piece()
    run("cache", "push")
    monkeypatch.setenv("PRECAST_CACHE_DIR", str(tmp_path / "other"))
    assert "it is not signed" in run("cache", "pull", code=1)
    monkeypatch.setenv("PRECAST_ALLOW_UNSIGNED", "1")
    run("cache", "pull")
    assert Stored(tmp_path / "other").payload(piece)["unsigned"] is True

    monkeypatch.setenv("PRECAST_CACHE_DIR", str(stored.root))
    assert "1 were there" in run("cache", "pull")
    assert "unsigned" not in stored.payload(piece)  # What was made here stays as it is.


def test_a_read_only_tier_is_left_alone(
    chain: str, stored: Stored, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = stored.add_piece()
    run("cache", "push")
    monkeypatch.setenv("PRECAST_CACHE_URL", f"disk,{chain}&readonly=1")
    assert "no tier to push to" in run("cache", "push", code=2)
    assert "read-only" in run("cache", "push", "--to", "redis", code=1)
    assert "read-only" in run("cache", "rm", piece, "--tier", "redis", code=1)
    assert piece[:12] in run("cache", "ls", "--tier", "redis")


def test_a_misspelt_tier_or_no_tier_is_a_usage_error(chain: str, run: Run) -> None:
    assert "did you mean 'redis'?" in run("cache", "ls", "--tier", "reddis", code=2)


def test_without_a_chain_there_is_nowhere_to_push(run: Run) -> None:
    assert "no tier to push to" in run("cache", "push", code=2)
    assert "no tier to pull from" in run("cache", "pull", code=2)


def test_doctor_asks_each_shared_tier(
    chain: str, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {f["check"]: f for f in run_json("doctor", "--quick")["findings"]}
    assert found["tier redis"]["status"] == "ok"
    assert "answers in" in found["tier redis"]["message"]
    monkeypatch.setenv("PRECAST_CACHE_URL", f"disk,redis://127.0.0.1:{free_port()}/0")
    found = {f["check"]: f for f in run_json("doctor", "--quick", code=1)["findings"]}
    assert found["tier redis"]["status"] == "failed"


def test_a_dead_tier_is_a_sentence_and_exit_code_1(
    stored: Stored, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.add_piece()
    monkeypatch.setenv("PRECAST_CACHE_URL", f"disk,redis://127.0.0.1:{free_port()}/0")
    assert "tier 'redis' failed to" in run("cache", "ls", "--tier", "redis", code=1)
    assert "tier 'redis' failed to" in run("cache", "push", code=1)
