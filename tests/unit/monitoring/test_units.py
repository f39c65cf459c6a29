"""Figures as people read them."""

from __future__ import annotations

import pytest

from precast.monitoring.units import as_bytes, as_count, as_duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (4e-7, "0.40 µs"),
        (0.0000796, "79.6 µs"),
        (0.00123, "1.23 ms"),
        (0.126, "126 ms"),
        (1.0, "1.00 s"),
        (33.14, "33.1 s"),
        (130.0, "2.2 min"),
        (7260.0, "2.0 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert as_duration(seconds) == words


def test_sizes_and_counts() -> None:
    assert [as_bytes(n) for n in (0, 1536, 12_345_678, 5 << 30)] == [
        "0 B",
        "1.5 KiB",
        "11.8 MiB",
        "5.0 GiB",
    ]
    assert as_count(1, "miss", "misses") == "1 miss"
    assert as_count(1200, "miss", "misses") == "1,200 misses"
