"""The examples, as their first lines say to run them: each twice, the second time warm."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from system.conftest import CALM

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return one cache for all runs of an example; pieces are text, which is not timed."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PRECAST_")},
        "PYTHONPATH": str(ROOT / "src"),
        "PRECAST_CACHE_DIR": str(tmp_path_factory.mktemp("examples")),
        "PRECAST_COMPILER": "eager",
        "OMP_NUM_THREADS": "1",  # Threads of several processes would wait for each other.
        "PRECAST_ON_ERROR": "raise",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Callable[..., str]:
    """Return what runs an example and returns what it printed."""

    def run(name: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", EXAMPLES / name],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**environment, **variables},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_generate_gives_the_tokens_of_eager_and_starts_warm(run: Callable[..., str]) -> None:
    pytest.importorskip("transformers")
    assert "cold: the first 24 tokens" in run("generate.py")
    printed = run("generate.py")
    assert "the same tokens as eager: True" in printed
    assert "warm: the first 24 tokens" in printed


def test_a_denoiser_paints_what_eager_paints_and_starts_warm(run: Callable[..., str]) -> None:
    pytest.importorskip("diffusers")
    assert "cold: the first image" in run("denoise_diffusers.py")
    printed = run("denoise_diffusers.py")
    assert "warm: the first image" in printed
    difference = re.search(r"largest difference from eager: (\S+)", printed)
    assert difference is not None
    assert float(difference[1]) < 1e-5


@pytest.mark.compile
def test_pieces_of_torch_compile_come_from_the_cache(run: Callable[..., str]) -> None:
    settings = {"PRECAST_COMPILER": "auto", **CALM}
    assert re.search(
        r"cold: .* [1-9]\d* pieces compiled", run("torch_compile_backend.py", **settings)
    )
    second = run("torch_compile_backend.py", **settings)
    assert "all pieces came from the cache" in second
    difference = re.search(r"largest difference from eager: (\S+)", second)
    assert difference is not None
    assert float(difference[1]) < 1e-4


@contextmanager
def served(environment: dict[str, str]) -> Iterator[Any]:
    """Start the server, and hand out what asks it over HTTP; end it as its manager would."""
    httpx = pytest.importorskip("httpx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, EXAMPLES / "serve_fastapi.py", "--port", str(port)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            until(lambda: answers(client), server)
            yield client
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
        assert "Application shutdown complete" in said
        assert "Traceback" not in said
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()


def answers(client: Any) -> bool:
    import httpx

    try:
        return bool(client.get("/status").is_success)
    except httpx.ConnectError:
        return False


def until(is_so: Callable[[], bool], server: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < deadline, "it does not happen"
        if server is not None and server.poll() is not None:
            raise AssertionError(server.communicate()[1])
        time.sleep(0.05)


@pytest.mark.compile
def test_a_server_answers_before_the_swap_and_the_same_after(environment: dict[str, str]) -> None:
    """
    The first answer does not wait for a compiler. A second server finds what the first one made.
    """
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    settings = {
        **environment,
        "PRECAST_COMPILER": "auto",
        **CALM,
    }
    body = {"features": [0.1, 0.2, 0.3, 0.4]}

    def ask(client: Any) -> list[float]:
        answer = client.post("/classify", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["probabilities"])

    results = []
    for is_warm in (False, True):
        with served(settings) as client:
            before = client.get("/status").json()
            assert (before["is_swapped"], before["pieces"]) == (False, 0)
            eager = ask(client)
            if not is_warm:
                assert not client.get("/status").json()["is_swapped"]
            until(lambda: client.get("/status").json()["is_swapped"])
            after = client.get("/status").json()
            assert after["compiled"] == after["pieces"] > 0
            assert after["is_warm"] is is_warm
            assert after["reasons"] == []
            results += [eager, ask(client)]
            for wrong in ("no", [0.1]):
                answer = client.post("/classify", json={"features": wrong})
                assert answer.status_code == 422
    assert abs(sum(results[0]) - 1) < 1e-5
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-5)
