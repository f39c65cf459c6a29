"""Documents that a machine can hold to the code: lists of codes, settings, key parts, fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from precast.assembly import Assembly
from precast.compilers.verify import TOLERANCES
from precast.config import SETTINGS, CompilationConfig
from precast.errors import REASON_CODES
from precast.graph.key import HashComputer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def first_cells(text: str) -> list[str]:
    """The names in code style that begin a table's rows."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_reason_is_explained_once() -> None:
    assert sorted(first_cells((DOCS / "reasons.md").read_text())) == sorted(REASON_CODES)


def test_every_setting_is_explained_with_its_default() -> None:
    text = (DOCS / "settings.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE)
    defaults = {name: getattr(CompilationConfig(), name) for name in SETTINGS}
    assert {name: default.replace('"', "'") for name, default in rows} == {
        name: repr(default) for name, default in defaults.items()
    }


def test_the_settings_of_a_key_are_the_stated_ones() -> None:
    in_key = [name for name, rule in SETTINGS.items() if rule.in_key]
    stated = re.search(r"^Only (.+?) are part of", (DOCS / "settings.md").read_text(), re.MULTILINE)
    assert stated is not None
    assert sorted(re.findall(r"`(\w+)`", stated[1])) == sorted(in_key)
    row = re.search(r"^\| `config` \| (.+) \|$", (DOCS / "keys.md").read_text(), re.MULTILINE)
    assert row is not None
    assert sorted(re.findall(r"`(\w+)`", row[1])) == sorted(in_key)


def test_every_part_of_a_key_is_explained() -> None:
    """
    `device`, `runtime` and `architecture` are parts on a GPU only.
    """
    computer = HashComputer("cpu")
    parts = {
        *computer.piece_key("text", {"compiler": "eager"}).parts,
        *computer.assembly_key("model", "call", {}).parts,
    }
    stated = set(first_cells((DOCS / "keys.md").read_text()))
    assert stated == parts | {"device", "runtime", "architecture"}


def test_every_field_of_an_assembly_is_explained() -> None:
    section = (DOCS / "format.md").read_text().partition("## Assembly")[2]
    written = Assembly(**dict.fromkeys(Assembly.__slots__)).to_json()
    assert sorted(first_cells(section)) == sorted(written)


def test_tolerances_are_the_stated_ones() -> None:
    rows = re.findall(
        r"^\| (`.+`) \| (\S+) \|$", (DOCS / "verification.md").read_text(), re.MULTILINE
    )
    stated = {name: float(value) for names, value in rows for name in re.findall(r"`(.+?)`", names)}
    assert stated == TOLERANCES


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")]), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_figures_of_the_front_page_are_those_of_their_sources() -> None:
    """
    A row for the README's measurements and one for the GPU's.
    """
    rows = re.findall(
        r"^\| an? .+(?:cores|H100) \| (.+) \|$", (DOCS / "index.md").read_text(), re.M
    )
    sources = [(ROOT / "README.md").read_text(), (DOCS / "gpu.md").read_text()]
    assert len(rows) == len(sources)
    for row, source in zip(rows, sources, strict=True):
        warm, compiled_warm, cold, compiled_cold = row.split(" | ")
        for cells in (
            f"| Precast, warm | {warm} |",
            f"| torch.compile, warm caches, sizes marked dynamic | {compiled_warm} |",
            f"| Precast, cold | {cold} |",
            f"| torch.compile, cold | {compiled_cold} |",
        ):
            assert cells in source
