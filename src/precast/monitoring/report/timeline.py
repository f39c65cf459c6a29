"""The timeline: what went on when, in lanes. A pause begins a new episode, with a scale of its own.

Positions are shares of the width, so that a drawing fits a phone without its text shrinking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from precast.monitoring.report.markup import Markup, element
from precast.monitoring.report.reading import number, word
from precast.monitoring.report.story import Story
from precast.monitoring.units import as_count, as_duration

_LANE = 42  # Pixels: a label, and its bars below.
_MOST_EPISODES = 6
_MOST_BARS = 1500


class Bar:
    """Something that took time, or (`end_s` None) a moment."""

    def __init__(
        self, lane: str, start_s: float, end_s: float | None, label: str, kind: str
    ) -> None:
        self.lane = lane
        self.start_s = max(0.0, start_s)
        self.is_moment = end_s is None
        self.end_s = self.start_s if end_s is None else max(self.start_s, end_s)
        self.label = label
        self.kind = kind


class Episode:
    """Bars that belong together in time."""

    def __init__(self, bars: Sequence[Bar]) -> None:
        self.bars = list(bars)
        self.start_s = min(bar.start_s for bar in bars)
        self.end_s = max(bar.end_s for bar in bars)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s

    def lanes(self) -> list[str]:
        """Return its lanes from top to bottom."""
        lanes = list(dict.fromkeys(bar.lane for bar in self.bars))
        return sorted(lanes, key=_rank)


_ORDER = ("Start", "Capture", "Waiting", "Worker", "In this process", "Cache", "Second look")


def _rank(lane: str) -> tuple[int, int, str]:
    for place, prefix in enumerate(_ORDER):
        if lane.startswith(prefix):
            digits = lane.rpartition(" ")[2]
            return place, int(digits) if digits.isdigit() else 0, lane
    return len(_ORDER), 0, lane


def find_bars(story: Story) -> list[Bar]:
    """Return everything on the timeline, in order of its beginning."""
    bars: list[Bar] = []
    lanes = _lanes_of_workers(story.events)
    running: dict[int | None, Mapping[str, Any]] = {}
    for event in story.events:
        end_s = number(event.get("at"))
        start_s = end_s - number(event.get("seconds"))
        piece = story.piece_of(event)
        name = word(event.get("piece"), "?")
        label = name if piece is None else f"{piece.letter}  {name}"
        hue = "" if piece is None else f" hue-{piece.hue}"
        match event.get("event"):
            case "ModelReady":
                kind = "warm start" if event.get("warm") else "first start"
                bars.append(Bar("Start", start_s, end_s, kind, "start"))
            case "CaptureFinished":
                nodes = as_count(int(number(event.get("nodes"))), "operation")
                bars.append(Bar("Capture", start_s, end_s, nodes, "capture"))
            case "CaptureFailed":
                bars.append(Bar("Capture", end_s, None, "failed", "trouble"))
            case "LeaseAwaited":
                bars.append(Bar("Waiting", start_s, end_s, "another process", "wait"))
            case "CompileStarted":
                running[_pid(event)] = event
            case "JobFinished":
                pid = _pid(event)
                lane = lanes.get(pid, "Workers")
                running.pop(pid, None)
                failure = word(event.get("code"))
                if failure:
                    bars.append(Bar(lane, start_s, end_s, f"{label}: {failure}", "failed"))
                else:
                    bars.append(Bar(lane, start_s, end_s, label, f"job{hue}"))
            case "PieceCompiled" if _pid(event) not in lanes:
                bars.append(Bar("In this process", start_s, end_s, label, f"job{hue}"))
            case "CacheHit" | "BlobFetched" | "PieceLoaded" | "ArtifactPublished":
                words = {"CacheHit": "read", "BlobFetched": "fetched", "PieceLoaded": "opened"}
                text = words.get(str(event.get("event")), "published")
                text = text if piece is None else f"{piece.letter} {text}"
                kind = "write" if text.endswith("published") else "read"
                bars.append(Bar("Cache", start_s, end_s, text, kind))
            case "AssemblyRevalidated":
                text = "the same" if event.get("is_valid") else "out of date: thrown away"
                kind = "look" if event.get("is_valid") else "failed"
                bars.append(Bar("Second look", start_s, end_s, text, kind))
            case "SlotSwapped":
                bars.append(Bar("Swapped in", end_s, None, f"slot {event.get('slot')}", "swap"))
            case "FellBack" | "PieceFailed" | "AssemblyRejected" | "TierFailed" | "StartBrokenOff":
                bars.append(Bar("Problems", end_s, None, word(event.get("event")), "trouble"))
            case _:
                pass
    now_s = number(story.recording.get("seconds"))
    for pid, event in running.items():
        if pid is not None:
            lane, name = lanes.get(pid, "Workers"), word(event.get("piece"), "?")
            bars.append(Bar(lane, number(event.get("at")), now_s, f"{name}: not ended", "open"))
    return sorted(bars, key=lambda bar: bar.start_s)[:_MOST_BARS]


def _pid(event: Mapping[str, Any]) -> int | None:
    """Return the process that a job ran in, None where it is not known."""
    pid = event.get("worker_pid")
    return pid if isinstance(pid, int) else None


def _lanes_of_workers(events: Iterable[Mapping[str, Any]]) -> dict[int | None, str]:
    """Return the lane of each worker process; one that replaced another takes its lane."""
    spans: dict[int, list[float]] = {}
    for event in events:
        pid = _pid(event)
        if event.get("event") in ("CompileStarted", "JobFinished") and pid is not None:
            at_s = number(event.get("at"))
            span = spans.setdefault(pid, [at_s - number(event.get("seconds")), at_s])
            span[1] = max(span[1], at_s)
    lanes: dict[int | None, str] = {}
    free_s: list[float] = []
    for pid, (start_s, end_s) in sorted(spans.items(), key=lambda item: item[1][0]):
        place = next((i for i, free in enumerate(free_s) if free <= start_s), len(free_s))
        free_s[place:] = [end_s, *free_s[place + 1 :]]
        lanes[pid] = f"Worker {place + 1}"
    return lanes


def find_episodes(bars: Iterable[Bar]) -> list[Episode]:
    """Return bars by episodes: a pause as long as a quarter of what went before ends one."""
    found: list[list[Bar]] = []
    start_s = end_s = 0.0
    for bar in bars:
        if not found or bar.start_s > end_s + max(1.0, (end_s - start_s) / 4):
            found.append([])
            start_s, end_s = bar.start_s, bar.end_s
        found[-1].append(bar)
        end_s = max(end_s, bar.end_s)
    return [Episode(group) for group in found]


def draw_timeline(story: Story) -> Markup | None:
    """Return all episodes drawn; None where nothing happened."""
    episodes = find_episodes(find_bars(story))
    if not episodes:
        return None
    left = len(episodes) - _MOST_EPISODES
    return element(
        "div",
        [_draw(episode, number) for number, episode in enumerate(episodes[:_MOST_EPISODES])],
        element("p", f"{as_count(left, 'later episode')} are in the list of events.", class_="note")
        if left > 0
        else None,
    )


def _draw(episode: Episode, place: int) -> Markup:
    span = max(episode.seconds, 1e-4)
    lanes = episode.lanes()
    top = 0
    marks: list[Markup] = []
    for lane in lanes:
        inside = [bar for bar in episode.bars if bar.lane == lane]
        count = len(inside)
        busy = sum(bar.end_s - bar.start_s for bar in inside)
        note = f"{count} moments" if all(bar.is_moment for bar in inside) else as_duration(busy)
        if count == 1 and inside[0].is_moment:
            note = inside[0].label
        marks.append(element("text", lane, x=0, y=top + 14, class_="lane"))
        marks.append(element("text", note, x="100%", y=top + 14, class_="lane-note"))
        marks.append(element("rect", x=0, y=top + 19, width="100%", height=18, class_="track"))
        marks += [_draw_bar(bar, episode.start_s, span, top + 19) for bar in inside]
        top += _LANE
    marks += _axis(span, top + 4)
    title = (
        f"The first {as_duration(span)}"
        if episode.start_s < 1.0 and not place
        else f"{as_duration(episode.start_s)} after the model was given to Precast: "
        f"{as_duration(span)}"
    )
    return element(
        "figure",
        element("figcaption", title),
        element(
            "svg",
            marks,
            class_="timeline",
            width="100%",
            height=top + 26,
            role="img",
            aria_label=f"{title}. {_in_words(episode)}",
        ),
    )


def _in_words(episode: Episode) -> str:
    parts = []
    for lane in episode.lanes():
        bars = [bar for bar in episode.bars if bar.lane == lane]
        busy = sum(bar.end_s - bar.start_s for bar in bars)
        parts.append(f"{lane}: {len(bars)}, {as_duration(busy)}")
    return "; ".join(parts)


def _draw_bar(bar: Bar, start_s: float, span: float, top: int) -> Markup:
    x = 100 * (bar.start_s - start_s) / span
    width = 100 * (bar.end_s - bar.start_s) / span
    if bar.is_moment:
        return element("circle", cx=f"{x:.3f}%", cy=top + 9, r=4, class_=f"moment {bar.kind}")
    label = f"{bar.label}  {as_duration(bar.end_s - bar.start_s)}"
    # A drawing in a drawing cuts its text off at its own edge. Narrow ones have none.
    return element(
        "svg",
        element("rect", x=0, y=0, width="100%", height=18, rx=2),
        element("text", label, x=6, y=13) if width > 4 else None,
        x=f"{min(x, 99.7):.3f}%",
        y=top,
        width=f"{max(width, 0.3):.3f}%",
        height=18,
        class_=f"bar {bar.kind}",
    )


def _axis(span: float, top: int) -> list[Markup]:
    marks = [element("line", x1=0, x2="100%", y1=top, y2=top, class_="axis")]
    for quarter in range(5):
        x = f"{25 * quarter}%"
        anchor = {0: "start", 4: "end"}.get(quarter, "middle")
        label = as_duration(span * quarter / 4)
        marks.append(element("line", x1=x, x2=x, y1=top, y2=top + 4, class_="axis"))
        marks.append(element("text", label, x=x, y=top + 18, class_="tick", text_anchor=anchor))
    return marks
