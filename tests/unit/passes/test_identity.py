from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.errors import ConfigError
from precast.graph.key import HashComputer
from precast.passes.builtin import DEFAULT, ON_WHOLE_GRAPH, VERSIONS
from precast.passes.chosen import CannotSend, ChosenPasses, choose, load_pass, receive
from precast.passes.identity import identity_of
from precast.plugins import BUILT_IN
from unit.passes import planted

SOURCE = """
    import threading
    import helpers
    from precast.passes.interface import InductorPass

    LIMIT = 3
    LOCK = threading.Lock()

    def helper(x):
        return x + LIMIT

    class Mine(InductorPass):
        '''What it does.'''
        def __init__(self, times=1):
            self.times = times
        def __call__(self, graph):
            return helper(self.times) + helpers.inner(1)

    print(Mine().identity())
"""
HELPERS = """
    def inner(x):
        return deeper(x) * 2

    def deeper(x):
        return x - 1

    def unused(x):
        return x
"""


def identity_in_another_process(folder: Path, source: str, helpers: str = HELPERS) -> str:
    (folder / "mine.py").write_text(textwrap.dedent(source))
    (folder / "helpers.py").write_text(textwrap.dedent(helpers))
    for cached in folder.rglob("*.pyc"):
        cached.unlink()
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_edit_changes_the_identity_and_nothing_else_does(tmp_path: Path) -> None:
    """
    Each edit is seen by another process: of the class, a helper, a helper's helper in another
    module, a constant. Comments, layout, and what the pass does not refer to do not count.
    """
    first = identity_in_another_process(tmp_path, SOURCE)
    assert len(first) == 64
    for edited in (
        SOURCE.replace("times=1", "times=2"),
        SOURCE.replace("LIMIT = 3", "LIMIT = 4"),
        SOURCE.replace("x + LIMIT", "x - LIMIT"),
    ):
        assert identity_in_another_process(tmp_path, edited) != first
    deeper = HELPERS.replace("x - 1", "x - 2")
    assert identity_in_another_process(tmp_path, SOURCE, deeper) != first

    remark = SOURCE.replace("    def helper(x):", "    # A remark.\n\n    def helper(x):")
    assert identity_in_another_process(tmp_path, remark) == first
    unused = HELPERS.replace("return x\n", "return -x\n")
    assert identity_in_another_process(tmp_path, SOURCE, unused) == first


def test_attributes_count() -> None:
    assert planted.AddingZero(1).identity() == planted.AddingZero(1).identity()
    assert planted.AddingZero(1).identity() != planted.AddingZero(2).identity()
    assert planted.AddingZero(1).identity() != planted.AddingZero(True).identity()
    assert planted.Doubling().identity() != planted.AddingZero(1).identity()
    assert planted.tanh_of_gelu.identity() != planted.scaled_apart.identity()


def test_what_has_no_text_has_no_identity() -> None:
    """
    A tensor in a closure: nothing is kept of what is compiled with it, in this process or another.
    """
    live = torch.ones(3)

    def closing_over(graph: Any) -> int:
        return int(live.sum())

    assert identity_of(closing_over) is None
    one, two = ChosenPasses([closing_over]), ChosenPasses([closing_over])
    assert one.identities != two.identities


def test_a_global_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = planted.Doubling().identity()
    monkeypatch.setattr(planted, "FACTOR", 3.0)
    assert planted.Doubling().identity() != before


def test_the_order_counts_in_keys_and_whole_graph_passes_count_in_assemblies_only() -> None:
    """
    What a pass over the whole graph did shows in the pieces' texts.
    """
    computer = HashComputer("cpu")

    def piece_key(*passes: Any) -> str:
        identities = choose(passes).piece_identities
        return computer.piece_key("text", {"compiler": "c"}, identities).digest

    def assembly_key(*passes: Any) -> str:
        return computer.assembly_key("m", "c", {}, choose(passes).identities).digest

    one, two = planted.AddingZero(1), planted.AddingZero(2)
    assert piece_key(one, two) == piece_key(planted.AddingZero(1), planted.AddingZero(2))
    assert piece_key(one, two) != piece_key(two, one)
    assert piece_key(one) != piece_key()
    assert piece_key("canonical_norm") == piece_key()
    assert assembly_key("canonical_norm") != assembly_key()
    assert assembly_key("no_ops", "clean_up") != assembly_key("clean_up", "no_ops")
    assert piece_key("no_ops", "clean_up") != piece_key("clean_up", "no_ops")


def test_built_in_identities_are_read_without_a_pass() -> None:
    """
    A warm start with the default passes imports the tables alone.
    """
    code = (
        "import sys, precast.passes.chosen as c; "
        "c.choose(None); assert c.choose('merge_linears_on_gpu').identities; "
        "assert c.choose('no_ops,in_place').identities; "
        "print([n for n in sys.modules if 'torch' in n or n.startswith('precast.passes')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        ["precast.passes", "precast.passes.builtin", "precast.passes.chosen"]
    )


def test_the_table_of_versions_is_the_truth() -> None:
    assert VERSIONS.keys() == BUILT_IN["passes"].keys()
    assert set(DEFAULT) <= VERSIONS.keys()
    for name, version in VERSIONS.items():
        found = load_pass(name)
        assert found.name == name
        assert found.identity() == version
    assert VERSIONS.keys() >= ON_WHOLE_GRAPH


def test_passes_are_named_listed_or_given() -> None:
    chosen = choose("no_ops, unit.passes.planted:AddingZero")
    assert list(chosen.identities) == ["no_ops", "AddingZero"]
    assert list(choose((planted.Doubling, planted.Doubling())).identities) == [
        "Doubling",
        "Doubling+",
    ]
    assert not choose(())
    assert not choose("off")
    for unknown in ("no_opps", "unit.passes.planted:Nothing", "no.such.module:Name", 3):
        with pytest.raises(ConfigError, match="passes"):
            choose((unknown,))


def test_what_a_worker_is_told_is_what_was_chosen() -> None:
    sent = [
        "no_ops",
        planted.AddingZero(3),
        planted.tanh_of_gelu,
        planted.Doubling,
        planted.first_call,
        "unit.passes.planted:Raising",
        "canonical_norm",  # Runs here, on the whole graph.
    ]
    received = receive(choose(sent).messages())
    assert [p.name for p in received] == [
        "no_ops",
        "AddingZero",
        "tanh_of_gelu",
        "Doubling",
        "first_call",
        "Raising",
    ]
    assert [p.identity() for p in received] == list(choose(sent).piece_identities.values())
    assert received[1].times == 3  # type: ignore[attr-defined]


def test_what_cannot_be_sent_says_so() -> None:
    live = torch.ones(3)
    for entry in (lambda graph: None, lambda graph: int(live.sum())):
        with pytest.raises(CannotSend):
            ChosenPasses([entry]).messages()
    main = type("Mine", (planted.AddingZero,), {"__module__": "__main__"})
    with pytest.raises(CannotSend, match="main script"):
        ChosenPasses([main()]).messages()
