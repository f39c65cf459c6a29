"""Which keys, digests and file names the cache accepts.

All three become parts of paths, and two of them are read from files that may be damaged or, in a
shared tier, hostile. So they are checked here, by what is allowed and not by what is forbidden.
"""

from __future__ import annotations

#: The key of the note of a tier's last collection, and the name of the lease of the one that runs.
COLLECTION_KEY = "last-collection"

#: What the keys of remembered failures begin with.
FAILURE_PREFIX = "failed-"

_HEX = frozenset("0123456789abcdef")
_KEY = frozenset("0123456789abcdefghijklmnopqrstuvwxyz-_")
_FILE_NAME = _KEY | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ.+")


def is_digest(text: object) -> bool:
    """Whether this is a SHA-256 as the cache writes it."""
    return isinstance(text, str) and len(text) == 64 and _HEX.issuperset(text)


def is_key(text: object) -> bool:
    """Whether a manifest can be kept under this key. No capitals: file systems may fold them."""
    return isinstance(text, str) and 4 <= len(text) <= 128 and _KEY.issuperset(text)


def is_internal_key(key: str) -> bool:
    """Whether what lies under a key says something of the cache it lies in, and is no artifact."""
    return key == COLLECTION_KEY or key.startswith(FAILURE_PREFIX)


def earlier_keys(key: str) -> list[str]:
    """Return the assemblies that a start tries before this one; it stops where one is missing."""
    stem, _, number = key.rpartition("-")
    return [f"{stem}-{i}" for i in range(int(number))] if number in set("1234567") else []


def is_file_name(text: object) -> bool:
    """Whether a blob may lie in a directory under this name."""
    return (
        isinstance(text, str)
        and 1 <= len(text) <= 200
        and not text.startswith(".")
        and _FILE_NAME.issuperset(text)
    )


def check_digest(digest: str) -> None:
    """Raise ValueError unless this is a digest."""
    if not is_digest(digest):
        raise ValueError(f"not a SHA-256 digest: {digest!r}; give 64 lowercase hex digits")


def check_key(key: str) -> None:
    """Raise ValueError unless this is a key."""
    if not is_key(key):
        raise ValueError(f"not a cache key: {key!r}; give 4 to 128 characters out of a-z 0-9 - _")


def check_file_name(name: str) -> None:
    """Raise ValueError unless this is a file name."""
    if not is_file_name(name):
        raise ValueError(
            f"not a file name for the cache: {name!r}; give 1 to 200 characters out of "
            "A-Z a-z 0-9 . _ + - that do not begin with a dot"
        )
