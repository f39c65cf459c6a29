"""What all tests share: no user's cache or settings, real servers; a GPU and a browser if there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import INSTALL, find_chromium
from servers import RedisServer, S3Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _skip_browser_tests(items)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return  # Without importing torch: most tests need none.
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU; torch finds none on this machine")
        for item in gpu_items:
            item.add_marker(skip)


def _skip_browser_tests(items: list[pytest.Item]) -> None:
    if find_chromium() is None:
        skip = pytest.mark.skip(reason=f"needs Chromium; as root: {INSTALL}")
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test a cache of its own and no settings from outside."""
    for name in [name for name in os.environ if name.startswith("PRECAST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PRECAST_CACHE_DIR", str(tmp_path / "precast-cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a Redis for tests that leave it running; each takes a prefix of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return an S3 endpoint for tests that leave it running; each takes a prefix of its own."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()
