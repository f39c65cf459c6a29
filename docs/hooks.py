"""Pages from the root of the repository, and a place in the navigation for every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"architecture.md": "ARCHITECTURE.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages that the navigation does not name at the end of their section.

    That is "How-to" for those of `how-to/`, and "Reference" for all others.
    """
    sections: dict[str, list[Any]] = {
        title: pages for section in config.nav for title, pages in section.items()
    }
    named = set(_names(config.nav))
    docs = Path(config.docs_dir)
    for path in sorted(docs.rglob("*.md")):
        name = path.relative_to(docs).as_posix()
        if name not in named:
            sections["How-to" if name.startswith("how-to/") else "Reference"].append(name)
    return config


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add each page of the repository's root under its name in the site."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def _names(nav: Any) -> list[str]:
    """Return the pages that a part of the navigation names."""
    match nav:
        case str():
            return [nav]
        case list():
            return [name for item in nav for name in _names(item)]
        case _:
            return [name for item in nav.values() for name in _names(item)]
