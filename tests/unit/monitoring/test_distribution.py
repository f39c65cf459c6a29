from __future__ import annotations

from precast.monitoring.distribution import Distribution, percentile


def test_buckets_are_cumulative_and_bounds_inclusive() -> None:
    seconds = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        seconds.add(value)
    found = seconds.snapshot()
    assert found["buckets"] == [[1.0, 2], [2.0, 3], [None, 4]]
    assert (found["count"], found["sum"], found["most"], found["mean"]) == (4, 12.0, 9.0, 3.0)


def test_percentiles_are_values_that_were_there() -> None:
    values = list(range(1, 101))
    assert [percentile(values, percent) for percent in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


def test_of_nothing_nothing_is_said() -> None:
    found = Distribution((1.0,)).snapshot()
    assert (found["count"], found["mean"], found["p99"], found["trend"]) == (0, None, None, None)


def test_the_trend_is_of_the_later_half() -> None:
    seconds = Distribution((1.0,))
    for value in (1.0, 1.0, 1.0, 3.0, 3.0, 3.0):
        seconds.add(value)
    assert seconds.snapshot()["trend"] == 3.0


def test_only_the_latest_values_are_kept() -> None:
    """
    A server runs for months: counts go on, memory does not grow.
    """
    seconds = Distribution((1.0,))
    for _ in range(5000):
        seconds.add(9.0)
    for _ in range(1024):
        seconds.add(0.5)
    found = seconds.snapshot()
    assert (found["count"], found["p99"], found["most"]) == (6024, 0.5, 9.0)
