"""How commands speak: tables and lines for people, JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from precast.monitoring.units import as_bytes, as_count

__all__ = [
    "as_bytes",
    "as_count",
    "as_seconds",
    "as_time",
    "print_json",
    "print_line",
    "print_table",
]


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_line(text: str) -> None:
    """Print a line as it is."""
    print(text)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns; a heading that begins with `>` has its column set right.

    Not by rich, which takes longer to import than most commands take: it draws help and errors.
    """
    are_right = [heading.startswith(">") for heading in headings]
    table = [[heading.lstrip(">") for heading in headings], *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, are_right, strict=True)
        )
        if any(row):
            print("  ".join(cells).rstrip())


def as_seconds(seconds: float | None) -> str:
    """Return a duration as people read it; nothing for None.

    >>> as_seconds(0.0241), as_seconds(30.06), as_seconds(7260)
    ('24 ms', '30.1 s', '2.0 h')
    """
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.001 or not seconds else "< 1 ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def as_time(at_s: float) -> str:
    """Return a moment by the user's own clock."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
