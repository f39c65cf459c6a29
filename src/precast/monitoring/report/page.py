"""The page itself: sections in the order in which a reader asks, each as tables and text.

It loads nothing: style and script stand in it, and its policy names them by their digests, so that
nothing else runs even if it were to get in. Without script all of it can still be read.
"""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from precast.monitoring.report.drawing import (
    draw_assembly,
    draw_share,
    draw_timing,
    in_words,
    legend,
    mark,
    swatch,
)
from precast.monitoring.report.markup import Markup, element, join
from precast.monitoring.report.reading import mapping, number, optional, rows, word
from precast.monitoring.report.story import AssemblyStory, PieceStory, Story, Timing
from precast.monitoring.report.timeline import draw_timeline
from precast.monitoring.units import as_bytes, as_count, as_duration

_MOST_ROWS = 400
_MOST_MESSAGES = 12  # Of one reason.
_LONGEST_CELL = 600
_DIGEST = re.compile(r"\b[0-9a-f]{40,64}\b")
_LONGEST_TEXT = 300_000


def render(recording: Mapping[str, Any]) -> str:
    """Return the page of a recording, as one file of HTML."""
    story = Story(recording)
    style, script = _file("style.css"), _file("script.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    sections = [section for section in _sections(story) if section is not None]
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
            _header(story, [(anchor, title) for anchor, title, _ in sections]),
            element(
                "main",
                [_section(anchor, title, content) for anchor, title, content in sections],
                id="report",
            ),
            _footer(story),
            element("script", Markup(script)),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _sections(story: Story) -> Iterable[tuple[str, str, Any] | None]:
    yield _reasons(story)
    yield _pieces(story)
    yield _timeline(story)
    yield _speed(story)
    yield _cache(story)
    yield _memory(story)
    yield _code(story)
    yield _settings(story)
    yield _events(story)


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


# -- the top ---------------------------------------------------------------------


def _header(story: Story, contents: Sequence[tuple[str, str]]) -> Markup:
    opened = number(story.recording.get("opened_at"))
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


def _tiles(story: Story) -> Markup:
    tiles: list[tuple[str, str, str]] = []
    if story.num_slots:
        tiles.append(
            (
                "Run compiled",
                f"{story.num_compiled} of {story.num_slots}",
                f"{as_count(len(story.pieces), 'different piece')}",
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
    if timed is not None:
        whole, _ = timed
        bounds = whole.speedup_range
        note = "too few measurements to be sure" if bounds is None else f"95 %: {_times(bounds)}"
        tiles.append(("Pieces, eager over compiled", f"{whole.speedup:.2f}×", note))
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


def _times(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f}× to {bounds[1]:.2f}×"


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


# -- what does not run compiled -----------------------------------------------------


def _reasons(story: Story) -> tuple[str, str, Any] | None:
    now = [reason for reason in story.reasons if reason["is_now"]]
    past = [reason for reason in story.reasons if not reason["is_now"]]
    if not story.reasons:
        if not story.num_slots:
            return None
        text = "Nothing runs eager against your wish, and nothing failed on the way."
        if story.is_meant_eager():
            text = "Nothing failed. The settings ask for eager code."
        return "eager", "What does not run compiled", element("p", text)
    return (
        "eager",
        "What does not run compiled",
        join(
            [_reason(reason) for reason in now],
            element("p", "All pieces run as they should.") if not now and story.num_slots else None,
            element("h3", "What happened on the way") if past else None,
            [_reason(reason) for reason in past],
        ),
    )


def _reason(reason: Mapping[str, Any]) -> Markup:
    what, messages = reason["what"], reason["messages"]
    shown = ", ".join(what[:8]) + (f" and {len(what) - 8} more" if len(what) > 8 else "")
    left = len(messages) - _MOST_MESSAGES
    return element(
        "article",
        element(
            "p",
            element("code", reason["code"], class_="code"),
            f" {shown}" if shown else None,
            class_="reason-head",
        ),
        element("p", _prose(messages[0] if messages else reason["meaning"]))
        if len(messages) < 2
        else element("ul", [element("li", _prose(one)) for one in messages[:_MOST_MESSAGES]]),
        element("p", f"and {left} more") if left > 0 else None,
        element("p", element("b", "Where: "), element("code", ", ".join(reason["locations"])))
        if reason["locations"]
        else None,
        element("p", element("b", "What to do: "), _prose(reason["remedy"]))
        if reason["remedy"]
        else None,
        class_="reason now" if reason["is_now"] else "reason",
    )


def _prose(text: str) -> Markup:
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


# -- the model as pieces ------------------------------------------------------------


def _pieces(story: Story) -> tuple[str, str, Any] | None:
    if not story.assemblies:
        return None
    plans = story.of_kind("PlanMade")
    rule = word(plans[0].get("split")) if plans else ""
    kinds = len(story.assemblies)
    has_eager = story.num_compiled < story.num_slots
    has_native = any(assembly.natives for assembly in story.assemblies)
    first = next(iter(story.pieces.values()), None)
    items = [
        (
            mark(f"hue-{first.hue if first else 0}"),
            "a compiled piece; the same letter is the same code",
        )
    ]
    if has_eager:
        items.append((mark("eager"), "runs eager"))
    if has_native:
        items.append((mark("native"), "operators that run natively between pieces: a cut"))
    return (
        "pieces",
        "The model in pieces",
        join(
            element(
                "p",
                f"{as_count(story.num_slots, 'place')} run "
                f"{as_count(len(story.pieces), 'different piece')}"
                + (f", in {kinds} kinds of calls" if kinds > 1 else "")
                + ". Equal pieces are compiled once, loaded once, and called with other weights.",
                f" The model was cut by {rule}." if rule else None,
            ),
            legend(items),
            [_drawn(story, assembly, number) for number, assembly in enumerate(story.assemblies)],
            _table(
                ("Piece", "Where", ">Places", "Runs", ">Compiled in", ">Size", ">Off by at most"),
                [_piece_row(piece) for piece in story.pieces.values()],
            ),
        ),
    )


def _drawn(story: Story, assembly: AssemblyStory, number: int) -> Markup:
    several = len(story.assemblies) > 1
    title = f"{assembly.name}, call {number + 1}" if several else assembly.name
    shapes = assembly.shapes()
    natives = sorted({name for names in assembly.natives.values() for name in names})
    return element(
        "figure",
        element("figcaption", title, f", captured with {shapes}" if shapes else None),
        draw_assembly(assembly, story.pieces),
        element("p", "In order: ", element("b", in_words(assembly, story.pieces)), class_="order"),
        element(
            "p", "Between them, natively: ", element("code", ", ".join(natives)), class_="order"
        )
        if natives
        else None,
    )


def _piece_row(piece: PieceStory) -> list[Any]:
    verification = mapping(piece.data.get("verification"))
    error = optional(verification.get("max_abs_error"))
    seconds = optional(piece.data.get("seconds"))
    size = number(piece.data.get("artifact_bytes"))
    parts = int(number(piece.data.get("num_parts"), 1))
    runs = piece.compiler + (f" in {parts} parts" if parts > 1 else "")
    code = word(piece.reason.get("code"))
    origin = f"from {piece.origin}" if piece.origin == "the cache" else piece.origin
    return [
        element(
            "a",
            swatch(piece),
            element("span", f" {piece.letter}", class_="hidden"),
            href=f"#{piece.anchor}",
        ),
        piece.names(),
        f"{len(piece.slots):,}",
        join(
            runs,
            f", {origin}" if origin else None,
            element("br") if code else None,
            element("code", code) if code else None,
        ),
        as_duration(seconds) if seconds else "",
        as_bytes(size) if size else "",
        "" if error is None else f"{error:.1e}" if error else "0",
    ]


# -- when ---------------------------------------------------------------------------


def _timeline(story: Story) -> tuple[str, str, Any] | None:
    drawn = draw_timeline(story)
    if drawn is None:
        return None
    return (
        "timeline",
        "What happened when",
        join(
            drawn,
            _jobs(story),
        ),
    )


def _jobs(story: Story) -> Markup | None:
    jobs = story.of_kind("JobFinished")
    if not jobs:
        return None
    table = []
    for job in jobs[:_MOST_ROWS]:
        piece = story.piece_of(job)
        cpu, peak = optional(job.get("cpu_seconds")), optional(job.get("peak_bytes"))
        table.append(
            [
                swatch(piece) if piece else "",
                word(job.get("piece"), "?"),
                word(job.get("compiler")) or element("code", word(job.get("code"), "?")),
                as_duration(number(job.get("seconds"))),
                "" if cpu is None else as_duration(cpu),
                "" if peak is None else as_bytes(peak),
                str(int(number(job.get("attempts"), 1))),
            ]
        )
    return join(
        element("h3", "Compile jobs"),
        _table(
            ("Piece", "Name", "Ended with", ">Took", ">CPU time", ">Peak memory", ">Tries"), table
        ),
    )


# -- how fast -------------------------------------------------------------------------


def _speed(story: Story) -> tuple[str, str, Any] | None:
    timed = [(piece, timing) for piece in story.pieces.values() for timing in piece.timing()]
    if not timed:
        return None
    table = []
    for piece, timing in timed:
        bounds = timing.speedup_range
        table.append(
            [
                element("span", swatch(piece), element("span", piece.letter, class_="hidden")),
                timing.sizes or "as they are",
                _with_range(timing.eager_s, timing.eager_range_s),
                _with_range(timing.compiled_s, timing.compiled_range_s),
                join(
                    element("b", f"{timing.speedup:.2f}×"),
                    element("span", f" {_times(bounds)}", class_="range") if bounds else None,
                ),
                draw_timing(timing),
            ]
        )
    whole = story.whole_timing()
    return (
        "speed",
        "Before and after",
        join(
            _whole(story, whole) if whole else None,
            element(
                "p",
                "One call of each piece, eager and compiled in turns, as measured when it was "
                "verified: where it was compiled, by a process of low priority, with random "
                "inputs. The figure is the median; beside it stands where the true median lies "
                "with 95 % confidence, by the ranks of the measurements, unless there were too few "
                "of them. Each row has a scale of its own. It is no time of a whole call: "
                "operators between pieces and the caller’s own work come on top.",
            ),
            legend([(mark("bar-eager"), "eager"), (mark("bar-compiled"), "compiled")]),
            _table(("Piece", "Sizes", ">Eager", ">Compiled", ">Faster", "Side by side"), table),
        ),
    )


def _whole(story: Story, whole: tuple[Timing, int]) -> Markup:
    timing, count = whole
    bounds = timing.speedup_range
    return element(
        "p",
        f"The {as_count(count, 'compiled piece')} of one call of {story.assemblies[0].name} take ",
        element("b", as_duration(timing.compiled_s)),
        " together, where eager takes ",
        element("b", as_duration(timing.eager_s)),
        f": {timing.speedup:.2f} times as fast",
        f" (95 %: {_times(bounds)})" if bounds else None,
        ".",
        class_="lead",
    )


def _with_range(seconds: float, bounds: tuple[float, float] | None) -> Markup:
    if bounds is None:
        return join(as_duration(seconds))
    return join(
        as_duration(seconds),
        element("span", f" {as_duration(bounds[0])} to {as_duration(bounds[1])}", class_="range"),
    )


# -- from where ---------------------------------------------------------------------


def _cache(story: Story) -> tuple[str, str, Any] | None:
    tiers, misses = story.tiers(), story.misses()
    loads = story.of_kind("PieceLoaded")
    if not (tiers or misses or loads):
        return None
    load_s = sum(number(event.get("seconds")) for event in loads)
    return (
        "cache",
        "Where code came from",
        join(
            element(
                "p",
                f"{as_count(len(loads), 'library', 'libraries')} opened in {as_duration(load_s)}, "
                f"{as_count(len(misses), 'miss', 'misses')}.",
            ),
            _table(
                ("Tier", ">Hits", ">Read", ">In", ">Published", ">Written", ">Failed", ">Refused"),
                [
                    [
                        row["tier"],
                        row["hits"],
                        as_bytes(row["hit_bytes"]) if row["hits"] else "",
                        as_duration(row["hit_s"]) if row["hits"] else "",
                        row["published"],
                        as_bytes(row["published_bytes"]) if row["published"] else "",
                        row["failures"] or "",
                        row["refused"] or "",
                    ]
                    for row in tiers
                ],
            )
            if tiers
            else None,
            element("h3", "Misses by cause") if misses else None,
            _table(
                ("What", "Key", "Cause", "Compared with the nearest"),
                [
                    [
                        f"{word(miss.get('kind'))} {word(miss.get('name'))}",
                        element("code", word(miss.get("key"))[:12]),
                        word(miss.get("cause"), "not explained"),
                        _differences(miss),
                    ]
                    for miss in misses[:_MOST_ROWS]
                ],
            )
            if misses
            else None,
        ),
    )


def _differences(miss: Mapping[str, Any]) -> Markup:
    differs = miss.get("differs")
    found = [str(one) for one in differs] if isinstance(differs, list) else []
    if not word(miss.get("nearest")) and not found:
        return join("there is none")
    # Digests say that two things differ, and nothing more: their beginning will do.
    shown = [_DIGEST.sub(lambda digest: digest[0][:8] + "…", one) for one in found]
    return element("ul", [element("li", one[:_LONGEST_CELL]) for one in shown], class_="plain")


def _memory(story: Story) -> tuple[str, str, Any] | None:
    found = story.memory()
    if not found:
        return None
    return ("memory", "Memory", _table(("What", ">Size", "Remark"), found))


# -- code -----------------------------------------------------------------------------


def _code(story: Story) -> tuple[str, str, Any] | None:
    if not story.assemblies:
        return None
    return (
        "code",
        "Code",
        join(
            element(
                "p",
                element("button", "Open all", type="button", id="open-all", hidden=True),
                " Generated execution code for each kind of call, then each different piece.",
            ),
            [_assembly_code(story, assembly) for assembly in story.assemblies],
            [_piece_code(piece) for piece in story.pieces.values()],
        ),
    )


def _assembly_code(story: Story, assembly: AssemblyStory) -> Markup:
    return element(
        "article",
        element("h3", assembly.name, f", {assembly.shapes()}" if assembly.shapes() else None),
        _details("Execution code", assembly.code),
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


def _piece_code(piece: PieceStory) -> Markup:
    sources = mapping(piece.data.get("source"))
    lines = word(piece.data.get("text"))
    return element(
        "article",
        element(
            "h3", swatch(piece), " ", f"Piece {piece.letter}, ", piece.names(), id=piece.anchor
        ),
        element("p", _piece_facts(piece)),
        _details("The piece’s text, as it is hashed and compiled", lines)
        if lines
        else element(
            "p",
            "Its text is not kept: the cache is off, or it is still being compiled.",
            class_="note",
        ),
        [_details(f"Compiled source: {name}", word(source)) for name, source in sources.items()],
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
        element("b", _prose(word(piece.reason.get("message")))) if piece.reason else None,
    )


def _passes(found: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not found:
        return None
    return element(
        "details",
        element("summary", as_count(len(found), "pass", "passes")),
        _table(
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
    table = [[name, element("code", value)] for name, value in _flat(mapping(parts))]
    return element(
        "details",
        element("summary", "Key ", element("code", key[:16], " …"), " and what it is made of"),
        element("p", element("code", key), class_="key"),
        _table(("Part", "Value"), table)
        if table
        else element("p", "Its parts are not known here."),
    )


def _flat(parts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in parts.items():
        if isinstance(value, Mapping):
            for inner, found in _flat(value):
                yield f"{name}.{inner}", found
        else:
            yield str(name), str(value)


def _details(title: str, source: str) -> Markup:
    lines = source.count("\n") + 1
    return element(
        "details",
        element("summary", title, element("span", f" {lines:,} lines", class_="note")),
        _pre(source),
    )


def _pre(source: str) -> Markup:
    left = len(source) - _LONGEST_TEXT
    shown = source[:_LONGEST_TEXT] + (f"\n… {left:,} more characters" if left > 0 else "")
    return element("pre", element("code", _dimmed(shown)), tabindex="0")


def _dimmed(source: str) -> Markup:
    """Return code whose comments stand back."""
    found = []
    for line in source.splitlines():
        bare = line.lstrip()
        is_comment = bare.startswith(("# ", "//")) or bare == "#"
        found.append(element("i", line) if is_comment else line)
        found.append("\n")
    return join(found)


# -- settings and events ---------------------------------------------------------------


def _settings(story: Story) -> tuple[str, str, Any] | None:
    if not story.settings:
        return None
    table = [
        [
            element("code", name),
            _value(mapping(row).get("value")),
            word(mapping(row).get("from"), "?"),
        ]
        for name, row in story.settings.items()
    ]
    given = [row for row in table if row[2] != "default"]
    left = [row for row in table if row[2] == "default"]
    headings = ("Setting", "Value", "From")
    return (
        "settings",
        "Settings",
        join(
            _table(headings, given) if given else element("p", "All settings have their defaults."),
            element(
                "details",
                element("summary", as_count(len(left), "setting"), " left at their defaults"),
                _table(headings, left),
            )
            if left
            else None,
        ),
    )


def _value(value: Any) -> Markup:
    return element("code", "None" if value is None else str(value))


def _events(story: Story) -> tuple[str, str, Any] | None:
    if not story.events:
        return None
    shown = story.events if len(story.events) <= _MOST_ROWS else (
        story.events[: _MOST_ROWS // 2] + story.events[-_MOST_ROWS // 2 :]
    )  # fmt: skip
    table = [
        [
            f"{number(event.get('at')):.3f} s",
            word(event.get("event"), "?"),
            _fields(event),
        ]
        for event in shown
    ]
    left = len(story.events) - len(shown)
    return (
        "events",
        "All events",
        element(
            "details",
            element("summary", as_count(len(story.events), "event"), " in order"),
            element("p", f"{left:,} in the middle are left out.") if left else None,
            _table((">After", "Event", "What"), table),
        ),
    )


def _fields(event: Mapping[str, Any]) -> str:
    shown = []
    for name, value in event.items():
        if name in ("at", "event", "parts", "timing") or value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            found = str(value.get("code") or f"{len(value)} entries")
        elif isinstance(value, float):
            found = f"{value:.4g}"
        else:
            found = str(value)
        shown.append(f"{name} {found if len(found) <= 80 else found[:77] + '…'}")
    return ", ".join(shown)


# -- tables ------------------------------------------------------------------------------


def _table(headings: Sequence[str], body: Iterable[Sequence[Any]]) -> Markup:
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
