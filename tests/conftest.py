"""What all tests share: no user's cache or settings, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
from pathlib import Path

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
