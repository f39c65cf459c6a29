"""The page itself: sections in the order in which a reader asks, each as tables and text.

It loads nothing: style and script stand in it, and its policy names them by their digests, so that
nothing else runs even if it were to get in. Without script all of it can still be read.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from precast.monitoring.report import sections
from precast.monitoring.report.code import code_section
from precast.monitoring.report.drawing import draw_share
from precast.monitoring.report.markup import Markup, element
from precast.monitoring.report.reading import number, word
from precast.monitoring.report.story import Story
from precast.monitoring.report.tables import times
from precast.monitoring.units import as_count, as_duration


def render(recording: Mapping[str, Any]) -> str:
    """Return the page of a recording, as one file of HTML."""
    story = Story(recording)
    style, script = _file("style.css"), _file("script.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    shown = [section for section in _sections(story) if section is not None]
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("meta", name="generator", content=f"Precast {word(recording.get('precast'))}"),
            element("title", f"{story.name} · Precast report"),
            element("link", rel="icon", href="data:,"),
            element("style", Markup(style)),
        ),
        element(
            "body",
            element("a", "To the report", href="#report", class_="skip"),
            _header(story, [(anchor, title) for anchor, title, _ in shown]),
            element(
                "main",
                [_section(anchor, title, content) for anchor, title, content in shown],
                id="report",
            ),
            _footer(story),
            element("script", Markup(script)),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _sections(story: Story) -> Iterable[sections.Section | None]:
    yield sections.reasons_section(story)
    yield sections.pieces_section(story)
    yield sections.timeline_section(story)
    yield sections.speed_section(story)
    yield sections.cache_section(story)
    yield sections.memory_section(story)
    yield code_section(story)
    yield sections.settings_section(story)
    yield sections.events_section(story)


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _header(story: Story, contents: Sequence[tuple[str, str]]) -> Markup:
    opened = max(0.0, number(story.recording.get("opened_at")))
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(opened, 32_503_680_000)))
    torch = word(story.model.get("torch"))
    facts = [
        moment if opened else None,
        f"torch {torch}" if torch else None,
        f"Python {word(story.process.get('python'), '?')}",
        word(story.process.get("machine")) or None,
        f"process {int(number(story.process.get('pid')))}" if story.process.get("pid") else None,
    ]
    return element(
        "header",
        element("p", "Precast report", class_="kicker"),
        element("h1", story.name),
        element("p", story.verdict(), class_=f"verdict {story.tone}"),
        draw_share(story.num_compiled, story.num_slots) if story.num_slots else None,
        _tiles(story),
        element("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        element(
            "nav",
            [element("a", title, href=f"#{anchor}") for anchor, title in contents],
            aria_label="Contents",
        ),
    )


def _tiles(story: Story) -> Markup | None:
    tiles: list[tuple[str, str, str]] = []
    if story.num_slots:
        tiles.append(
            (
                "Run compiled",
                f"{story.num_compiled} of {story.num_slots}",
                f"{as_count(story.num_unique, 'different piece')}",
            )
        )
    if story.start_seconds is not None:
        kind = "traced and compiled" if story.compile_seconds else "traced, nothing compiled"
        kind = "from the cache, nothing traced" if story.is_warm else kind
        title = "Warm start" if story.is_warm else "First start"
        tiles.append((title, as_duration(story.start_seconds), kind))
    if story.compile_seconds:
        tiles.append(
            ("Compiling cost", as_duration(story.compile_seconds), "of workers, side by side")
        )
    if story.seconds_saved:
        tiles.append(
            ("Compiling spared", as_duration(story.seconds_saved), "since the cache had it")
        )
    timed = story.whole_timing()
    bounds = None if timed is None else timed[0].speedup_range
    if timed is not None and bounds is not None:  # Else there is no telling.
        note = f"95 %: {times(bounds)}"
        tiles.append(("Pieces, eager over compiled", f"{timed[0].speedup:.2f}×", note))
    if not tiles:
        return None
    return element(
        "dl",
        [
            element(
                "div",
                element("dt", title),
                element("dd", value, class_="value"),
                element("dd", note, class_="note"),
            )
            for title, value, note in tiles
        ],
        class_="tiles",
    )


def _footer(story: Story) -> Markup:
    dropped = int(number(story.recording.get("num_dropped")))
    return element(
        "footer",
        element(
            "p",
            f"Made by Precast {word(story.recording.get('precast'), '?')} from a recording of "
            f"format {story.recording.get('format')}. It holds the structure of the model and its "
            "code, no weights and no data. ",
            f"{dropped} events between the first and the last ones were not kept. "
            if dropped
            else None,
        ),
    )


def _section(anchor: str, title: str, content: Any) -> Markup:
    return element(
        "section",
        element("h2", title, id=anchor),
        content,
        aria_labelledby=anchor,
    )
