"""`Distribution`: how seconds, or bytes, are spread over what happened."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import Any

#: Upper bounds of buckets. Few: each is a series of its own in Prometheus.
CALL_S = (
    1e-4,
    2.5e-4,
    5e-4,
    1e-3,
    2.5e-3,
    5e-3,
    1e-2,
    2.5e-2,
    5e-2,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
LOAD_S = (1e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 5.0)
COMPILE_S = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
START_S = (5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
ARTIFACT_BYTES = tuple(float(1 << shift) for shift in range(12, 31, 2))  # 4 KiB to 1 GiB.
RATIO = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)

_NUM_LATEST = 1024
_FEWEST_FOR_TREND = 4


class Distribution:
    """Count, sum and buckets of all values, and percentiles of the latest.

    Not locked: whoever adds to it has a lock of their own.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        """Hold nothing yet; `bounds` are the upper bounds of the buckets, growing."""
        self._bounds = tuple(bounds)
        self._in_bucket = [0] * (len(self._bounds) + 1)
        self._latest: deque[float] = deque(maxlen=_NUM_LATEST)
        self._sum = 0.0
        self._most = 0.0

    def add(self, value: float) -> None:
        """Take in one value."""
        self._in_bucket[bisect_left(self._bounds, value)] += 1
        self._latest.append(value)
        self._sum += value
        self._most = max(self._most, value)

    def snapshot(self) -> dict[str, Any]:
        """Return all of it as plain data; None where there were no values, or too few.

        `buckets` are pairs of an upper bound and how many values are not above it; None is no
        bound. `p50`, `p95`, `p99` and `trend` are of the latest 1024 values. `trend` is the median
        of the later half over that of the earlier: above 1, it grows.
        """
        count = sum(self._in_bucket)
        latest = list(self._latest)
        values = sorted(latest)
        buckets: list[list[float | None]] = []
        total = 0
        for bound, number in zip((*self._bounds, None), self._in_bucket, strict=True):
            total += number
            buckets.append([bound, total])
        return {
            "count": count,
            "sum": self._sum,
            "mean": self._sum / count if count else None,
            "most": self._most if count else None,
            "p50": percentile(values, 50),
            "p95": percentile(values, 95),
            "p99": percentile(values, 99),
            "trend": _trend(latest),
            "buckets": buckets,
        }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the least of sorted values that so many percent are not above; None: no values."""
    if not values:
        return None
    place = -(-len(values) * percent // 100)  # Rounded up: the nearest rank.
    return values[max(0, int(place) - 1)]


def _trend(values: Sequence[float]) -> float | None:
    half = len(values) // 2
    if len(values) < _FEWEST_FOR_TREND:
        return None
    earlier = percentile(sorted(values[:half]), 50)
    later = percentile(sorted(values[half:]), 50)
    return later / earlier if earlier and later is not None else None
