from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from precast.cache import MemoryCache
from precast.cache.interface import CacheInterface
from precast.errors import StoreError
from precast.testing import DIGEST, KEY, OTHER_KEY, CacheContract


class TestMemoryCache(CacheContract):
    def make_cache(self, tmp_path: Path) -> CacheInterface:
        return MemoryCache()


def test_what_was_used_least_recently_is_forgotten_first() -> None:
    cache = MemoryCache(max_bytes=30)
    cache.write_manifest(KEY, b"k" * 10)
    cache.write_manifest(OTHER_KEY, b"o" * 10)
    cache.write_blob(DIGEST, b"b" * 10)
    assert cache.read_manifest(KEY) is not None  # So that it is the other's turn.
    digest = sha256(b"n" * 10).hexdigest()
    cache.write_blob(digest, b"n" * 10)
    assert cache.read_manifest(OTHER_KEY) is None
    assert cache.read_manifest(KEY) is not None
    assert cache.has_blob(DIGEST)
    assert cache.num_bytes == 30


def test_it_never_keeps_more_than_its_bound() -> None:
    cache = MemoryCache(max_bytes=1000)
    for i in range(200):
        cache.write_manifest(sha256(bytes([i % 50])).hexdigest(), b"x" * (i * 7 % 400))
        assert cache.num_bytes <= 1000
    for key in list(cache.manifest_keys()):
        cache.delete_manifest(key)
    assert cache.num_bytes == 0


def test_what_can_never_fit_is_an_error_and_forgets_nothing() -> None:
    cache = MemoryCache(max_bytes=10)
    cache.write_manifest(KEY, b"small")
    with pytest.raises(StoreError, match="11 bytes"):
        cache.write_blob(DIGEST, b"x" * 11)
    assert cache.read_manifest(KEY) == b"small"


def test_a_caller_may_change_its_buffer_afterwards() -> None:
    cache = MemoryCache()
    buffer = bytearray(b"before")
    cache.write_manifest(KEY, buffer)  # type: ignore[arg-type]
    buffer[:] = b"after!"
    assert cache.read_manifest(KEY) == b"before"


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        MemoryCache(max_bytes=0)
