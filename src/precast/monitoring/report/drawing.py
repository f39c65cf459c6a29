"""Drawings: a model as its pieces in order, and measurements as bars. SVG, sized by the page.

Colours repeat after eight pieces; letters do not. What runs eager is an outline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from precast.monitoring.report.markup import Markup, element
from precast.monitoring.report.reading import word
from precast.monitoring.report.story import AssemblyStory, PieceStory, Timing

#: Of one assembly; the rest of a longer one is told in words.
MOST_DRAWN = 1000

_WIDTH, _HEIGHT = 34, 40


def in_words(assembly: AssemblyStory, pieces: dict[str, PieceStory]) -> str:
    """Return an assembly's pieces as runs: `A · B × 79 · C`; a long text is cut off."""
    letters = [pieces[word(slot.get("piece"), "?")].letter for slot in assembly.slots]
    runs = _repeats(letters)
    shown = " · ".join(runs[:60])
    return shown if len(runs) <= 60 else f"{shown} · … ({len(runs) - 60} more)"


def _repeats(letters: Sequence[str]) -> list[str]:
    """Return letters in order, those that repeat as a group folded: `A`, `(B C) × 4`, `D`."""
    found: list[str] = []
    place = 0
    while place < len(letters):
        best, best_count = 1, 1
        for length in range(1, min(6, (len(letters) - place) // 2) + 1):
            group = letters[place : place + length]
            count = 1
            while letters[place + count * length : place + (count + 1) * length] == group:
                count += 1
            if count > 1 and count * length > best * best_count:
                best, best_count = length, count
        group = letters[place : place + best]
        text = group[0] if best == 1 else f"({' '.join(group)})"
        found.append(text if best_count == 1 else f"{text} × {best_count}")
        place += best * best_count
    return found


def draw_assembly(assembly: AssemblyStory, pieces: dict[str, PieceStory]) -> Markup:
    """Return the pieces of an assembly in order, wrapped as wide as the page is."""
    marks = []
    for slot in assembly.slots[:MOST_DRAWN]:
        place = slot.get("place")
        if isinstance(place, int) and place in assembly.natives:
            marks.append(_native(len(assembly.natives[place])))
        piece = pieces[word(slot.get("piece"), "?")]
        name = word(slot.get("name"), "?")
        is_compiled = slot.get("compiler") not in (None, "eager")
        marks.append(_slot(piece, _short(name), is_compiled=is_compiled))
    places = [slot.get("place") for slot in assembly.slots]
    end = [place for place in assembly.natives if place not in places]
    if end and len(assembly.slots) <= MOST_DRAWN:
        marks.append(_native(len(assembly.natives[end[-1]])))
    left = len(assembly.slots) - MOST_DRAWN
    return element(
        "div",
        marks,
        element("p", f"and {left} more", class_="note") if left > 0 else None,
        class_="slots",
        role="img",
        aria_label=f"{len(assembly.slots)} pieces in order: {in_words(assembly, pieces)}",
    )


def _short(name: str) -> str:
    """Return what tells a slot from its like: the number in its name."""
    found = re.search(r"(\d{1,6})\D*$", name)
    return found[1] if found else ""


def _slot(piece: PieceStory, number: str, *, is_compiled: bool) -> Markup:
    kind = f"hue-{piece.hue}" if is_compiled else f"eager hue-{piece.hue}"
    size = {} if len(piece.letter) < 3 else {"font_size": 11}
    # For the mouse; by keyboard each piece is reached once, in the table below.
    link = element(
        "a",
        element("rect", x=1.5, y=1.5, width=_WIDTH - 3, height=25, rx=5),
        element("text", piece.letter, x=_WIDTH / 2, y=19, **size),
        href=f"#{piece.anchor}",
        tabindex="-1",
    )
    return element(
        "svg",
        link,
        element("text", number, x=_WIDTH / 2, y=38, class_="number") if number else None,
        class_=f"slot {kind}",
        width=_WIDTH,
        height=_HEIGHT,
        aria_hidden="true",
    )


def _native(count: int) -> Markup:
    dots = [
        element("circle", cx=5, cy=14 + 7 * (number - (min(count, 3) - 1) / 2), r=2)
        for number in range(min(count, 3))
    ]
    return element("svg", dots, class_="native", width=10, height=_HEIGHT, aria_hidden="true")


def swatch(piece: PieceStory) -> Markup:
    """Return a piece's mark, for tables and headings."""
    kind = "" if piece.is_compiled else " eager"
    return element(
        "svg",
        element("rect", x=1.5, y=1.5, width=29, height=23, rx=5),
        element("text", piece.letter, x=16, y=18),
        class_=f"slot hue-{piece.hue}{kind}",
        width=32,
        height=26,
        aria_hidden="true",
    )


def draw_timing(timing: Timing) -> Markup:
    """Return eager's and compiled code's time as two bars, with a whisker where it is known."""
    # Of each row by itself: one piece may take a thousand times what another does.
    longest_s = max(timing.eager_s, timing.compiled_s)
    ends = [*(timing.eager_range_s or ()), *(timing.compiled_range_s or ())]
    most_s = min(1.6 * longest_s, max([longest_s, *ends]))
    bars = []
    for row, (kind, seconds, bounds) in enumerate(
        (
            ("bar-eager", timing.eager_s, timing.eager_range_s),
            ("bar-compiled", timing.compiled_s, timing.compiled_range_s),
        )
    ):
        top = 3 + row * 12
        bars.append(
            element(
                "rect", x=0, y=top, width=_percent(seconds, most_s), height=9, class_=kind, rx=1
            )
        )
        if bounds is not None:
            low, high = (_percent(bound, most_s) for bound in bounds)
            middle = top + 4.5
            bars += [
                element("line", x1=low, x2=high, y1=middle, y2=middle, class_="whisker"),
                *(
                    element("line", x1=end, x2=end, y1=top + 2, y2=top + 7, class_="whisker")
                    for end in (low, high)
                ),
            ]
    return element("svg", bars, class_="bars", width="100%", height=28, aria_hidden="true")


def _percent(value: float, most: float) -> str:
    return f"{min(100.0, 100 * value / most) if most else 0:.2f}%"


def draw_share(done: int, total: int) -> Markup:
    """Return how much of a whole is done, as one bar."""
    share = _percent(done, total)
    return element(
        "svg",
        element("rect", x=0, y=0, width="100%", height=8, rx=4, class_="share-rest"),
        element("rect", x=0, y=0, width=share, height=8, rx=4, class_="share-done")
        if done
        else None,
        class_="share",
        width="100%",
        height=8,
        aria_hidden="true",
    )


def legend(items: Sequence[tuple[Markup, str]]) -> Markup:
    """Return marks with what they stand for."""
    return element(
        "ul",
        [element("li", mark, " ", element("span", text)) for mark, text in items],
        class_="legend",
    )


def mark(kind: str) -> Markup:
    """Return a mark of the legend: `compiled`, `eager`, `native`, `bar-…`."""
    if kind == "native":
        inner = element("circle", cx=9, cy=8, r=2.5)
    else:
        inner = element("rect", x=1, y=2, width=16, height=12, rx=3)
    return element("svg", inner, class_=f"mark {kind}", width=18, height=16, aria_hidden="true")
