from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest

from precast.graph.key import (
    HashComputer,
    Key,
    cause_of_miss,
    explain_misses,
    find_nearest,
    toolchain_parts,
)

IDENTITY = {"compiler": "eager", "adaptor": "1"}


@pytest.fixture(scope="module")
def hasher() -> HashComputer:
    return HashComputer("cpu")


def test_equal_parts_are_one_key(hasher: HashComputer) -> None:
    assert hasher.piece_key("text", IDENTITY).digest == hasher.piece_key("text", IDENTITY).digest
    assert Key({"a": 1, "b": 2}).digest == Key({"b": 2, "a": 1}).digest


def test_each_part_counts(hasher: HashComputer) -> None:
    """Another text, compiler, pass or order of passes is another key; so is another kind."""
    base = hasher.piece_key("text", IDENTITY)
    others = [
        hasher.piece_key("text ", IDENTITY),
        hasher.piece_key("text", {**IDENTITY, "adaptor": "2"}),
        hasher.piece_key("text", IDENTITY, {"a": "1", "b": "1"}),
        hasher.piece_key("text", IDENTITY, {"b": "1", "a": "1"}),
        hasher.assembly_key("model", "call", {}),
        hasher.assembly_key("model", "other call", {}),
        hasher.assembly_key("model", "call", {"split": "layers"}),
    ]

    assert len({key.digest for key in (base, *others)}) == len(others) + 1


def test_a_full_digest_names_it(hasher: HashComputer) -> None:
    assert len(hasher.piece_key("text", IDENTITY).digest) == 64


def test_explain_names_the_parts_that_differ(hasher: HashComputer) -> None:
    """One sentence a part, none for equal ones; a part that is missing is said to be absent."""
    old = hasher.piece_key("text", IDENTITY).parts
    new = {**old, "torch": "9.9"}
    del new["cpu"]

    assert HashComputer.explain(old, old) == []
    said = HashComputer.explain(old, new)
    assert [line.partition(":")[0] for line in said] == ["cpu", "torch"]
    assert "is 'absent'" in said[0]
    assert "is '9.9'" in said[1]


def test_explain_takes_nested_parts_apart(hasher: HashComputer) -> None:
    old = hasher.piece_key("text", IDENTITY).parts
    new = hasher.piece_key("text", {**IDENTITY, "adaptor": "2"}).parts
    assert HashComputer.explain(old, new) == ["compiler.adaptor: was '1', is '2'"]


def test_the_nearest_key_is_of_the_same_text_or_model_before_all_else(
    hasher: HashComputer,
) -> None:
    parts = hasher.piece_key("text", IDENTITY).parts
    same_text = {**parts, "torch": "9.9", "cpu": "other", "threads": "one"}
    other_text = {**parts, "text": "other"}
    assembly = hasher.assembly_key("model", "call", {}).parts
    stored = [("assembly", assembly), ("other", other_text), ("same", same_text)]
    assert find_nearest(parts, stored) == ("same", same_text)
    assert find_nearest(parts, stored[:2]) == ("other", other_text)
    assert find_nearest(parts, stored[:1]) is None
    assert cause_of_miss(parts, same_text) == "cpu, threads, torch"
    assert cause_of_miss(parts, other_text) == "new piece"
    assert cause_of_miss(assembly, {**assembly, "model": "m"}) == "new model"
    assert cause_of_miss(assembly, {**assembly, "call": "c"}) == "new kind of call"
    assert cause_of_miss(parts, None) == "nothing stored"


def test_what_a_start_itself_published_explains_no_miss(hasher: HashComputer) -> None:
    """
    Misses are explained after the start: its own pieces and its assembly are stored by then.
    """
    old = hasher.piece_key("text", IDENTITY)
    new = Key({**old.parts, "torch": "9.9"})
    sibling = Key({**new.parts, "text": "other"})
    assembly = hasher.assembly_key("model", "call", {})
    misses: list[dict[str, Any]] = [
        {"key": key.digest, "parts": key.parts, "problem": None} for key in (new, sibling, assembly)
    ]
    misses.append({"key": "k", "parts": assembly.parts, "problem": "size 1 of x is 8, not 9"})
    stored = [(key.digest, key.parts) for key in (new, sibling, old)]
    explain_misses(misses, [*stored, (f"{assembly.digest}-0", assembly.parts)])
    assert [miss["cause"] for miss in misses] == [
        "torch",
        "new piece",
        "nothing stored",
        "outside contract",
    ]
    assert misses[0]["nearest"] == old.digest
    assert misses[0]["differs"] == [f"torch: was {old.parts['torch']!r}, is '9.9'"]
    assert misses[3]["differs"] == ["size 1 of x is 8, not 9"]


def test_hosts_paths_and_processes_never_enter(
    hasher: HashComputer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key made elsewhere, by another process, on a machine of the same kind is the same key."""
    before = hasher.piece_key("text", IDENTITY)
    text = json.dumps(before.parts)
    for name in (socket.gethostname(), os.getcwd(), str(os.getpid())):  # noqa: PTH109
        assert len(name) < 4 or name not in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("MASTER_PORT", "29511")

    assert HashComputer("cpu").piece_key("text", IDENTITY).digest == before.digest


def test_the_instruction_set_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AVX-512 artifact on AVX2 computes NaN: torch's own caches leave this out."""
    before = toolchain_parts("cpu")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "NOTHING")

    assert toolchain_parts("cpu")["cpu"] != before["cpu"]
