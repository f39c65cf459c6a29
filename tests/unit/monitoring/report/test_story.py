"""What is said of a recording: the verdict, the pieces, the reasons; whatever it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast import events
from precast.monitoring import report
from precast.monitoring.report import Story, render
from precast.monitoring.report.drawing import in_words
from precast.monitoring.report.story import Timing, _letter
from precast.monitoring.report.timeline import find_bars, find_episodes
from recordings import KEYS, REASON, recording, timing


def compiled(data: dict[str, Any]) -> dict[str, Any]:
    """Return a recording all of whose pieces run compiled."""
    for slot in data["model"]["assemblies"][0]["slots"]:
        slot.update(compiler="aot_inductor", reason=None)
    data["events"] = [
        event for event in data["events"] if not event.get("reason") and not event.get("code")
    ]
    return data


def test_the_verdict_says_what_runs_what_does_not_and_what_it_took() -> None:
    assert Story(recording()).verdict() == (
        "5 of 6 pieces of Decoder run compiled and 1 stays eager (compile-timeout); "
        "its first start took 21.0 s with 19.0 s of compiling in workers."
    )
    assert Story(compiled(recording(is_warm=True))).verdict() == (
        "All 6 pieces of Decoder run compiled; it started from the cache in 40.0 ms and spared "
        "19.0 s of compiling."
    )


def test_the_verdict_of_a_model_that_could_not_be_captured() -> None:
    data = recording()
    reason = {"code": "capture-failed", "message": "a branch", "remedy": "", "location": None}
    data["model"] |= {"assemblies": [], "pieces": {}, "reasons": [reason], "start_seconds": None}
    data["events"] = []
    story = Story(data)
    assert story.tone == "eager"
    assert story.verdict() == (
        "Decoder runs eager: no graph could be captured for the model or a part of it "
        "(capture-failed)."
    )


def test_eager_by_setting_is_no_failure() -> None:
    data = recording()
    data["model"]["settings"]["compiler"] = {"value": "eager", "from": "argument"}
    for slot in data["model"]["assemblies"][0]["slots"]:
        slot.update(compiler="eager", reason=None)
    data["events"] = []
    assert "as the settings ask" in Story(data).verdict()


def test_a_model_that_is_being_compiled_says_so() -> None:
    data = recording()
    slot = data["model"]["assemblies"][0]["slots"][-1]
    slot["reason"] = {**REASON, "code": "compile-pending"}
    story = Story(data)
    assert story.tone == "working"
    assert "5 of 6 pieces are in place" in story.verdict()


def test_a_model_that_is_still_captured_says_so() -> None:
    data = recording()
    data["model"] |= {"assemblies": [], "start_seconds": None}
    data["model"]["behind"] = {"doing": "capturing", "waiting": 0}
    data["events"] = []
    assert Story(data).verdict() == ("Decoder is being captured while it serves: calls run eager.")


def test_a_model_whose_guards_dynamo_keeps_is_not_called_eager() -> None:
    data = recording()
    reason = {"code": "trace-on-start", "message": "an object", "remedy": "keep it out"}
    data["model"] |= {"assemblies": [], "start_seconds": None, "reasons": [reason]}
    plan = {"at": 1.6, "event": "PlanMade", "model": "Decoder", "pieces": 6, "unique_pieces": 3}
    data["events"] = [plan, *(e for e in data["events"] if e["event"] != "ModelReady")]
    assert Story(data).verdict() == (
        "Decoder is traced at every start and runs as 6 pieces: 2 compiled here, 1 that failed."
    )
    assert [found["code"] for found in Story(data).reasons] == ["trace-on-start", "compile-timeout"]


def test_events_alone_say_what_runs() -> None:
    data = recording(is_warm=True)
    data["model"] = None
    data["events"][-2] |= {"pieces": 6, "compiled": 6, "unique_pieces": 3}
    story = Story(data)
    assert story.num_unique == 3
    assert story.verdict() == (
        "All 6 pieces of Decoder run compiled; it started from the cache in 40.0 ms and spared "
        "19.0 s of compiling."
    )


def test_equal_pieces_have_one_letter_and_appear_once() -> None:
    story = Story(recording(num_layers=80))
    assert [piece.letter for piece in story.pieces.values()] == ["A", "B", "C"]
    assert in_words(story.assemblies[0], story.pieces) == "A · B × 80 · C"
    page = render(recording(num_layers=80))
    assert page.count("def piece(a0):\n    v1 = ") == 1
    assert page.count('class="slot hue-1"') == 80 + 4  # Places, tables, its code.


def test_groups_of_pieces_that_repeat_are_folded() -> None:
    data = recording(num_layers=1)
    template = data["model"]["assemblies"][0]["slots"][0]
    order = [0, 1, 2, 1, 2, 1, 2, 0]
    data["model"]["assemblies"][0]["slots"] = [
        {**template, "place": place, "piece": KEYS[kind]} for place, kind in enumerate(order)
    ]
    story = Story(data)
    assert in_words(story.assemblies[0], story.pieces) == "A · (B C) × 3 · A"


def test_native_operators_are_where_the_execution_code_has_them() -> None:
    story = Story(recording(num_layers=2))
    assert story.assemblies[0].natives == {
        4: ["torch.ops.mylib.attention"],
        6: ["torch.ops.mylib.attention"],
    }


def test_a_reason_appears_once_with_all_that_it_is_about() -> None:
    (reason,) = Story(recording()).reasons
    assert reason["code"] == "compile-timeout"
    assert reason["is_now"]
    assert reason["what"] == ["piece C"]
    assert reason["locations"] == ["model.py:12"]


def test_what_went_wrong_and_was_dealt_with_is_told_apart() -> None:
    data = compiled(recording())
    data["events"].append({"at": 3.0, "event": "TierFailed", "tier": "redis", "reason": REASON})
    (reason,) = Story(data).reasons
    assert not reason["is_now"]
    assert reason["what"] == ["tier redis"]


def test_the_whole_call_adds_up_pieces_and_their_ranges() -> None:
    whole, count = Story(recording()).whole_timing() or (None, 0)
    assert whole is not None
    assert count == 5
    assert whole.compiled_s == pytest.approx(5e-4)
    assert whole.speedup == pytest.approx(2.0)
    assert whole.speedup_range == pytest.approx((0.9 / 1.1 * 2, 1.1 / 0.9 * 2))


def test_without_ranges_there_is_no_confidence() -> None:
    row = timing()
    del row["eager_range_s"]
    assert Timing(row).speedup_range is None
    assert Timing({**timing(), "compiled_range_s": ["a", 3]}).compiled_range_s is None


def test_misses_and_tiers_are_counted() -> None:
    cold, warm = Story(recording()), Story(recording(is_warm=True))
    assert [miss["cause"] for miss in cold.misses()] == ["torch"]
    assert warm.misses() == []
    (tier,) = warm.tiers()
    assert (tier["tier"], tier["hits"]) == ("disk", 1)


def test_what_a_shared_tier_gave_counts_with_what_was_found_there() -> None:
    data = recording(is_warm=True)
    fetched = {"event": "BlobFetched", "tier": "redis", "num_bytes": 1000, "seconds": 0.1}
    found = {"event": "CacheHit", "tier": "redis", "num_bytes": 10, "seconds": 0.1}
    data["events"] += [{"at": 1.0, **fetched}, {"at": 1.1, **found}]
    tier = next(row for row in Story(data).tiers() if row["tier"] == "redis")
    assert (tier["hits"], tier["hit_bytes"]) == (1, 1010)


def test_events_that_the_page_knows_are_events() -> None:
    """
    They are read by name, since a recording may be of another version: a new name shall be noticed.
    """
    folder = Path(report.__file__).parent
    kinds = {kind.__name__ for kind in events.Event.__subclasses__()}
    for name in ("story.py", "timeline.py", "sections.py"):
        named = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][a-z]+)+)"', (folder / name).read_text()))
        assert named - kinds == set()
        assert named


def test_workers_have_lanes_and_one_that_replaced_another_takes_its_lane() -> None:
    bars = find_bars(Story(recording()))
    lanes = {bar.label.split()[-1]: bar.lane for bar in bars if bar.lane.startswith("Worker")}
    assert lanes == {"embed": "Worker 1", "layers.0": "Worker 2", "compile-timeout": "Worker 1"}


def test_a_job_of_two_pieces_with_one_name_is_known_by_its_key() -> None:
    data = recording()
    for slot in data["model"]["assemblies"][0]["slots"]:
        slot["name"] = "layers.0"
    for event in data["events"]:
        if event.get("piece"):
            event["piece"] = "layers.0"
    story = Story(data)
    jobs = [story.piece_of(event) for event in story.of_kind("JobFinished")]
    assert [piece and piece.letter for piece in jobs] == ["A", "B", None]


def test_a_job_that_has_not_ended_is_open() -> None:
    data = recording()
    data["events"] = [event for event in data["events"] if event["event"] != "JobFinished"]
    bars = [bar for bar in find_bars(Story(data)) if bar.kind == "open"]
    assert {bar.end_s for bar in bars} == {30.0}
    assert len(bars) == 3


def test_a_pause_begins_a_new_episode() -> None:
    data = recording()
    look = {"event": "AssemblyRevalidated", "is_valid": True, "seconds": 0.5}
    data["events"].append({"at": 3600.0, **look})
    episodes = find_episodes(find_bars(Story(data)))
    assert [round(episode.seconds) for episode in episodes] == [21, 0]
    assert episodes[1].start_s == 3599.5


def test_letters_go_on_after_z() -> None:
    assert [_letter(count) for count in (0, 25, 26, 27, 26 + 26 * 26)] == [
        "A",
        "Z",
        "AA",
        "AB",
        "AAA",
    ]


def test_the_summary_for_programs_is_json() -> None:
    found = json.loads(json.dumps(Story(recording()).summary()))
    assert found["pieces"] == 6
    assert found["compiled"] == 5
    assert found["reasons"][0]["code"] == "compile-timeout"


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
FLAT = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=4), LEAVES)
ANYTHING = FLAT | st.lists(FLAT, max_size=3) | st.dictionaries(st.text(max_size=4), FLAT)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_a_recording_holds_there_is_a_page(data: st.DataObject) -> None:
    """
    Recordings come from other versions and other hands: any value of one may be anything.
    """
    found = recording(num_layers=2)
    for _ in range(data.draw(st.integers(1, 4))):
        place: Any = found
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            inner = place[key]
            if not (isinstance(inner, dict | list) and inner) or data.draw(st.integers(0, 5)) == 0:
                place[key] = data.draw(ANYTHING)
                break
            place = inner
    page = render(found)
    assert page.startswith("<!doctype html>")
    json.dumps(Story(found).summary())
