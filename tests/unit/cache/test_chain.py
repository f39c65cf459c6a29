from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from precast.cache import DiskCache, MemoryCache, open_cache
from precast.cache.chain import Chain, open_chain
from precast.cache.guarded import GuardedCache
from precast.cache.interface import CacheInterface
from precast.config import CompilationConfig, without_secrets
from precast.errors import ConfigError
from precast.events import Event
from precast.testing import BLOB, KEY

SOURCE = Path(__file__).parents[3] / "src"


class MineCache(MemoryCache):
    """What another package brings."""

    is_shared = True

    def __init__(self, url: str, *, name: str, color: str = "red") -> None:
        super().__init__()
        if color == "none":
            raise ValueError("a color is needed")
        self.name = name
        self.url = url


def open_text(text: str, folder: str | Path = "unused") -> Chain:
    return open_chain(text, folder, lambda _: None, lambda: 0.0)


def inner(tier: CacheInterface) -> Any:
    return tier._tier  # type: ignore[attr-defined]


def test_a_chain_has_its_tiers_in_order_with_memory_first() -> None:
    chain = open_text("disk, redis://host/0 ,s3://bucket/prefix,redis://other,memory://place")
    names = ["memory", "disk", "redis", "s3", "redis-2", "memory-2"]
    assert [tier.name for tier in chain.tiers] == names
    assert [tier.is_shared for tier in chain.tiers] == [False, False, True, True, True, True]
    assert chain.writer is not None
    assert chain.writer.tiers == {"redis", "s3", "redis-2", "memory-2"}
    assert chain.read_only == frozenset()
    assert [tier.name for tier in open_text("memory,disk").tiers] == ["memory", "disk"]


def test_the_disk_lies_in_the_cache_folder_or_where_it_is_told(tmp_path: Path) -> None:
    chain = open_text(f"disk,disk:{tmp_path}/x?shared=1&name=nfs,disk:~/y?readonly=1", tmp_path)
    _, own, nfs, home = chain.tiers
    assert isinstance(own, DiskCache)
    assert own.root == str(tmp_path)
    assert (nfs.name, nfs.is_shared, inner(nfs).root) == ("nfs", True, f"{tmp_path}/x")
    assert inner(home).root == str(Path.home() / "y")
    assert (home.name, home.is_writable) == ("disk-2", False)
    assert chain.read_only == {"disk-2"}
    assert chain.writer is not None
    assert chain.writer.tiers == {"nfs"}


def test_options_are_policies_of_one_tier() -> None:
    chain = open_text(
        "redis://a?readonly=1&deadline_ms=30&connect_ms=20,redis://b?write=now,s3://c?write=never"
    )
    assert chain.read_only == {"redis", "s3"}
    assert chain.writer is None
    guard = inner(chain.tiers[1])
    assert isinstance(guard, GuardedCache)
    assert (guard._deadline_s, guard._connect_deadline_s) == (0.03, 0.02)
    assert inner(guard)._options == {}


def test_options_of_a_client_reach_it() -> None:
    chain = open_text("redis://h?prefix=team&db=3&password=a%26b,s3://b/p?endpoint_url=http://h:1")
    _, redis, s3 = chain.tiers
    assert inner(redis)._bucket == "team/v1"
    assert inner(redis)._options == {"db": "3", "password": "a&b"}
    assert inner(s3)._endpoint() == "http://h:1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("disk,,redis://host", "a tier: 'disk', 'disk:/path' or a URL"),
        ("redis", "a tier"),
        ("disk:", "'disk' or 'disk:/path'"),
        ("disk,memory", "the first tier"),
        ("disk://path", "one of memory, disk, redis"),
        ("reddis://host", "Did you mean 'redis'"),
        ("what://host", "Install what brings what://"),
        ("disk?readonly", "followed by options"),
        ("disk?readonly=1&readonly=0", "followed by options"),
        ("disk?readonly=maybe", "readonly=1 or readonly=0"),
        ("disk?deadline_ms=3", "an option of a local tier"),
        ("redis://host?deadline_ms=soon", "a positive number of milliseconds"),
        ("redis://host?connect_ms=-1", "a positive number of milliseconds"),
        ("redis://host?write=later", "write=now, write=behind or write=never"),
        ("redis://host?colour=red", "an option of a Redis tier"),
        ("redis://a?name=x,redis://b?name=x", "'x' is taken"),
        ("s3://", "s3://bucket/prefix"),
    ],
)
def test_a_bad_chain_says_what_is_wrong_and_what_is_known(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_text(text)
    assert caught.value.field == "cache_url"
    assert said in str(caught.value)


def test_another_package_brings_a_tier_by_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = EntryPoint("mine", f"{__name__}:MineCache", "precast.stores")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[MineCache.__module__])
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: (brought,) if "stores" in group else ()
    )
    [_, tier] = open_text("mine://place?color=blue&readonly=1").tiers
    found = inner(inner(tier))
    assert (found.name, found.url) == ("mine", "mine://place")
    with pytest.raises(ConfigError, match="a color is needed"):
        open_text("mine://place?color=none")
    with pytest.raises(ConfigError, match="smell"):
        open_text("mine://place?smell=none")


def test_secrets_are_not_shown() -> None:
    url = "disk,redis://user:pass@host/0?password=pw,redis://:pw@h,s3://b?key=ak&secret=sk&anon=1"
    shown = "disk,redis://user:***@host/0?password=***,redis://:***@h,s3://b?key=***&secret=***"
    assert without_secrets(url) == shown + "&anon=1"
    assert CompilationConfig(cache_url=url).shown()["cache_url"] == shown + "&anon=1"
    assert CompilationConfig().shown()["cache_url"] is None
    with pytest.raises(ConfigError) as caught:
        open_text("reddis://user:hush@host")
    assert "hush" not in str(caught.value)


def test_a_disabled_cache_asks_no_tier(tmp_path: Path, events: list[Event]) -> None:
    loader, storage = open_cache(
        tmp_path, disabled=True, emit=events.append, clock=lambda: 0.0, cache_url="no chain at all"
    )
    published = storage.publish(KEY, {}, {"a": BLOB})
    assert loader.manifest(KEY) == published
    loader.close()
    storage.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "chain", [None, "disk,redis://127.0.0.1:1,s3://bucket?endpoint_url=http://h"]
)
def test_a_start_from_disk_imports_no_client(tmp_path: Path, chain: str | None) -> None:
    """
    And without a chain, nothing of what is behind it. Isolated, as in `test_house.py`.
    """
    program = f"""
import sys
sys.path[:0] = {[str(SOURCE), *(p for p in sys.path if "site-packages" in p)]!r}
from precast.cache import open_cache
def fail(event):
    assert type(event).__name__ in ("ArtifactPublished", "CacheHit"), event
open_cache({str(tmp_path)!r}, disabled=False, emit=fail, clock=lambda: 0.0)[1].publish(
    {KEY!r}, {{}}, {{"a": b"code"}})
loader, _ = open_cache(
    {str(tmp_path)!r}, disabled=False, emit=fail, clock=lambda: 0.0, cache_url={chain!r})
assert loader.files(loader.manifest({KEY!r})["files"])
print(*sorted(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    imported = set(done.stdout.split())
    assert not imported & {"redis", "fsspec", "s3fs", "botocore", "aiohttp", "asyncio", "torch"}
    if chain is None:
        assert not [
            name
            for name in imported
            if name.startswith(("precast.cache.chain", "precast.cache.guarded", "precast.plugins"))
        ]
