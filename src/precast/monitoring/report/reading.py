"""Reading plain data that may be anything: a value of the wrong kind counts as absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EMPTY: Mapping[str, Any] = {}


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping, empty where it is none."""
    return value if isinstance(value, Mapping) else _EMPTY


def rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list; others are left out."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    """Return the items of a list as texts."""
    return [str(item) for item in value] if isinstance(value, list) else []


def number(value: Any, otherwise: float = 0.0) -> float:
    """Return a finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18:
        return float(value)
    return otherwise


def optional(value: Any) -> float | None:
    """Return a finite number, or None."""
    found = number(value, float("inf"))
    return None if found == float("inf") else found


def word(value: Any, otherwise: str = "") -> str:
    """Return a text, or what to say instead."""
    return value if isinstance(value, str) and value else otherwise
