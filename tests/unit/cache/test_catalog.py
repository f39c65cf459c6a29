"""Listing, checking and copying what lies in a tier."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from precast.cache.catalog import (
    copy_entries,
    find_damage,
    list_entries,
    stored_parts,
    with_named,
)
from precast.cache.failures import failure_key
from precast.cache.names import COLLECTION_KEY
from stored import OTHER_TEXT, Stored


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Return a cache that is still empty."""
    return Stored(tmp_path / "cache")


def test_entries_say_what_they_are_and_who_uses_them(stored: Stored) -> None:
    piece = stored.add_piece(code=b"12345")
    assembly = stored.add_assembly(piece)
    for key in (failure_key(piece), COLLECTION_KEY):  # Notes about this cache, and no artifacts.
        stored._storage.publish(key, {}, {})
    entries = {entry["key"]: entry for entry in list_entries(stored.tier)}
    assert entries.keys() == {piece, assembly}
    found = entries[piece]
    assert (found["kind"], found["compiler"], found["device"]) == ("piece", "aot_inductor", "cpu")
    assert (found["torch"], found["seconds"], found["file_bytes"]) == ("2.13.0", 12.5, 5)
    assert found["used_by"] == ["Decoder"]
    assert entries[assembly]["model"] == "Decoder"
    assert entries[assembly]["num_pieces"] == 1


def test_a_damaged_or_foreign_manifest_is_listed_and_stops_nothing(stored: Stored) -> None:
    piece = stored.add_piece()
    damaged = stored.add_piece(OTHER_TEXT)
    stored.manifest(damaged).write_bytes(b"precast-manifest 1 nonsense")
    stored._storage.publish("foreign-key", {"parts": "none", "pieces": 3}, {})
    entries = {entry["key"]: entry for entry in list_entries(stored.tier)}
    assert entries.keys() == {piece, damaged, "foreign-key"}
    assert "expected" in entries[damaged]["problem"]
    assert entries["foreign-key"]["problem"] is None
    assert entries["foreign-key"]["kind"] == "unknown"
    assert {key for key, _ in stored_parts(stored.tier, time.perf_counter)} == {piece}


def test_stored_parts_end_with_their_budget(stored: Stored) -> None:
    for number in range(5):
        stored.add_piece(torch=f"2.{number}")
    seconds = iter(range(100))
    found = list(stored_parts(stored.tier, lambda: float(next(seconds)), budget_s=2.0))
    assert len(found) == 2


def test_sound_entries_have_no_problems(stored: Stored) -> None:
    key = stored.add_assembly(stored.add_piece(), stored.add_piece(OTHER_TEXT, b"other"))
    found = find_damage(stored.tier, stored.tier.manifest_keys())
    assert found["problems"] == []
    assert (found["num_manifests"], found["num_blobs"], found["num_bytes"]) == (3, 2, 9)
    assert len(with_named(stored.tier, [key])) == 3


@pytest.mark.parametrize("should_set_aside", [False, True])
def test_each_kind_of_damage_is_found(stored: Stored, should_set_aside: bool) -> None:
    flipped = stored.add_piece(code=b"flipped")
    missing = stored.add_piece(OTHER_TEXT, b"missing")
    manifest = stored.add_piece(torch="2.12.0", code=b"manifest")
    assembly = stored.add_assembly(missing)
    stored.blob(flipped).write_bytes(b"flopped")
    stored.blob(missing).unlink()
    content = bytearray(stored.manifest(manifest).read_bytes())
    content[-10] ^= 1
    stored.manifest(manifest).write_bytes(content)

    keys = sorted(stored.tier.manifest_keys())
    found = find_damage(stored.tier, keys, should_set_aside=should_set_aside)
    assert {(p["key"], p["file"]) for p in found["problems"]} == {
        (flipped, "model.so"),
        (missing, "model.so"),
        (assembly, "model.so"),
        (manifest, None),
    }
    again = find_damage(stored.tier, keys)
    left = {(p["key"], p["problem"].partition(" ")[0]) for p in again["problems"]}
    if should_set_aside:
        # Nothing damaged is left; what needs it will be compiled again.
        assert left == {(flipped, "missing"), (missing, "missing"), (assembly, "missing")}
        assert len(list((stored.root / "v1" / "quarantine").glob("*.reason"))) == 2
    else:
        assert again["problems"] == found["problems"]


def test_copies_are_whole_and_made_once(stored: Stored, tmp_path: Path) -> None:
    target = Stored(tmp_path / "target")
    key = stored.add_assembly(stored.add_piece())
    keys = with_named(stored.tier, [key])
    assert keys[-1] == key  # What it names first, so that no reader finds it alone.
    done = copy_entries(stored.tier, target.tier, keys)
    assert (done["copied"], done["present"], done["problems"]) == (keys, [], [])
    for name in keys:
        assert target.manifest(name).read_bytes() == stored.manifest(name).read_bytes()
    assert find_damage(target.tier, keys)["problems"] == []
    again = copy_entries(stored.tier, target.tier, keys)
    assert (again["copied"], again["present"], again["num_bytes"]) == ([], keys, 0)


def test_damage_is_not_copied(stored: Stored, tmp_path: Path) -> None:
    target = Stored(tmp_path / "target")
    damaged = stored.add_piece(code=b"flipped")
    sound = stored.add_piece(OTHER_TEXT)
    stored.blob(damaged).write_bytes(b"flopped")
    done = copy_entries(stored.tier, target.tier, [damaged, sound, "nowhere"])
    assert done["copied"] == [sound]
    assert [problem["key"] for problem in done["problems"]] == [damaged, "nowhere"]
    assert list(target.tier.manifest_keys()) == [sound]
