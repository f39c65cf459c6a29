"""How large the report of a deep model is, how fast a browser opens it, what recording costs.

    python benchmarks/report.py                       # 80 layers, compiled (a minute), in Chromium
    python benchmarks/report.py --compiler eager      # without compiling; the page has no C++ then
    python benchmarks/report.py --keep report.html    # and keep the page

The page is opened in fresh tabs of one headless Chromium, from the disk: until it is painted first,
and until it is loaded whole. Without Chromium that is left out. Every other figure is a median too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decoder import Shape, build_decoder, decoder_inputs

import precast
from precast.events import CacheHit
from precast.monitoring.recorder import Recorder
from precast.monitoring.recording import read_recording
from precast.monitoring.report import render

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from chromium import INSTALL, Chromium, find_chromium

_TIMES = """(() => {
  const whole = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return {painted_ms: paint ? paint.startTime : null, loaded_ms: whole.loadEventEnd};
})()"""


def median_s(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def time_browser(page: Path, repeats: int) -> dict[str, float | None]:
    """Return how long a page takes to be painted first and to be loaded, in milliseconds."""
    found: dict[str, list[float]] = {"painted_ms": [], "loaded_ms": []}
    with Chromium() as browser:
        for _ in range(repeats + 1):
            with browser.open(page) as tab:
                deadline = time.monotonic() + 5
                times = tab.evaluate(_TIMES)
                while times["painted_ms"] is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                    times = tab.evaluate(_TIMES)
                for name, milliseconds in times.items():
                    if milliseconds is not None:
                        found[name].append(milliseconds)
    # The first tab waits for the browser to start.
    return {
        name: statistics.median(times[1:]) if times[1:] else None for name, times in found.items()
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = Shape(layers=options.layers)
    model = build_decoder(shape)
    inputs = decoder_inputs(shape, 16)
    precast.compile(model, compiler=options.compiler, cache_dir=folder / "cache", progress=False)
    with torch.inference_mode():
        model(*inputs)
    status = precast.status(model)
    page = Path(options.keep or folder / "report.html")
    precast.save_report(model, folder / "start.json")
    precast.save_report(model, page)
    recording = read_recording(folder / "start.json")
    recorder, event = Recorder(), CacheHit("key", "disk", 0.001, 1000)
    return {
        "layers": options.layers,
        "pieces": len(status["assemblies"][0]["pieces"]),
        "unique_pieces": status["assemblies"][0]["unique_pieces"],
        "json_bytes": (folder / "start.json").stat().st_size,
        "page_bytes": page.stat().st_size,
        "compressed_bytes": len(zlib.compress(page.read_bytes())),
        "save_ms": median_s(lambda: precast.save_report(model, folder / "a.json"), 9) * 1e3,
        "render_ms": median_s(lambda: render(recording), 9) * 1e3,
        "event_us": median_s(lambda: [recorder(event) for _ in range(1000)], 9) * 1e3,
        **({} if find_chromium() is None else time_browser(page, options.repeats)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--compiler", default="auto")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--keep", metavar="FILE", help="where to leave the page")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="precast-report-") as scratch:
        found = measure(options, Path(scratch))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['layers']} layers: {found['pieces']} pieces, {found['unique_pieces']} different")
    print(f"recording  {found['json_bytes'] / 1e3:6.0f} kB, saved in {found['save_ms']:.0f} ms")
    print(
        f"page       {found['page_bytes'] / 1e3:6.0f} kB ({found['compressed_bytes'] / 1e3:.0f} kB "
        f"compressed), made in {found['render_ms']:.0f} ms"
    )
    if "loaded_ms" in found:
        painted, loaded = found["painted_ms"] or float("nan"), found["loaded_ms"]
        print(f"Chromium   painted after {painted:.0f} ms, loaded after {loaded:.0f} ms")
    else:
        print(f"Chromium   not there; as root: {INSTALL}")
    print(f"an event   {found['event_us']:.2f} us")


if __name__ == "__main__":
    main()
