"""Tables and sentences of the page. On a phone each row of a table becomes a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from precast.monitoring.report.markup import Markup, element, join


def times(bounds: tuple[float, float]) -> str:
    """Return a range of factors in words."""
    return f"{bounds[0]:.2f}× to {bounds[1]:.2f}×"


def prose(text: str) -> Markup:
    """Return a sentence of a reason; what stands between backticks is code."""
    parts = _sentence(text).split("`")
    if len(parts) % 2 == 0:
        return join("`".join(parts))
    return join([element("code", part) if place % 2 else part for place, part in enumerate(parts)])


def _sentence(text: str) -> str:
    text = text.strip()
    if not text:
        return ""
    ended = text if text.endswith((".", "!", "?")) else f"{text}."
    is_name = any(sign in ended.partition(" ")[0] for sign in "_(.`'\"")
    return ended if is_name else ended[0].upper() + ended[1:]


def table(headings: Sequence[str], body: Iterable[Sequence[Any]]) -> Markup:
    """Return a table; a heading that begins with `>` has its column set right.

    Each cell says which column it is in: on a phone each row becomes a list.
    """
    names = [heading.lstrip(">") for heading in headings]
    kinds = ["right" if heading.startswith(">") else None for heading in headings]
    return element(
        "div",
        element(
            "table",
            element(
                "thead",
                element(
                    "tr",
                    [
                        element("th", name, scope="col", class_=kind)
                        for name, kind in zip(names, kinds, strict=True)
                    ],
                ),
            ),
            element(
                "tbody",
                [
                    element(
                        "tr",
                        [
                            element("td", _cell(cell), data_label=name, class_=kind)
                            for cell, name, kind in zip(row, names, kinds, strict=True)
                        ],
                    )
                    for row in body
                ],
            ),
        ),
        class_="table",
    )


def _cell(content: Any) -> Any:
    """Return a cell's content as one thing, which a phone sets beside its heading."""
    return element("div", content) if isinstance(content, Markup) and content else content
