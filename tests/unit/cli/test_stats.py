"""`precast stats` and `precast explain`, over statistics that real listeners wrote."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from precast import events
from precast.cache.catalog import stored_parts
from precast.errors import Reason
from precast.graph.key import explain_misses
from precast.monitoring.stats import StatsListener
from stored import OTHER_TEXT, TEXT, Stored, assembly_key, piece_key

Run = Callable[..., str]
RunJson = Callable[..., Any]


@pytest.fixture
def listener(stored: Stored) -> StatsListener:
    """Return what a session over the test's cache has."""

    def explain(misses: list[dict[str, Any]]) -> None:
        explain_misses(misses, stored_parts(stored.tier, time.perf_counter))

    return StatsListener(str(stored.root / "v1" / "stats"), explain)


@pytest.fixture
def history(stored: Stored, listener: StatsListener) -> Stored:
    """Return a cache after a warm start and a cold one with another torch."""
    stored.add_piece(torch="2.12.0 aaa")
    stored.add_assembly(torch="2.12.0 aaa")
    listener(events.CacheHit("key-0", "disk", 0.001, 500))
    listener(events.ModelReady("Decoder", 0.02, 3, 1, 3, 0, 1, 30.0, True))
    assembly, piece = assembly_key(torch="2.13.0 bbb"), piece_key(torch="2.13.0 bbb")
    listener(events.AssemblyMissed("Decoder", assembly.digest, assembly.parts, None))
    listener(events.PieceMissed("layer", piece.digest, piece.parts))
    listener(events.PieceCompiled("layer", piece.digest, "aot_inductor", 12.5, 4, 1))
    stored.add_piece(torch="2.13.0 bbb")
    listener(events.ArtifactPublished(piece.digest, "disk", 2048, 0.1))
    listener(
        events.PieceFailed("head", "", "aot_inductor", Reason("compile-timeout", "late", "wait"))
    )
    listener(events.ModelReady("Decoder", 14.0, 3, 1, 3, 0, 0, 0.0, False))
    return stored


def test_stats_are_the_sum_of_all_starts(history: Stored, run: Run, run_json: RunJson) -> None:
    found = run_json("stats")
    assert found["starts"] == {
        "warm": {"count": 1, "seconds": 0.02},
        "cold": {"count": 1, "seconds": 14.0},
    }
    assert found["hits"]["disk"]["count"] == 1
    assert found["misses"] == {"assembly": {"torch": 1}, "piece": {"torch": 1}}
    assert found["published"] == {"disk": {"count": 1, "bytes": 2048}}
    assert found["compiles"] == {"count": 1, "seconds": 12.5, "bytes": 4}
    assert found["seconds_saved"] == 30.0
    assert found["reasons"] == {"compile-timeout": 1}
    text = run("stats")
    for row in (
        "warm starts             1  20 ms each",
        "seconds saved      30.0 s",
        "disk     1  500 B          1  2.0 KiB",
        "assembly  torch",
        "compile-timeout      1",
    ):
        assert row in text


def test_nothing_recorded_is_said(run: Run, run_json: RunJson) -> None:
    assert "Nothing was recorded" in run("stats")
    assert run_json("stats")["starts"]["warm"]["count"] == 0
    assert "No miss was recorded" in run("explain", "--last")


def test_the_last_misses_are_explained(history: Stored, run: Run, run_json: RunJson) -> None:
    misses = run_json("explain", "--last")
    assert [miss["name"] for miss in misses] == ["Decoder", "layer"]
    assert misses[1]["nearest"] == piece_key(torch="2.12.0 aaa").digest
    assert misses[1]["differs"] == ["torch: was '2.12.0 aaa', is '2.13.0 bbb'"]
    assert "torch: was '2.12.0 aaa', is '2.13.0 bbb'" in run("explain", "--last")


def test_a_key_is_explained_against_the_nearest(stored: Stored, run_json: RunJson) -> None:
    old = stored.add_piece(torch="2.12.0 aaa")
    new = stored.add_piece()
    stored.add_piece(OTHER_TEXT)
    found = run_json("explain", new[:10])
    assert (found["nearest"], found["cause"]) == (old, "torch")
    assert found["text"] == []


def test_pieces_of_other_text_are_compared_line_by_line(
    stored: Stored, run: Run, run_json: RunJson
) -> None:
    old, new = stored.add_piece(TEXT), stored.add_piece(OTHER_TEXT)
    found = run_json("explain", new[:10], old[:10])
    assert found["cause"] == "new piece"
    assert "-    v0 = torch.relu(a0)" in found["text"]
    assert "+    v0 = torch.sigmoid(a0)" in run("explain", new, old)


def test_a_model_is_found_by_name(stored: Stored, run: Run, run_json: RunJson) -> None:
    key = stored.add_assembly(model="Encoder")
    other = stored.add_assembly(model="Decoder", cpu="x86_64 AVX2 1111")
    found = run_json("explain", "Encoder")
    assert (found["key"], found["nearest"], found["cause"]) == (key, other, "new model")
    stored.add_assembly(model="Encoder", cpu="x86_64 AVX2 1111")
    assert "2 assemblies are of Encoder" in run("explain", "Encoder", code=2)


@pytest.mark.parametrize("arguments", [(), ("Decoder", "--last")])
def test_explain_wants_a_key_or_last(run: Run, arguments: tuple[str, ...]) -> None:
    assert "give a key, or" in run("explain", *arguments, code=2)


def test_what_cannot_be_compared_is_refused(stored: Stored, run: Run) -> None:
    piece = stored.add_piece()
    assembly = stored.add_assembly(piece)
    assert "nothing to compare" in run("explain", piece, assembly, code=2)
    assert "no key begins with 'Unknown'" in run("explain", "Unknown", code=2)
    stored._storage.publish("silent-key", {}, {})
    assert "does not say" in run("explain", "silent-key", code=2)
