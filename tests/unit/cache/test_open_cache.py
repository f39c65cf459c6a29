from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from precast.cache import ScratchCache, open_cache
from precast.events import Event
from precast.testing import BLOB, DIGEST, KEY


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_disabled_cache_serves_this_process_and_leaves_no_trace(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    loader, storage = open_cache(
        tmp_path / "root", disabled=True, emit=events.append, clock=lambda: 0.0
    )
    assert names_in(tmp_path / "temporary") == []
    assert loader.manifest(KEY) is None
    published = storage.publish(KEY, {}, {"piece.so": BLOB, "other": b"x"})
    assert loader.manifest(KEY) == published
    paths = loader.files(published["files"])
    assert paths is not None
    assert Path(paths["piece.so"]).read_bytes() == BLOB
    assert len(names_in(tmp_path / "temporary")) == 1
    loader.close()
    assert names_in(tmp_path / "temporary") == []
    assert not (tmp_path / "root").exists()


def test_a_disabled_cache_does_not_read_what_is_there(tmp_path: Path, events: list[Event]) -> None:
    def open_at_root(disabled: bool) -> tuple[object, object]:
        return open_cache(tmp_path, disabled=disabled, emit=events.append, clock=lambda: 0.0)

    open_at_root(False)[1].publish(KEY, {}, {"piece.so": BLOB})  # type: ignore[attr-defined]
    loader = open_at_root(True)[0]
    assert loader.manifest(KEY) is None  # type: ignore[attr-defined]
    assert loader.files({"piece.so": DIGEST}) is None  # type: ignore[attr-defined]


def test_two_disabled_caches_do_not_see_each_other(tmp_path: Path, events: list[Event]) -> None:
    pairs = [
        open_cache(tmp_path, disabled=True, emit=events.append, clock=lambda: 0.0) for _ in range(2)
    ]
    pairs[0][1].publish(KEY, {}, {})
    assert pairs[1][0].manifest(KEY) is None
    for loader, _ in pairs:
        loader.close()


def test_without_any_place_for_files_the_answer_is_none(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Eager goes on: no exception even if not so much as a temporary directory can be written.
    """
    (tmp_path / "file").write_text("I am no directory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    for disabled in (False, True):
        loader, storage = open_cache(
            tmp_path / "file", disabled=disabled, emit=events.append, clock=lambda: 0.0
        )
        published = storage.publish(KEY, {}, {"piece.so": BLOB})
        assert loader.manifest(KEY) == published
        assert loader.files(published["files"]) is None
        loader.close()
    assert events


def test_a_private_folder_goes_with_its_last_user() -> None:
    scratch = ScratchCache()
    root = Path(scratch.root)
    scratch.write_blob(DIGEST, BLOB)
    assert root.exists()
    del scratch
    gc.collect()
    assert not root.exists()


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise RuntimeError"])
def test_a_private_folder_goes_with_the_process_but_not_with_its_forks(
    tmp_path: Path, ending: str
) -> None:
    program = f"""
import os, sys
from precast.cache import open_cache
loader, storage = open_cache("unused", disabled=True, emit=print, clock=lambda: 0.0)
files = storage.publish({KEY!r}, {{}}, {{"piece.so": b"code"}})["files"]
path = loader.files(files)["piece.so"]
child = os.fork()
if child == 0:
    sys.exit(0)  # Runs what is registered for exit, as a careless fork does.
os.waitpid(child, 0)
assert os.path.exists(path)
print("still there", flush=True)
{ending}
"""
    source = Path(__file__).parents[3] / "src"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.stdout.endswith("still there\n"), done.stderr
    assert names_in(tmp_path) == []
