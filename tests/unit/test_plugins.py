"""Names stand for built-ins, then for entry points; an unknown one gets the nearest."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint

import pytest

from precast import plugins
from precast.config import CompilationConfig
from precast.errors import ConfigError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package that brings compilers."""
    group = "precast.compilers"
    brought = (
        EntryPoint("mine", "precast.config:CompilationConfig", group),
        EntryPoint("eager", "precast.config:ResolvedConfig", group),
        EntryPoint("broken", "no_such_package:Compiler", group),
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: brought if "compilers" in group else ()
    )


def test_an_entry_point_is_loaded_by_name(installed: None) -> None:
    assert plugins.load_plugin("compilers", "mine") is CompilationConfig
    assert plugins.known_names("compilers")[-2:] == ["broken", "mine"]


def test_a_package_cannot_replace_a_built_in(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plugins.BUILT_IN["compilers"], "eager", "precast.plugins:known_names")
    assert plugins.load_plugin("compilers", "eager") is plugins.known_names


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'aot_inductor'.*Did you mean 'inductor'"):
        plugins.load_plugin("compilers", "inducter")


def test_a_plugin_that_cannot_be_imported_says_why(installed: None) -> None:
    with pytest.raises(ConfigError, match="no_such_package"):
        plugins.load_plugin("compilers", "broken")
