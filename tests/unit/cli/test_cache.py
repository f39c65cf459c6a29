from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stored import OTHER_TEXT, TEXT, Stored

Run = Callable[..., str]
RunJson = Callable[..., Any]


def test_ls_lists_models_and_their_pieces(stored: Stored, run: Run, run_json: RunJson) -> None:
    piece = stored.add_piece(code=b"x" * 2048)
    assembly = stored.add_assembly(piece)
    text = run("cache", "ls")
    assert f"{assembly[:12]}-0  assembly  Decoder, 1 pieces" in text
    assert "aot_inductor, for Decoder" in text
    assert "2 entries with 1 files" in text
    found = run_json("cache", "ls")
    assert found["place"] == str(stored.root)
    assert {entry["key"] for entry in found["entries"]} == {piece, assembly}


def test_ls_filters_and_sorts(stored: Stored, run: Run, run_json: RunJson) -> None:
    small = stored.add_piece(code=b"x")
    large = stored.add_piece(OTHER_TEXT, b"x" * 5000)
    stored.add_assembly(small)
    found = run_json("cache", "ls", "--kind", "piece", "--sort", "size")
    assert [entry["key"] for entry in found["entries"]] == [large, small]
    assert "none of kind" in run("cache", "ls", "--sort", "age", code=2)


def test_an_empty_or_missing_cache_is_no_problem(run: Run, run_json: RunJson) -> None:
    assert "Nothing is kept" in run("cache", "ls")
    assert run_json("cache", "ls")["entries"] == []
    assert "0 manifests and 0 files, 0 B: all sound" in run("cache", "verify")


def test_another_folder_can_be_named(tmp_path: Path, run_json: RunJson) -> None:
    Stored(tmp_path / "other").add_piece()
    assert run_json("cache", "ls")["entries"] == []
    found = run_json("cache", "ls", "--cache-dir", str(tmp_path / "other"))
    assert len(found["entries"]) == 1


def test_a_file_is_no_cache(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    text = run("cache", "ls", "--cache-dir", str(tmp_path / "file"), code=2)
    assert "is a file" in " ".join(text.replace("│", " ").split())  # It may be broken anywhere.


def test_a_cache_that_cannot_be_read_is_told_in_a_sentence(stored: Stored, run: Run) -> None:
    """
    A link that leads to itself fails for every user, root as well.
    """
    folder = stored.root / "v1" / "ac"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder)
    text = run("cache", "ls", code=1)
    assert "failed to list manifests: Too many levels of symbolic links" in text
    assert "eager" not in text
    stats = stored.root / "v1" / "stats"
    stats.symlink_to(stats)
    assert "failed to read statistics" in run("stats", code=1)
    assert "failed to read statistics" in run("explain", "--last", code=1)


def test_a_setting_that_is_not_usable_is_a_usage_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECAST_MODE", "fast")
    text = run("cache", "ls", code=2)
    assert "PRECAST_MODE" in text
    assert "cache_only" in text


def test_keys_are_taken_by_their_first_characters(
    stored: Stored, run: Run, run_json: RunJson
) -> None:
    piece = stored.add_piece()
    assert run_json("cache", "show", piece[:6])["key"] == piece
    assert "begins 2 keys" not in run("cache", "show", piece[:6])
    stored._storage.publish(f"{piece[:6]}-other", {}, {})
    ambiguous = run("cache", "show", piece[:6], code=2)
    assert "begins 2 keys" in ambiguous
    assert piece[:12] in ambiguous


def test_a_misspelt_key_or_command_gets_a_suggestion(stored: Stored, run: Run) -> None:
    piece = stored.add_piece()
    wrong = f"{piece[:7]}{'0' if piece[7] != '0' else '1'}"
    assert f"did you mean '{piece[:8]}'?" in " ".join(run("cache", "show", wrong, code=2).split())
    assert "Did you mean 'cache'" in run("cahce", "ls", code=2)


def test_show_tells_all_but_the_code(stored: Stored, run: Run, run_json: RunJson) -> None:
    piece = stored.add_piece(code=b"12345")
    assembly = stored.add_assembly(piece)
    text = run("cache", "show", piece)
    assert "torch: 2.13.0 cf30153" in text
    assert "5 bytes" in text
    assert "max_abs_error: 0.0" in text
    shown = run_json("cache", "show", assembly)
    assert shown["model"] == "Decoder"
    assert shown["conditions"] == ["x has 2 dimensions"]
    assert shown["pieces"] == [f"{piece}  aot_inductor"]
    assert run("cache", "show", piece, "--text") == TEXT
    assert "pieces[0](x)" in run("cache", "show", assembly, "--text")


def test_show_of_a_damaged_entry_says_so(stored: Stored, run: Run) -> None:
    piece = stored.add_piece()
    stored.manifest(piece).write_bytes(b"nonsense")
    assert "cannot be used: expected a line" in run("cache", "show", piece, code=1)


def test_rm_forgets_entries_and_leaves_shared_files(
    stored: Stored, run: Run, run_json: RunJson
) -> None:
    first, second = stored.add_piece(), stored.add_piece(OTHER_TEXT)
    blob = stored.blob(first)
    assert "would remove" in run("cache", "rm", first[:8], "--dry-run")
    assert len(run_json("cache", "ls")["entries"]) == 2
    assert run_json("cache", "rm", first[:8], first)["removed"] == [first]
    assert [entry["key"] for entry in run_json("cache", "ls")["entries"]] == [second]
    assert blob.exists()


def test_rm_removes_nothing_where_one_key_is_wrong(
    stored: Stored, run: Run, run_json: RunJson
) -> None:
    piece = stored.add_piece()
    run("cache", "rm", piece, "nonsense", code=2)
    assert len(run_json("cache", "ls")["entries"]) == 1


def test_prune_removes_what_is_old_with_its_files(
    stored: Stored, run: Run, run_json: RunJson
) -> None:
    old, new = stored.add_piece(code=b"old"), stored.add_piece(OTHER_TEXT, b"new")
    blob = stored.blob(old)
    two_days_ago = time.time() - 2 * 86400
    for path in (stored.manifest(old), blob):
        os.utime(path, (two_days_ago, two_days_ago))
    assert f"would remove {old}" in run("cache", "prune", "--max-age", "1d", "--dry-run")
    assert "0 entries" in run("cache", "prune", "--max-age", "3d")
    (tier,) = run_json("cache", "prune", "--max-age", "24h")["tiers"]
    assert (tier["num_manifests"], tier["num_blobs"], tier["keys"]) == (1, 1, [old])
    assert not blob.exists()
    assert [entry["key"] for entry in run_json("cache", "ls")["entries"]] == [new]


def test_prune_goes_by_size(stored: Stored, run_json: RunJson) -> None:
    keys = [stored.add_piece(code=bytes(5000), torch=f"2.{n}") for n in range(3)]
    stored.add_piece(OTHER_TEXT, bytes([1]) * 5000)
    for age, key in enumerate(keys, 2):
        at = time.time() - age * 86400
        os.utime(stored.manifest(key), (at, at))
    (tier,) = run_json("cache", "prune", "--max-size", "12KiB")["tiers"]
    assert tier["keys"] == [keys[2]]
    assert tier["num_bytes_after"] <= 12 * 1024


@pytest.mark.parametrize("amount", ["ten", "-5GiB", "5 parsecs", "1e999"])
def test_an_amount_has_to_be_one(run: Run, amount: str) -> None:
    assert "is no amount" in run("cache", "prune", f"--max-size={amount}", code=2)


def test_verify_finds_damage_and_sets_it_aside_when_told(
    stored: Stored, run: Run, run_json: RunJson
) -> None:
    piece = stored.add_piece()
    other = stored.add_piece(OTHER_TEXT, b"other")
    assert "2 manifests and 2 files, 9 B: all sound" in run("cache", "verify")
    stored.blob(piece).write_bytes(b"C0DE")
    assert "has digest" in run("cache", "verify", code=1)
    assert stored.blob(piece).read_bytes() == b"C0DE"
    assert run_json("cache", "verify", other[:8])["problems"] == []
    found = run_json("cache", "verify", piece[:8], "--set-aside", code=1)
    assert found["is_set_aside"]
    assert run_json("cache", "verify", code=1)["problems"][0]["problem"] == "missing"
