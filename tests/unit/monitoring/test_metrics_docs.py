"""docs/metrics.md and the dashboard name what is really measured and exported, and all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from precast import events
from precast.errors import REASON_CODES, Reason
from precast.monitoring.counter import CompilationCounter
from precast.monitoring.metrics import MetricsCollector
from precast.monitoring.prometheus import METRICS, PrometheusCollector

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "metrics.md").read_text()
DASHBOARD = (DOCS / "grafana" / "precast.json").read_text()
REASON = Reason("tier-failed", "m", "r")

#: What Prometheus adds to every series, and `le` of buckets.
FOREIGN_LABELS = {"instance", "job", "le"}


def everything() -> MetricsCollector:
    """Return a collector to which something of each kind has happened."""
    metrics = MetricsCollector()
    row = {"sizes": {}, "compiled_s": 1.0, "eager_s": 2.0}
    for event in (
        events.JobFinished("a", "", "c", None, 9.0, 8.0, 100, 100, 1),
        events.PieceCompiled("a", "k", "c", 9.0, 100, 1),
        events.PieceTimed("a", "k", (row,)),
        events.PieceFailed("b", "", "c", REASON),
        events.CacheHit("k", "redis", 0.1, 100),
        events.TierFailed("redis", "read", REASON),
        events.FellBack("m", "b", REASON),
        events.LeaseAwaited("k", 1.0, "found"),
        events.ModelReady("m", 1.0, 2, 2, 1, 1, 0, 1.0, warm=False),
    ):
        metrics(event)
    metrics.performance._calls["m"] = _watched()
    return metrics


def _watched() -> Any:
    from precast.monitoring.performance import _Calls

    calls = _Calls(lambda: 1.0)
    calls.note(0.001, is_on_device=False)
    return calls


def samples() -> dict[str, set[str]]:
    """Return the labels of each sample that a scrape may have, by its name."""
    suffixes = {
        "counter": {"_total": ()},
        "gauge": {"": ()},
        "histogram": {"_bucket": ("le",), "_sum": (), "_count": ()},
    }
    return {
        metric.name + suffix: {*metric.labels, *more}
        for metric in METRICS
        for suffix, more in suffixes[metric.kind].items()
    }


def expressions() -> list[str]:
    targets = [
        target["expr"]
        for panel in json.loads(DASHBOARD)["panels"]
        for target in panel.get("targets", ())
    ]
    alerts = re.findall(r"expr: (?:>\n)?((?:.*\n)(?:          .*\n)*)", PAGE)
    assert len(targets) > 50
    assert len(alerts) == 2
    return [*targets, *alerts]


def test_what_is_scraped_is_what_is_declared() -> None:
    registry = CollectorRegistry()
    PrometheusCollector(everything()).register(registry)
    scraped: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            scraped.setdefault(sample.name, set()).update(sample.labels)
    declared = samples()
    assert {name: declared[name] for name in scraped} == scraped
    # What a machine without a GPU has not.
    absent = {name for name in declared if name not in scraped}
    assert all("gpu" in name or "device" in name or "stored" in name for name in absent), absent


@pytest.mark.parametrize("expression", expressions())
def test_each_expression_names_metrics_and_labels_that_there_are(expression: str) -> None:
    known = samples()
    names = re.findall(r"\bprecast_\w+", expression)
    assert names
    assert [name for name in names if name not in known] == []
    labels = set().union(*(known[name] for name in names)) | FOREIGN_LABELS
    for name, matchers in re.findall(r"\b(precast_\w+)\{([^}]*)\}", expression):
        matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert matched <= known[name] | FOREIGN_LABELS, matchers
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        assert set(re.split(r",\s*", grouped)) <= labels, grouped
    assert expression.count("(") == expression.count(")")
    quantiles = re.findall(r"histogram_quantile\(", expression)
    assert len(quantiles) == len(re.findall(r"precast_\w+_bucket", expression))


def test_the_dashboard_shows_every_metric() -> None:
    shown = set(re.findall(r"\bprecast_\w+", DASHBOARD))
    for metric in METRICS:
        assert any(name.startswith(metric.name) for name in shown), metric.name


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """
    Panels that lie over each other, or share an id, are shown wrong.
    """
    dashboard = json.loads(DASHBOARD)
    assert dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not taken & cells, panel["title"]
        cells |= taken
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD)) - {"__rate_interval", "__all"}
    assert used == variables
    queries = [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    for metric, label in re.findall(r"label_values\((\w+), (\w+)\)", " ".join(queries)):
        assert label in samples()[metric]


def rows() -> list[tuple[str, str, str]]:
    table = PAGE.partition("| in `snapshot()` |")[2].partition("\n\n")[0]
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ?([^|]*) ?\|$", table, re.MULTILINE)
    return [row for row in found if row[0] != "---"]


def reached(tree: Any, path: str) -> Iterator[Any]:
    """Iterate over what a path leads to; `*` is each name."""
    step, _, rest = path.partition(".")
    for name in list(tree) if step == "*" else [step]:
        assert name in tree, f"{path}: no {name!r} in {list(tree)}"
        yield from reached(tree[name], rest) if rest else [tree[name]]


def test_each_figure_is_in_a_snapshot() -> None:
    snapshot = everything().snapshot()
    snapshot["pieces"] = {n: p for n, p in snapshot["pieces"].items() if "timing" in p}
    assert len(rows()) > 30
    for what, paths, _ in rows():
        found = re.findall(r"`([\w.*]+)`", paths)
        assert found, what
        for path in found:
            assert list(reached(snapshot, path)), (what, path)


def test_each_figure_of_a_snapshot_is_explained() -> None:
    stated = {path for _, paths, _ in rows() for path in re.findall(r"`([\w.*]+)`", paths)}

    def leaves(tree: Any, path: str = "") -> Iterator[str]:
        """Down to what a row explains as a whole: a distribution, or a mapping by free names."""
        if path in stated or any(s.startswith(f"{path}.*") and s != path for s in stated):
            return
        if isinstance(tree, dict) and tree and not path.endswith("seconds"):
            for name, below in tree.items():
                yield from leaves(below, f"{path}.{name}".lstrip("."))
        else:
            yield path

    assert list(leaves(everything().snapshot())) == []


def test_the_page_names_the_metrics_that_there_are_and_all_of_them() -> None:
    known = {metric.name for metric in METRICS} | set(samples())
    named = set(re.findall(r"\bprecast_\w+", PAGE))
    assert named <= known, named - known
    in_rows = set(re.findall(r"\bprecast_\w+", " ".join(row[2] for row in rows())))
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        assert metric.name + suffix in in_rows, metric.name


def test_codes_of_alerts_are_codes() -> None:
    for pattern in re.findall(r'code=~"([^"]+)"', PAGE + DASHBOARD):
        for part in pattern.split("|"):
            assert any(re.fullmatch(part, code) for code in REASON_CODES), part


def test_events_are_the_counters() -> None:
    (metric,) = (metric for metric in METRICS if metric.labels == ("event",))
    found = {labels[0] for labels, _ in metric.rows(MetricsCollector().snapshot())}
    assert found == {name.removeprefix("num_") for name in CompilationCounter().snapshot()}


def test_spans_are_those_of_the_listener() -> None:
    source = (DOCS.parent / "src/precast/monitoring/opentelemetry.py").read_text()
    spans = set(re.findall(r'"(precast\.\w+)"(?!:)', source))  # With a colon: an attribute.
    table = PAGE.partition("| span | what |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(precast\.\w+)`", table)) == spans
