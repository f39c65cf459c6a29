from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.cache import DiskCache, open_cache
from precast.cache.trust import NO_KEYS, SigningKey, Trust
from precast.compilers.interface import CompiledPiece
from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.config import CompilationConfig
from precast.errors import CompileError, CompileTimeoutError, ConfigError
from precast.events import (
    ArtifactRefused,
    Event,
    PieceCompiled,
    PieceFailed,
    PieceLoaded,
    PieceMissed,
    PieceTimed,
)
from precast.graph.piece import Piece
from precast.manager import CompilerManager, check_compiler
from unit.compilers.example_pieces import TINY


class Planted:
    """A compiler whose code multiplies by what its one file says; `fails` makes it raise."""

    name = "planted"

    def __init__(self, *, is_saveable: bool = True, fails: bool = False) -> None:
        self.is_saveable = is_saveable
        self.fails = fails
        self.num_loads = 0

    def identity(self) -> Mapping[str, str]:
        return {"compiler": "planted", "adaptor": "1"}

    def compile(self, piece: Piece, directory: str) -> CompiledPiece:
        path = Path(directory) / "factor"
        path.write_text("3")
        return CompiledPiece({"factor": str(path)}, {})

    def load(self, details: Any, files: Mapping[str, str], piece: Piece | None) -> Any:
        if self.fails:
            raise RuntimeError("no such luck")
        self.num_loads += 1
        factor = float(Path(files["factor"]).read_text()) if files else 1.0
        return lambda inputs: [inputs[0] * factor]


class HereService:
    """Runs jobs at once, in this process, with one compiler."""

    def __init__(self, compiler: Planted, answer: Any = None) -> None:
        self.compiler = compiler
        self.answer = answer
        self.jobs: list[CompileJob] = []
        self.num_closed = 0

    def prestart(self, n: int | None = None) -> None:
        pass

    def submit(self, job: CompileJob) -> Future[JobResult]:
        self.jobs.append(job)
        future: Future[JobResult] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        elif self.answer is not None:
            future.set_result(self.answer)
        else:
            made = self.compiler.compile(Piece.from_json(job.piece), job.directory)
            future.set_result(
                JobResult(
                    compiler="planted",
                    files=made.files,
                    details=made.details,
                    seconds=2.0,
                    verify=None,
                    failures=(),
                    worker_pid=1,
                )
            )
        return future

    def close(self) -> None:
        self.num_closed += 1


class SharedCache(DiskCache):
    """A tier that others may write to."""

    is_shared = True


class Setup:
    def __init__(
        self,
        root: Path,
        compiler: Any,
        answer: Any = None,
        shared: Path | None = None,
        trust: Trust = NO_KEYS,
        **settings: Any,
    ) -> None:
        self.events: list[Event] = []
        config = CompilationConfig(compiler=compiler, **settings)
        self.service = HereService(compiler, answer)
        self.loader, storage = open_cache(
            root,
            disabled=False,
            emit=self.events.append,
            clock=time.perf_counter,
            further_tiers=[] if shared is None else [SharedCache(shared, name="shared")],
            trust=trust,
        )
        self.manager = CompilerManager(
            config, self.loader, storage, self.events.append, lambda: self.service
        )

    def kinds(self, *wanted: type) -> list[str]:
        return [type(event).__name__ for event in self.events if isinstance(event, wanted)]


X = [torch.ones(2, 2)]


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
    key = setup.manager.compute_hash_keys(TINY, setup.manager.make_compiler())
    assert missed == PieceMissed("tiny", key.digest, key.parts)

    kept_nowhere = Setup(tmp_path, Planted(is_saveable=False))
    kept_nowhere.manager.compile([TINY], ["tiny"])
    assert kept_nowhere.kinds(PieceMissed) == []


def test_a_record_is_enough_to_load_a_piece(tmp_path: Path) -> None:
    [result] = Setup(tmp_path, Planted()).manager.compile([TINY], ["tiny"])
    assert result.record is not None

    call = Setup(tmp_path, Planted()).manager.load(result.record)
    assert call is not None
    assert call(X)[0].sum() == 12


def test_damaged_files_are_compiled_anew(tmp_path: Path) -> None:
    """A blob that is not what its digest says is never opened, and is replaced."""
    Setup(tmp_path, Planted()).manager.compile([TINY], ["tiny"])
    blobs = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"3"]
    assert blobs
    for blob in blobs:
        blob.chmod(0o600)
        blob.write_bytes(b"4")

    again = Setup(tmp_path, Planted())
    [result] = again.manager.compile([TINY], ["tiny"])
    assert len(again.service.jobs) == 1
    assert result.call(X)[0].sum() == 12


class PlantedWithoutPickle(Planted):
    unpickles = False


@pytest.mark.parametrize("kind", [Planted, PlantedWithoutPickle])
def test_of_a_shared_tier_only_what_is_signed_is_loaded(
    tmp_path: Path, kind: type[Planted]
) -> None:
    key = SigningKey(b"k" * 32)
    shared = tmp_path / "shared"
    Setup(tmp_path / "a", kind(), shared=shared, trust=Trust(signing_key=key)).manager.compile(
        [TINY], ["tiny"]
    )
    stranger = Setup(tmp_path / "b", kind(), shared=shared)
    assert not stranger.manager.compile([TINY], ["tiny"])[0].from_cache
    assert stranger.kinds(ArtifactRefused) == ["ArtifactRefused"]
    Setup(tmp_path / "c", kind(), shared=shared, trust=Trust(signing_key=key)).manager.compile(
        [TINY], ["tiny"]
    )  # The stranger's has taken its place, unsigned; this one signs it again.
    friend = Setup(tmp_path / "d", kind(), shared=shared, trust=Trust({key.key_id: key.public_key}))
    [result] = friend.manager.compile([TINY], ["tiny"])
    assert result.from_cache
    assert result.record is not None
    assert "unsigned" not in result.record


def test_nothing_unsigned_is_unpickled_whatever_the_settings(tmp_path: Path) -> None:
    """A compiler that does not say that it does without pickles is taken to need them."""
    shared = tmp_path / "shared"
    Setup(tmp_path / "a", Planted(), shared=shared).manager.compile([TINY], ["tiny"])
    for _ in range(2):  # The second time, the marked copy in the own tier.
        compiler = Planted()
        admitted = Setup(tmp_path / "b", compiler, shared=shared, trust=Trust(allow_unsigned=True))
        piece_key = admitted.manager.compute_hash_keys(TINY, compiler).digest
        assert admitted.manager.find(TINY, "tiny") is None
        assert compiler.num_loads == 0
        [event] = [event for event in admitted.events if isinstance(event, ArtifactRefused)]
        assert event.key == piece_key
        assert event.reason.code == "untrusted"
        assert "unpickles" in event.reason.message


@pytest.mark.parametrize("is_marked", ["record", "assembly"])
def test_inductors_own_artifact_is_not_opened_unsigned(tmp_path: Path, is_marked: str) -> None:
    """Its file holds pickles, which torch loads. Here it is not so much as looked at."""
    artifact = b"not what torch expects: opening it would raise"
    setup = Setup(tmp_path / "a", "inductor_standalone", trust=Trust(allow_unsigned=True))
    digest = sha256(artifact).hexdigest()
    DiskCache(tmp_path / "a").write_blob(digest, artifact)
    record = {
        "key": "0123",
        "compiler": "inductor_standalone",
        "details": {"entry": "artifact.bin"},
        "files": {"artifact.bin": digest},
        "seconds": 1.0,
        **({"unsigned": True} if is_marked == "record" else {}),
    }
    assert setup.manager.load(record, unsigned=is_marked == "assembly") is None
    assert setup.kinds(ArtifactRefused) == ["ArtifactRefused"]


def test_an_assembly_of_unsigned_pieces_is_unsigned(tmp_path: Path) -> None:
    """Permission for its pieces is needed for it too, and whoever assembled it does not sign it."""
    shared = tmp_path / "shared"
    Setup(tmp_path / "a", PlantedWithoutPickle(), shared=shared).manager.compile([TINY], ["tiny"])
    trust = Trust(signing_key=SigningKey(b"k" * 32), allow_unsigned=True)
    admitted = Setup(tmp_path / "b", PlantedWithoutPickle(), shared=shared, trust=trust)
    [result] = admitted.manager.compile([TINY], ["tiny"])
    assert result.from_cache
    assert result.call(X)[0].sum() == 12
    admitted.manager.save("assembly-0", {"pieces": [result.record]})
    stored = admitted.loader.manifest("assembly-0")
    assert stored is not None
    assert stored["unsigned"] is True
    assert "signature" not in stored
    later = Setup(
        tmp_path / "b", PlantedWithoutPickle(), trust=Trust(signing_key=trust.signing_key)
    )
    assert later.loader.manifest("assembly-0") is None


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
    assert not any(tmp_path.rglob("ac/*.json")), "nothing was published"


def test_on_error_raise_raises(tmp_path: Path) -> None:
    answer = CompileTimeoutError("tiny", "planted", 3.0)
    with pytest.raises(CompileError, match="tiny"):
        Setup(tmp_path, Planted(), answer, on_error="raise").manager.compile([TINY], ["tiny"])


def test_cache_only_never_compiles(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), mode="cache_only")
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert setup.service.jobs == []
    assert result.reason is not None
    assert result.reason.code == "not-recorded"


def test_a_compiler_whose_code_cannot_be_kept_compiles_here(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(is_saveable=False))
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert setup.service.jobs == []
    assert result.record is None
    assert result.compiler == "planted"


def test_a_compiler_that_raises_here_is_answered_by_eager(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(is_saveable=False, fails=True))
    [result] = setup.manager.compile([TINY], ["tiny"])

    assert result.compiler == "eager"
    assert result.reason is not None
    assert "no such luck" in result.reason.message


def test_workers_end_once(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted())
    setup.manager.compile([TINY], ["tiny"])
    setup.manager.close()
    setup.manager.close()

    assert setup.service.num_closed == 1


def test_what_is_no_compiler_is_refused() -> None:
    with pytest.raises(ConfigError, match="is_saveable"):
        check_compiler(object())


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


class SlowService(HereService):
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
        setup.service = SlowService(Planted())
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
