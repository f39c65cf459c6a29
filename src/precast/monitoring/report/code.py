"""The section with code: what was generated, each piece's text, and what keys are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from precast.monitoring.report.drawing import swatch
from precast.monitoring.report.markup import Markup, element, join, text
from precast.monitoring.report.reading import mapping, number, rows, word
from precast.monitoring.report.story import AssemblyStory, PieceStory, Story
from precast.monitoring.report.tables import prose, table
from precast.monitoring.units import as_count, as_duration

_LONGEST_TEXT = 300_000
_MOST_CODE = 2_000_000  # Characters of code on one page, which is to open at once.
_DEEPEST = 4  # Of the parts of a key.


class _Room:
    """How much code still fits."""

    def __init__(self) -> None:
        self._left = _MOST_CODE

    def take(self, source: str) -> str:
        """Return as much of a source as fits."""
        shown = source[: max(0, min(self._left, _LONGEST_TEXT))]
        self._left -= len(text(shown))
        left = len(source) - len(shown)
        more = f"{left:,} more characters are in the recording, not here"
        return f"{shown}\n… {more}" if left else shown


def code_section(story: Story) -> tuple[str, str, Any] | None:
    """Return the section with all code."""
    if not story.assemblies:
        return None
    room = _Room()
    return (
        "code",
        "Code",
        join(
            element(
                "p",
                element("button", "Open all", type="button", id="open-all", hidden=True),
                " Generated execution code for each kind of call, then each different piece.",
            ),
            [_assembly_code(assembly, room) for assembly in story.assemblies],
            [_piece_code(piece, room) for piece in story.pieces.values()],
        ),
    )


def _assembly_code(assembly: AssemblyStory, room: _Room) -> Markup:
    return element(
        "article",
        element("h3", assembly.name, f", {assembly.shapes()}" if assembly.shapes() else None),
        _details("Execution code", assembly.code, room),
        element(
            "details",
            element(
                "summary", f"When it is right: {as_count(len(assembly.conditions), 'condition')}"
            ),
            element("ol", [element("li", element("code", one)) for one in assembly.conditions]),
        )
        if assembly.conditions
        else None,
        _passes(rows(assembly.data.get("passes"))),
        _key_parts(assembly.key, assembly.data.get("parts")),
    )


def _piece_code(piece: PieceStory, room: _Room) -> Markup:
    sources = mapping(piece.data.get("source"))
    lines = word(piece.data.get("text"))
    return element(
        "article",
        element(
            "h3", swatch(piece), " ", f"Piece {piece.letter}, ", piece.names(), id=piece.anchor
        ),
        element("p", _piece_facts(piece)),
        _details("The piece’s text, as it is hashed and compiled", lines, room)
        if lines
        else element(
            "p",
            "Its text is not kept: the cache is off, or it is still being compiled.",
            class_="note",
        ),
        [
            _details(f"Compiled source: {name}", word(source), room)
            for name, source in sources.items()
        ],
        None
        if sources or not piece.is_compiled
        else element("p", _no_source(piece), class_="note"),
        _passes(rows(piece.data.get("passes"))),
        _key_parts(word(piece.data.get("key")), piece.data.get("parts")),
    )


def _no_source(piece: PieceStory) -> str:
    if int(number(piece.data.get("num_parts"), 1)) > 1:
        return "Its compiled source is not here: it was compiled in parts, which keep their own."
    if piece.compiler != "aot_inductor":
        return f"Its compiled source is not here: {piece.compiler} keeps none."
    return "Its compiled source is not here: the cache has none for it, or has it no more."


def _piece_facts(piece: PieceStory) -> Markup:
    verification = mapping(piece.data.get("verification"))
    sizes = rows(verification.get("sizes"))
    tried = "; ".join(", ".join(f"{n} = {v}" for n, v in row.items()) for row in sizes if row)
    places = as_count(len(piece.slots), "place")
    weights = int(number(piece.slots[0].get("num_weights"))) if piece.slots else 0
    return join(
        f"{places}, {as_count(weights, 'weight')} each; runs {piece.compiler}. ",
        f"Compared with eager at {tried}. " if tried else None,
        element("b", prose(word(piece.reason.get("message")))) if piece.reason else None,
    )


def _passes(found: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not found:
        return None
    return element(
        "details",
        element("summary", as_count(len(found), "pass", "passes")),
        table(
            ("Pass", "Stage", "Matches", ">Took", "Left out"),
            [
                [
                    word(row.get("name")),
                    word(row.get("stage")),
                    ", ".join(f"{n}: {c}" for n, c in mapping(row.get("matches")).items())
                    or "none",
                    as_duration(number(row.get("seconds"))),
                    word(mapping(row.get("failure")).get("message")),
                ]
                for row in found
            ],
        ),
    )


def _key_parts(key: str, parts: Any) -> Markup | None:
    if not key:
        return None
    body = [[name, element("code", value)] for name, value in _flat(mapping(parts))]
    return element(
        "details",
        element("summary", "Key ", element("code", key[:16], " …"), " and what it is made of"),
        element("p", element("code", key), class_="key"),
        table(("Part", "Value"), body) if body else element("p", "Its parts are not known here."),
    )


def _flat(parts: Mapping[str, Any], depth: int = 0) -> Iterable[tuple[str, str]]:
    for name, value in parts.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            for inner, found in _flat(value, depth + 1):
                yield f"{name}.{inner}", found
        else:
            yield str(name), str(value)


def _details(title: str, source: str, room: _Room) -> Markup:
    lines = source.count("\n") + 1
    return element(
        "details",
        element("summary", title, element("span", f" {lines:,} lines", class_="note")),
        element("pre", element("code", _dimmed(room.take(source))), tabindex="0"),
    )


def _dimmed(source: str) -> Markup:
    """Return code whose comments stand back."""
    found = []
    for line in source.splitlines():
        bare = line.lstrip()
        is_comment = bare.startswith(("# ", "//")) or bare == "#"
        found.append(element("i", line) if is_comment else line)
        found.append("\n")
    return join(found)
