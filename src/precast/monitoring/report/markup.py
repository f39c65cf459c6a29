"""HTML from Python values: whatever is not markup already is escaped.

So that no name of a model, no message and no source can become part of the page's structure.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

_VOID = frozenset(("br", "hr", "link", "meta", "rect", "line", "circle", "path"))
# What XML and HTML forbid even where escaped.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is HTML. Made by `element` and `join` alone, and of literals."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Return a value as HTML that shows it as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def join(*parts: Any) -> Markup:
    """Return parts one behind the other; None is left out, and lists are taken apart."""
    found = []
    for part in parts:
        if isinstance(part, list | tuple):
            found.append(join(*part))
        elif part is not None:
            found.append(text(part))
    return Markup("".join(found))


def element(tag: str, *content: Any, **attributes: Any) -> Markup:
    """Return an element: `element("a", "Piece B", href="#b", class_="link")`.

    A trailing `_` of an attribute's name is dropped, other `_` become `-`. None and False leave an
    attribute out, True gives it no value.
    """
    written = "".join(
        f" {_name(name)}" if value is True else f' {_name(name)}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(*content)}</{tag}>")


def _name(name: str) -> str:
    return name.removesuffix("_").replace("_", "-")
