"""Pages from the root of the repository, and a place for every page and public name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

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


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Put public names that the API page does not show at its end."""
    if page.file.src_uri != "api/precast.md":
        return markdown
    missing = [name for name in public_names() if f"::: precast.{name}\n" not in markdown]
    more = "".join(f"\n::: precast.{name}\n    options: {{heading_level: 3}}\n" for name in missing)
    return f"{markdown}\n## More\n{more}" if more else markdown


def public_names() -> list[str]:
    """Return the names that `precast` lists, without importing it."""
    tree = ast.parse((ROOT / "src" / "precast" / "__init__.py").read_text())
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return list(ast.literal_eval(value))
    raise LookupError("precast has no __all__")


def _names(nav: Any) -> list[str]:
    """Return the pages that a part of the navigation names."""
    match nav:
        case str():
            return [nav]
        case list():
            return [name for item in nav for name in _names(item)]
        case _:
            return [name for item in nav.values() for name in _names(item)]
