"""Pieces are found or compiled, and one that cannot be is answered by eager."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from precast import manager
from precast.compilers.interface import CompiledPiece
from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.errors import CompileError, CompileTimeoutError
from precast.events import PieceCompiled, PieceFailed, PieceLoaded, PieceMissed, PieceTimed
from precast.graph.piece import Piece
from precast.piece_result import PieceResult
from unit.compilers.example_pieces import TINY
from unit.planted_manager import HereService, Planted, Setup, X


def test_a_piece_is_compiled_once_and_found_from_then_on(tmp_path: Path) -> None:
    """A second manager on the same cache submits nothing; the code is the same."""
    cold = Setup(tmp_path, Planted())
    [result] = cold.manager.compile([TINY], ["tiny"])
    assert not result.from_cache
    assert result.call(X)[0].sum() == 12

    warm = Setup(tmp_path, Planted())
    [again] = warm.manager.compile([TINY], ["tiny"])
    assert again.from_cache
    assert again.seconds == 2.0
    assert again.call(X)[0].sum() == 12
    assert warm.service.jobs == []
    assert warm.kinds(PieceLoaded, PieceCompiled, PieceMissed) == ["PieceLoaded"]


def test_a_miss_is_told_once_a_piece_with_the_parts_of_its_key(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), mode="cache_only")
    setup.manager.compile([TINY], ["tiny"])
    [missed] = [event for event in setup.events if isinstance(event, PieceMissed)]
    key = setup.manager.compilers.compute_hash_keys(TINY, Planted())
    assert missed == PieceMissed("tiny", key.digest, key.parts)

    kept_nowhere = Setup(tmp_path, Planted(is_saveable=False))
    kept_nowhere.manager.compile([TINY], ["tiny"])
    assert kept_nowhere.kinds(PieceMissed) == []


@pytest.mark.parametrize(
    "answer",
    [
        CompileTimeoutError("tiny", "planted", 3.0),
        JobResult(
            compiler=None,
            files={},
            details={},
            seconds=0.0,
            verify=None,
            failures=(CompileFailure("planted", "verify-mismatch", "off by 3"),),
            worker_pid=1,
        ),
    ],
    ids=["timeout", "mismatch"],
)
def test_a_piece_that_cannot_be_compiled_stays_eager_with_the_reason(
    tmp_path: Path, answer: Any
) -> None:
    setup = Setup(tmp_path, Planted(), answer)
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert result.compiler == "eager"
    assert result.reason is not None
    assert result.reason.code in ("compile-timeout", "verify-mismatch")
    assert setup.kinds(PieceFailed) == ["PieceFailed"]
    assert result.record is not None
    [note] = tmp_path.rglob("ac/*/*.json")
    assert note.name.startswith("failed-"), "no artifact was published"


def test_on_error_raise_raises(tmp_path: Path) -> None:
    answer = CompileTimeoutError("tiny", "planted", 3.0)
    with pytest.raises(CompileError, match="tiny"):
        Setup(tmp_path, Planted(), answer, on_error="raise").manager.compile([TINY], ["tiny"])


class OpensSome(Planted):
    """Its code of pieces that add cannot be opened, by `error`."""

    def __init__(self, error: type[Exception] | None) -> None:
        super().__init__()
        self.error = error

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        made = super().compile(piece, directory)
        return CompiledPiece(made.files, {"adds": "other" in piece.text})

    def load(self, details: Any, files: Any, piece: Piece | None) -> Any:
        if self.error is not None and details["adds"]:
            raise self.error("cannot open it here")
        return super().load(details, files, piece)


@pytest.mark.parametrize("error", [RuntimeError, OSError, ImportError])
def test_a_piece_whose_code_cannot_be_opened_here_stays_eager_alone(
    error: type[Exception], tmp_path: Path
) -> None:
    """
    The next start does not try again. The stored code stays, for whoever can open it.
    """
    other = Piece.from_json({**TINY.to_json(), "text": TINY.text + "# other\n"})

    def start(error: type[Exception] | None) -> tuple[Setup, list[PieceResult]]:
        setup = Setup(tmp_path, OpensSome(error))
        return setup, setup.manager.compile([other, TINY], ["other", "tiny"])

    setup, [failed, done] = start(error)
    assert (failed.compiler, done.compiler) == ("eager", "planted")
    assert failed.reason is not None
    assert failed.reason.code == "artifact-incompatible"
    assert f"{error.__name__}: cannot open it here" in failed.reason.message
    assert failed.record is not None
    assert failed.record["failure"]["machine"], "a matter of this machine"
    assert len(setup.service.jobs) == 2

    setup, [failed, done] = start(error)
    assert (failed.compiler, done.from_cache) == ("eager", True)
    assert setup.service.jobs == []
    setup, results = start(None)
    assert [result.compiler for result in results] == ["planted", "planted"]
    assert setup.service.jobs == []


def test_cache_only_never_compiles(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), mode="cache_only")
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert setup.service.jobs == []
    assert result.reason is not None
    assert result.reason.code == "not-recorded"


def test_workers_end_once(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted())
    setup.manager.compile([TINY], ["tiny"])
    setup.manager.close()
    setup.manager.close()

    assert setup.service.num_closed == 1


SLOW = (
    {
        "sizes": {},
        "compiled_s": 2e-6,
        "eager_s": 1e-6,
        "compiled_best_s": 2e-6,
        "eager_best_s": 1e-6,
        "num_turns": 25,
        "slower_turns": 25,
    },
)


class SlowCodeService(HereService):
    """Its code was measured to be slower than eager."""

    def submit(self, job: CompileJob) -> Future[JobResult]:
        done = super().submit(job).result()
        future: Future[JobResult] = Future()
        future.set_result(done.replace(timing=SLOW))
        return future


def test_code_that_is_slower_than_eager_is_kept_but_not_run(tmp_path: Path) -> None:
    """Later starts know it without measuring anew; `keep_slower` runs it all the same."""
    for number in range(2):
        setup = Setup(tmp_path, Planted())
        setup.service = SlowCodeService(Planted())
        [result] = setup.manager.compile([TINY], ["tiny"])
        assert len(setup.service.jobs) == 1 - number
        assert result.compiler == "eager"
        assert result.reason is not None
        assert result.reason.code == "not-worth-it"
        assert "2 µs where eager takes 1 µs" in result.reason.message
        assert result.record is not None
        assert list(result.record["timing"]) == list(SLOW)
        assert setup.kinds(PieceTimed) == ["PieceTimed"]
    forced = Setup(tmp_path, Planted(), keep_slower=True)
    [result] = forced.manager.compile([TINY], ["tiny"])
    assert (result.compiler, result.from_cache) == ("planted", True)


def test_each_result_is_told_of_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    other = Piece.from_json({**TINY.to_json(), "text": TINY.text + "\n"})
    setup = Setup(tmp_path, Planted())
    told: list[int] = []
    results = setup.manager.compile(
        [TINY, other],
        ["tiny", "other"],
        order=[1, 0],
        on_result=lambda number, _result: told.append(number),
    )
    assert [job.name for job in setup.service.jobs] == ["other", "tiny"]
    assert sorted(told) == [0, 1]
    assert [result.compiler for result in results] == ["planted", "planted"]


def test_a_part_that_is_being_made_holds_no_other_object_up() -> None:
    """Nor one thread another: `functools.cached_property` of Python 3.11 waits here for ever."""
    entered, may_go_on = threading.Event(), threading.Event()

    class Holder:
        @manager._made_once
        def part(self) -> object:
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                assert may_go_on.wait(30)
            return object()

    holder, found = Holder(), []
    slow = threading.Thread(target=lambda: found.append(holder.part), daemon=True)
    slow.start()
    assert entered.wait(30)
    assert Holder().part is not holder.part
    may_go_on.set()
    slow.join(30)
    assert found == [holder.part], "the first that was kept stays"
