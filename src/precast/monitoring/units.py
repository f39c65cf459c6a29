"""Figures as people read them: durations and sizes."""

from __future__ import annotations


def as_bytes(number: float) -> str:
    """Return a size as people read it.

    >>> as_bytes(12_345_678)
    '11.8 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def as_duration(seconds: float) -> str:
    """Return a duration with three digits, in the unit that suits it.

    >>> as_duration(0.0000796), as_duration(0.0241), as_duration(33.14), as_duration(7260)
    ('79.6 µs', '24.1 ms', '33.1 s', '2.0 h')
    """
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        number = seconds * factor
        if number >= 1 or unit == "µs":
            break
    digits = 0 if number >= 100 else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {unit}" if number else "0 s"


def as_count(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its noun.

    >>> as_count(1, "piece"), as_count(3, "piece"), as_count(0, "copy", "copies")
    ('1 piece', '3 pieces', '0 copies')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"
