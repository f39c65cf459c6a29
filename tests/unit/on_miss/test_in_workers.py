"""What is made of the answers of workers."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.errors import CompileError, CompileUnavailableError
from unit.compilers.example_pieces import TINY
from unit.planted_manager import Planted, Setup, try_again


def test_without_a_cxx_compiler_the_remedy_is_to_install_one(tmp_path: Path) -> None:
    """
    torch's name for it is the same in all versions that are supported.
    """
    from torch._inductor.exc import InvalidCxxCompiler

    message = f"InductorError: {InvalidCxxCompiler.__name__}: No working C++ compiler found"
    answer = JobResult(
        compiler=None, files={}, details={}, seconds=1.0, verify=None, worker_pid=1,
        failures=(CompileFailure("planted", "compile-failed", message),),
    )  # fmt: skip
    [result] = Setup(tmp_path, Planted(), answer).manager.compile([TINY], ["tiny"])
    assert result.reason is not None
    assert result.reason.remedy.startswith("Install a C++ compiler")


def test_a_compile_that_was_called_off_says_nothing_of_the_piece(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted())

    def close_then_fail(job: CompileJob) -> Future[JobResult]:
        setup.manager.close()
        future: Future[JobResult] = Future()
        future.set_exception(CompileError("tiny", "planted", "the compile service was closed"))
        return future

    setup.service.submit = close_then_fail  # type: ignore[method-assign]
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.compiler == "eager"
    assert result.record is not None
    assert not setup.manager.failures.still_stands(result.record)
    assert len(try_again(tmp_path).service.jobs) == 1


def test_a_worker_that_cannot_be_had_says_nothing_of_the_piece(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), CompileUnavailableError("tiny", "worker", "no more files"))
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.compiler == "eager"
    assert result.reason is not None
    assert "no more files" in result.reason.message
    assert result.record is not None
    assert not setup.manager.failures.still_stands(result.record)
    assert len(try_again(tmp_path).service.jobs) == 1


def test_without_a_place_for_temporary_files_pieces_run_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path, Planted())
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
        [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.compiler == "eager"
    assert result.reason is not None
    assert "FileNotFoundError" in result.reason.message
    assert len(try_again(tmp_path).service.jobs) == 1
