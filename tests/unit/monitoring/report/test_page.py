"""The page shows what a recording holds, and none of it becomes part of the page's structure."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import pytest

from precast.monitoring.report import render
from precast.monitoring.report.markup import Markup, element, join, text
from recordings import piece, recording

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;</style></title>\x00\u2028"


class Structure(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def with_every_text(data: Any, word: str) -> Any:
    """Return data with a word behind each of its texts, keys of free mappings included."""
    if isinstance(data, str):
        return data + word
    if isinstance(data, list):
        return [with_every_text(item, word) for item in data]
    if isinstance(data, dict):
        return {name: with_every_text(item, word) for name, item in data.items()}
    return data


def hostile() -> dict[str, Any]:
    data = recording()
    names = ("model", "event", "kind", "format")
    model = data["model"]
    pieces = model.pop("pieces")
    data["events"] = [
        {n: v if n in names else with_every_text(v, HOSTILE) for n, v in event.items()}
        for event in data["events"]
    ]
    data["process"] = with_every_text(data["process"], HOSTILE)
    data["model"] = with_every_text(model, HOSTILE)
    data["model"]["settings"][HOSTILE] = {"value": HOSTILE, "from": HOSTILE}
    data["model"]["pieces"] = {
        key + HOSTILE: with_every_text(piece, HOSTILE) for key, piece in pieces.items()
    }
    data["model"]["pieces"][next(iter(data["model"]["pieces"]))]["source"][HOSTILE] = HOSTILE
    return data


def test_nothing_that_a_recording_holds_becomes_structure() -> None:
    plain, attacked = Structure(render(recording())), Structure(render(hostile()))
    assert attacked.tags.count("script") == 1
    assert "img" not in attacked.tags
    assert set(attacked.tags) == set(plain.tags)
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]
    assert attacked.open == plain.open == []


def test_what_was_hostile_is_shown_as_it_is() -> None:
    page = render(hostile())
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x00" not in page


def test_the_policy_forbids_everything_but_the_pages_own_style_and_script() -> None:
    page = render(recording())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "default-src &#x27;none&#x27;" in policy[1]
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content is not None
        digest = b64encode(sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src &#x27;sha256-{digest}&#x27;" in policy[1]


def test_the_page_names_no_other_place() -> None:
    places = [
        value
        for name, value in Structure(render(recording())).attributes
        if name in ("href", "src", "action", "data", "srcset")
    ]
    assert {value[0] for value in places if value} == {"#", "d"}  # Anchors and `data:,`.
    assert "url(" not in render(recording())
    assert "@import" not in render(recording())


def test_every_anchor_leads_somewhere() -> None:
    found = Structure(render(recording())).attributes
    targets = [value for name, value in found if name == "id"]
    assert len(targets) == len(set(targets))
    for name, value in found:
        if name == "href" and value and value.startswith("#"):
            assert value[1:] in targets


def test_what_the_page_must_say_is_there() -> None:
    page = render(recording())
    for expected in (
        "5 of 6 pieces of Decoder run compiled",
        "compile-timeout",
        "model.py:12",
        "Raise <code>max_compile_time</code> (now 4) to wait longer.",
        "torch.ops.mylib.attention",
        "void kernel_1()",
        "environment PRECAST_MAX_COMPILE_TIME",
        "torch: was &#x27;a&#x27;, is &#x27;b&#x27;",
        "SomethingOfALaterVersion",
        "Worker 2",
    ):
        assert expected in page, expected


def test_a_model_of_one_piece_is_spoken_of_as_one() -> None:
    data = recording()
    model = data["model"]
    model["assemblies"][0]["slots"] = model["assemblies"][0]["slots"][:1]
    model["pieces"] = dict(list(model["pieces"].items())[:1])
    data["events"].append({"at": 1.6, "event": "PlanMade", "model": "Decoder", "split": "Whole()"})
    page = render(data)
    assert "1 place runs 1 different piece." in page
    assert "The model was cut only where it had to be." in page
    assert re.search(r"The compiled piece of one call of Decoder takes <b>[^<]*</b>, where", page)


def test_a_recording_of_events_alone_has_a_page() -> None:
    page = render({**recording(), "model": None})
    assert "What happened when" in page
    assert "Decoder" in page


@pytest.mark.parametrize("opened_at", [-1e17, -1, 1e17, 10**30, float("nan"), "never"])
def test_a_moment_that_no_calendar_has_is_no_obstacle(opened_at: Any) -> None:
    assert "<main" in render({**recording(), "opened_at": opened_at})


def test_markup_escapes_what_is_no_markup() -> None:
    assert element("a", "<b>", Markup("<i/>"), None, ["x", 3], href='"', class_=None) == (
        '<a href="&quot;">&lt;b&gt;<i/>x3</a>'
    )
    assert element("p", data_label="a", hidden=True) == '<p data-label="a" hidden></p>'
    assert join("<", text("&")) == "&lt;&amp;"
    assert text("a\ud800\x07") == "a\ufffd\ufffd"


@pytest.mark.parametrize("layers", [1, 80])
def test_the_page_is_small(layers: int) -> None:
    assert len(render(recording(num_layers=layers))) < 200_000


def test_the_page_stays_small_whatever_was_generated() -> None:
    """
    A model of many large pieces: what does not fit is named, and is in the recording.
    """
    data = recording()
    template = data["model"]["assemblies"][0]["slots"][0]
    slots = [{**template, "place": place, "piece": f"piece {place}"} for place in range(80)]
    data["model"]["assemblies"][0]["slots"] = slots
    data["model"]["pieces"] = {
        slot["piece"]: {**piece(0), "source": {"kernels.cpp": "a < b && c;\n" * 20_000}}
        for slot in slots
    }
    page = render(data)
    assert 1_000_000 < len(page.encode()) < 3_000_000
    assert "more characters are in the recording, not here" in page
    assert page.count("def piece(a0)") >= 5


def test_parts_of_a_key_in_parts_are_named_by_their_places() -> None:
    data = recording()
    data["model"]["assemblies"][0]["parts"] = {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}
    assert "a.b.c.d.e" in render(data)
