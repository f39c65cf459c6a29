"""Reports of real models, in a real browser; recordings of real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import precast
from chromium import Chromium, Page
from precast.api import torch_backend
from precast.errors import ConfigError, RecordingError
from precast.monitoring.recording import read_recording
from precast.monitoring.report import Story, write_report
from recordings import recording

HOSTILE = "<script>alert(document.domain)</script><img src=//example.com/x onerror=alert(1)>"


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + x


class Tower(torch.nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.nn.Module]:
    """A model that serves, cut at its layers and run eager: nothing has to be compiled."""
    folder = tmp_path_factory.mktemp("cache")
    tower = precast.compile(
        Tower(6).eval(), compiler="eager", cache_dir=folder, split="layers", progress=False
    )
    with torch.inference_mode():
        tower(torch.ones(3, 8))
    yield tower
    precast.release(tower)


def test_a_report_needs_no_planning(model: torch.nn.Module, tmp_path: Path) -> None:
    """
    The page is made of the recording alone: from both it is the same, but for the time that passed.
    """
    made = precast.save_report(model, tmp_path / "start.json")
    assert made == {
        "path": str(tmp_path / "start.json"),
        "bytes": (tmp_path / "start.json").stat().st_size,
    }
    story = Story(read_recording(tmp_path / "start.json"))
    assert story.verdict().startswith("Tower runs as 6 pieces of eager code, as the settings ask")
    assert len(story.pieces) == 1
    (piece,) = story.pieces.values()
    assert "def piece(a0" in piece.data["text"]
    assert [slot["name"] for slot in piece.slots] == [f"layers.{n}" for n in range(6)]
    assert [event["event"] for event in story.events][-1] == "ModelReady"
    assert story.model["weights"]["num_tensors"] == 12
    precast.save_report(model, tmp_path / "start.html")
    write_report(tmp_path / "again.html", read_recording(tmp_path / "start.json"))
    pages = [(tmp_path / name).read_text() for name in ("start.html", "again.html")]
    first, second = (page.partition("This process, now")[0] for page in pages)
    assert first == second


def test_what_cannot_be_reported_is_said_in_words(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.html or \.json"):
        precast.save_report(model, tmp_path / "report.pdf")
    with pytest.raises(ConfigError, match="a model that Precast serves"):
        precast.save_report(torch.nn.Linear(2, 2), tmp_path / "a.html")
    with pytest.raises(RecordingError, match="No such file"):
        precast.save_report(model, tmp_path / "none" / "a.html")


# -- recordings of processes ---------------------------------------------------------

SERVER = """
    import sys, time
    import torch, precast
    class Gate(torch.nn.Module):
        def forward(self, x):
            return (x * 2).relu()
    model = precast.compile(Gate(), compiler="eager", progress=False, **{settings})
    with torch.inference_mode():
        model(torch.ones(4))
    {then}
"""


def start(folder: Path, then: str = "", settings: str = "{}", **environment: str) -> Any:
    """Start a program that compiles a model and then does something."""
    program = textwrap.dedent(SERVER).format(settings=settings, then=then)
    path = folder / "server.py"
    path.write_text(program)
    return subprocess.Popen(
        [sys.executable, str(path)],
        env={
            **os.environ,
            "PRECAST_CACHE_DIR": str(folder / "cache"),
            "PRECAST_RECORD": str(folder / "recordings"),
            **environment,
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_recording(folder: Path) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list(folder.glob("recordings/*.json"))
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("no recording was written")


def test_each_process_leaves_a_recording_even_when_it_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "time.sleep(300)")
    try:
        path = wait_for_recording(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    found = read_recording(path)
    assert found["process"]["pid"] == process.pid
    assert found["events"][-1]["event"] == "ModelReady"
    assert found["model"]["settings"]["record"] == {
        "value": str(tmp_path / "recordings"),
        "from": "environment PRECAST_RECORD",
    }

    # The next process starts warm, releases, and ends: its recording has all of it.
    process = start(tmp_path, "precast.release(model)")
    assert process.wait(120) == 0, process.stderr.read()
    process.communicate()
    first, second = sorted(tmp_path.glob("recordings/*.json"), key=lambda p: p.stat().st_mtime)
    assert first == path
    found = read_recording(second)
    assert found["events"][-1]["event"] == "ModelReleased"
    assert Story(found).is_warm
    assert Story(found).num_slots == 1  # As it was before it was released.


def test_a_start_through_torch_compile_leaves_its_events(tmp_path: Path) -> None:
    """
    There is no model to ask: Dynamo has it. What happened is recorded all the same.
    """
    options = {"record": str(tmp_path / "recordings"), "compiler": "eager"}
    traced = torch.compile(Layer().eval(), backend=torch_backend, options=options)
    with torch.inference_mode():
        traced(torch.ones(3, 8))
    story = Story(read_recording(wait_for_recording(tmp_path)))
    verdict = "torch.compile is traced at every start and runs as 1 piece; its first start took "
    assert story.verdict().startswith(verdict)
    torch._dynamo.reset()


# -- in the browser --------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a real model, of one with 80 layers, and of one that attacks."""
    folder = tmp_path_factory.mktemp("pages")
    precast.save_report(model, folder / "real.html")
    write_report(folder / "layers.html", recording(num_layers=80))
    text = json.dumps(recording(name=HOSTILE)).replace("attention", f"attention{HOSTILE}")
    write_report(folder / "hostile.html", json.loads(text))
    return {path.stem: path for path in folder.iterdir()}


_CONTRAST = """(selector) => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let place = document.querySelector(selector);
  const ink = light(getComputedStyle(place).color);
  let behind = "rgba(0, 0, 0, 0)";
  while (place && /, 0\\)$/.test(behind)) {
    behind = getComputedStyle(place).backgroundColor;
    place = place.parentElement;
  }
  const paper = light(behind);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}"""
_OUTSIDE = """[...document.querySelectorAll("body *")].filter((one) =>
  !one.closest("pre, .table, .skip, .hidden, thead, svg svg")
  && one.getBoundingClientRect().right > innerWidth + 1
).map((one) => one.outerHTML.slice(0, 200))"""


def contrast(page: Page, selector: str) -> float:
    """Return by how much an element's text stands out from what is behind it (WCAG)."""
    found: float = page.evaluate(f"({_CONTRAST})({json.dumps(selector)})")
    return found


@pytest.mark.browser
@pytest.mark.parametrize("name", ["real", "layers", "hostile"])
@pytest.mark.parametrize(("width", "is_dark"), [(1100, False), (1100, True), (390, False)])
def test_it_loads_nothing_complains_of_nothing_and_fits(
    browser: Chromium, pages: dict[str, Path], name: str, width: int, is_dark: bool
) -> None:
    with browser.open(pages[name], width=width, is_dark=is_dark) as page:
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.requests() == [pages[name].as_uri()]
        assert page.complaints() == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(_OUTSIDE) == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 300) is is_dark
        for selector in ("p", "h1", ".note", ".facts", "nav a", "th", "td", "pre code", "summary"):
            if width > 600 or selector != "th":
                assert contrast(page, selector) >= 4.5, selector


@pytest.mark.browser
def test_what_is_hostile_is_text(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open(pages["hostile"]) as page:
        assert page.evaluate("document.querySelector('h1').textContent") == HOSTILE
        assert page.evaluate("document.querySelectorAll('script, img').length") == 1
        assert page.evaluate("document.title").startswith(HOSTILE[:20])


@pytest.mark.browser
def test_the_policy_holds_even_where_markup_got_in(browser: Chromium, tmp_path: Path) -> None:
    """
    The second line: the page with an attack put into it by hand runs none of it, asks for nothing.
    """
    path = tmp_path / "page.html"
    write_report(path, recording())
    attack = (
        "<script>window.hit = 1</script>"
        "<img src='https://example.com/a.png' onerror='window.hit=1'>"
        "<link rel=stylesheet href='https://example.com/a.css'>"
    )
    path.write_text(path.read_text().replace("<main", f"{attack}<main"))
    with browser.open(path) as page:
        assert page.evaluate("window.hit") is None
        refused = "\n".join(page.complaints())
        assert refused.count("Content Security Policy") >= 3


@pytest.mark.browser
def test_it_can_be_used_by_keyboard(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open(pages["layers"]) as page:
        page.key("Tab", 9)
        assert page.evaluate("document.activeElement.textContent") == "To the report"
        page.evaluate("document.querySelector('summary').focus()")
        assert page.evaluate("document.activeElement.parentElement.open") is False
        page.key("Enter", 13, "\r")
        assert page.evaluate("document.activeElement.parentElement.open") is True
        unreachable = page.evaluate(
            "[...document.querySelectorAll('main a:not(.slots a), main button, summary, pre')]"
            ".filter((one) => one.tabIndex < 0).length"
        )
        assert unreachable == 0


@pytest.mark.browser
def test_the_button_opens_and_closes_all(browser: Chromium, pages: dict[str, Path]) -> None:
    count = "document.querySelectorAll('#report details[open]').length"
    with browser.open(pages["real"]) as page:
        assert page.evaluate(count) == 0
        page.evaluate("document.getElementById('open-all').click()")
        total = page.evaluate("document.querySelectorAll('#report details').length")
        assert page.evaluate(count) == total > 0
        page.evaluate("document.getElementById('open-all').click()")
        assert page.evaluate(count) == 0


@pytest.mark.browser
@pytest.mark.parametrize("place", [".slots a[href='#piece-B']", "td a[href='#piece-B']"])
def test_a_letter_leads_to_its_code(browser: Chromium, pages: dict[str, Path], place: str) -> None:
    with browser.open(pages["layers"]) as page:
        page.click(place)
        assert page.evaluate("location.hash") == "#piece-B"
        target = page.evaluate("document.querySelector(':target').textContent")
        assert "layers.0 … layers.79" in target


@pytest.mark.browser
def test_it_prints(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open(pages["layers"], is_dark=True) as page:
        assert page.pdf().startswith(b"%PDF-")
        page.send("Emulation.setEmulatedMedia", media="print")
        # On paper, whatever the screen is: dark on white, and no navigation.
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


@pytest.mark.browser
def test_without_script_all_of_it_is_there(browser: Chromium, pages: dict[str, Path]) -> None:
    path = pages["layers"].with_name("no-script.html")
    before, _, _ = pages["layers"].read_text().rpartition("<script>")
    path.write_text(f"{before}</body></html>")
    with browser.open(path) as page:
        assert page.complaints() == []
        assert "def execution_fn" in page.evaluate("document.body.textContent")
        assert page.evaluate("document.getElementById('open-all').hidden") is True


# -- what a compiler generated ----------------------------------------------------------


@pytest.mark.compile
def test_compiled_source_and_confidence_are_in_the_report(tmp_path: Path) -> None:
    recorded = precast.compile(
        Layer().eval(), cache_dir=tmp_path / "cache", compile_threads=1, progress=False
    )
    with torch.inference_mode():
        recorded(torch.ones(3, 8))
    precast.save_report(recorded, tmp_path / "start.json")
    precast.release(recorded)
    story = Story(read_recording(tmp_path / "start.json"))
    (piece,) = story.pieces.values()
    assert story.tone == "good", story.verdict()
    assert 'extern "C"' in piece.data["source"]["kernels.cpp"]
    assert "run_impl" in piece.data["source"]["wrapper.cpp"]
    assert str(tmp_path) not in json.dumps(piece.data["source"])
    assert len(json.dumps(piece.data["source"])) < 100_000
    assert piece.data["parts"]["kind"] == "piece"
    timing = piece.timing()[0]
    assert timing.is_known
    if timing.num_turns > 5:
        low, high = timing.compiled_range_s or (0.0, 0.0)
        assert 0 < low <= timing.compiled_s <= high
    (job,) = story.of_kind("JobFinished")
    assert isinstance(job["worker_pid"], int)
    assert job["worker_pid"] == story.of_kind("CompileStarted")[-1]["worker_pid"]
