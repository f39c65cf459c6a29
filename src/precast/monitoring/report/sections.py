"""The sections of the page but for code. Each is an anchor, a title and its content, or None."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from precast.monitoring.report.drawing import (
    draw_assembly,
    draw_timing,
    in_words,
    legend,
    mark,
    swatch,
)
from precast.monitoring.report.markup import Markup, element, join
from precast.monitoring.report.reading import mapping, number, optional, word
from precast.monitoring.report.story import AssemblyStory, PieceStory, Story, Timing
from precast.monitoring.report.tables import prose, table, times
from precast.monitoring.report.timeline import draw_timeline
from precast.monitoring.units import as_bytes, as_count, as_duration

#: An anchor, a title, and what stands below it.
Section = tuple[str, str, Any]

_MOST_ROWS = 400
_MOST_MESSAGES = 12  # Of one reason.
_LONGEST_CELL = 600
_DIGEST = re.compile(r"\b[0-9a-f]{40,64}\b")


def reasons_section(story: Story) -> Section | None:
    """Say what does not run compiled, why, and what to do."""
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
        element("p", prose(messages[0] if messages else reason["meaning"]))
        if len(messages) < 2
        else element("ul", [element("li", prose(one)) for one in messages[:_MOST_MESSAGES]]),
        element("p", f"and {left} more") if left > 0 else None,
        element("p", element("b", "Where: "), element("code", ", ".join(reason["locations"])))
        if reason["locations"]
        else None,
        element("p", element("b", "What to do: "), prose(reason["remedy"]))
        if reason["remedy"]
        else None,
        class_="reason now" if reason["is_now"] else "reason",
    )


def pieces_section(story: Story) -> Section | None:
    """Draw the model as pieces."""
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
                f"{as_count(story.num_slots, 'place')} {'runs' if story.num_slots == 1 else 'run'} "
                f"{as_count(len(story.pieces), 'different piece')}"
                + (f", in {kinds} kinds of calls" if kinds > 1 else "")
                + ". Equal pieces are compiled once, loaded once, and called with other weights.",
                _rule_in_words(rule) if rule else None,
            ),
            legend(items),
            [_drawn(story, assembly, number) for number, assembly in enumerate(story.assemblies)],
            table(
                ("Piece", "Where", ">Places", "Runs", ">Compiled in", ">Size", ">Off by at most"),
                [_piece_row(piece) for piece in story.pieces.values()],
            ),
        ),
    )


def _rule_in_words(rule: str) -> str:
    if rule.startswith("Whole("):
        return " The model was cut only where it had to be."
    return f" The model was cut by {rule}."


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


def timeline_section(story: Story) -> Section | None:
    """Draw what happened when."""
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
    body = []
    for job in jobs[:_MOST_ROWS]:
        piece = story.piece_of(job)
        cpu, peak = optional(job.get("cpu_seconds")), optional(job.get("peak_bytes"))
        body.append(
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
        table(
            ("Piece", "Name", "Ended with", ">Took", ">CPU time", ">Peak memory", ">Tries"), body
        ),
    )


def speed_section(story: Story) -> Section | None:
    """Show each piece's time, eager and compiled."""
    timed = [(piece, timing) for piece in story.pieces.values() for timing in piece.timing()]
    if not timed:
        return None
    body = []
    for piece, timing in timed:
        bounds = timing.speedup_range
        body.append(
            [
                element("span", swatch(piece), element("span", piece.letter, class_="hidden")),
                timing.sizes or "as they are",
                _with_range(timing.eager_s, timing.eager_range_s),
                _with_range(timing.compiled_s, timing.compiled_range_s),
                join(
                    element("b", f"{timing.speedup:.2f}×"),
                    element("span", f" {times(bounds)}", class_="range") if bounds else None,
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
            table(("Piece", "Sizes", ">Eager", ">Compiled", ">Faster", "Side by side"), body),
        ),
    )


def _whole(story: Story, whole: tuple[Timing, int]) -> Markup:
    timing, count = whole
    bounds = timing.speedup_range
    return element(
        "p",
        "The compiled piece" if count == 1 else f"The {count} compiled pieces",
        f" of one call of {story.assemblies[0].name} ",
        "takes " if count == 1 else "take ",
        element("b", as_duration(timing.compiled_s)),
        "" if count == 1 else " together",
        ", where eager takes ",
        element("b", as_duration(timing.eager_s)),
        f": {timing.speedup:.2f} times as fast",
        f" (95 %: {times(bounds)})" if bounds else " (too few measurements to be sure)",
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


def cache_section(story: Story) -> Section | None:
    """Show what tiers gave, and what was missed and why."""
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
            table(
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
            table(
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


def memory_section(story: Story) -> Section | None:
    """Show what was measured of memory."""
    found = story.memory()
    if not found:
        return None
    return ("memory", "Memory", table(("What", ">Size", "Remark"), found))


def settings_section(story: Story) -> Section | None:
    """Show settings with where each came from."""
    if not story.settings:
        return None
    body = [
        [
            element("code", name),
            _value(mapping(row).get("value")),
            word(mapping(row).get("from"), "?"),
        ]
        for name, row in story.settings.items()
    ]
    given = [row for row in body if row[2] != "default"]
    left = [row for row in body if row[2] == "default"]
    headings = ("Setting", "Value", "From")
    return (
        "settings",
        "Settings",
        join(
            table(headings, given) if given else element("p", "All settings have their defaults."),
            element(
                "details",
                element("summary", as_count(len(left), "setting"), " left at their defaults"),
                table(headings, left),
            )
            if left
            else None,
        ),
    )


def _value(value: Any) -> Markup:
    return element("code", "None" if value is None else str(value))


def events_section(story: Story) -> Section | None:
    """Show all events in order."""
    if not story.events:
        return None
    shown = story.events if len(story.events) <= _MOST_ROWS else (
        story.events[: _MOST_ROWS // 2] + story.events[-_MOST_ROWS // 2 :]
    )  # fmt: skip
    body = [
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
            table((">After", "Event", "What"), body),
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
