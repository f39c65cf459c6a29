from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.cache import DiskCache, open_cache
from precast.cache.trust import NO_KEYS, SigningKey, Trust
from precast.compilers.chosen import check_compiler
from precast.compilers.interface import CompiledPiece
from precast.compilers.job import CompileFailure, CompileJob, JobResult
from precast.config import CompilationConfig
from precast.errors import CompileError, CompileTimeoutError, ConfigError
from precast.events import (
    ArtifactPublished,
    ArtifactRefused,
    Event,
    FailureRemembered,
    LeaseAwaited,
    PieceCompiled,
    PieceFailed,
    PieceLoaded,
    PieceMissed,
    PieceTimed,
    TierFailed,
)
from precast.graph.piece import Piece
from precast.manager import CompilerManager
from precast.passes.chosen import choose
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
        passes: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        self.events: list[Event] = []
        self.now_s = 1_000_000.0
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
            config,
            self.loader,
            storage,
            self.events.append,
            lambda: self.service,
            wall_clock=lambda: self.now_s,
            passes=choose(passes),
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
    key = setup.manager.compilers.compute_hash_keys(TINY, Planted())
    assert missed == PieceMissed("tiny", key.digest, key.parts)

    kept_nowhere = Setup(tmp_path, Planted(is_saveable=False))
    kept_nowhere.manager.compile([TINY], ["tiny"])
    assert kept_nowhere.kinds(PieceMissed) == []


def test_a_record_is_enough_to_load_a_piece(tmp_path: Path) -> None:
    [result] = Setup(tmp_path, Planted()).manager.compile([TINY], ["tiny"])
    assert result.record is not None

    call = Setup(tmp_path, Planted()).manager.stored.load(result.record)
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
        piece_key = admitted.manager.compilers.compute_hash_keys(TINY, compiler).digest
        assert admitted.manager.stored.find(TINY, "tiny") is None
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
    assert setup.manager.stored.load(record, unsigned=is_marked == "assembly") is None
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
    [note] = tmp_path.rglob("ac/*/*.json")
    assert note.name.startswith("failed-"), "no artifact was published"


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


# -- failures are remembered


def try_again(root: Path, answer: Any = None, **settings: Any) -> Setup:
    """Start anew, later by `after_s`, and compile `TINY`."""
    after_s = settings.pop("after_s", 60.0)
    setup = Setup(root, Planted(), answer, **settings)
    setup.now_s += after_s
    setup.manager.compile([TINY], ["tiny"])
    return setup


TIMEOUT = CompileTimeoutError("tiny", "planted", 600.0)


def refusal(*codes: str) -> JobResult:
    return JobResult(
        compiler=None,
        files={},
        details={},
        seconds=0.0,
        verify=None,
        failures=tuple(CompileFailure("planted", code, "no") for code in codes),
        worker_pid=1,
    )


def test_a_failed_piece_is_not_tried_at_the_next_start(tmp_path: Path) -> None:
    """It says since when, and until when."""
    try_again(tmp_path, TIMEOUT, after_s=0)
    again = Setup(tmp_path, Planted())
    [result] = again.manager.compile([TINY], ["tiny"])
    assert again.service.jobs == []
    assert result.reason is not None
    assert result.reason.code == "compile-timeout"
    assert "remembered from 1970-01-12 13:46 UTC" in result.reason.message
    assert "tried again after 1970-01-13 13:46 UTC" in result.reason.message
    assert "max_compile_time" in result.reason.remedy
    assert again.kinds(FailureRemembered, PieceFailed) == ["FailureRemembered"]
    assert result.call([torch.ones(2, 4)])[0].sum() == 16


def test_a_failure_with_other_passes_is_another_failure(tmp_path: Path) -> None:
    try_again(tmp_path, TIMEOUT, after_s=0, passes=("no_ops",))
    assert not try_again(tmp_path, passes=("no_ops",)).service.jobs
    assert len(try_again(tmp_path, passes=("no_ops", "in_place")).service.jobs) == 1
    assert len(try_again(tmp_path).service.jobs) == 1


@pytest.mark.parametrize(
    ("failed_with", "now_with"),
    [
        ({}, {"after_s": 86401.0}),
        ({"failure_memory": 0.0}, {}),
        ({}, {"failure_memory": 0.0}),
        ({}, {"after_s": -2 * 86400.0}),
        ({}, {"max_compile_time": 1200.0}),
    ],
    ids=["expired", "not kept", "not wanted", "from the future", "more time"],
)
def test_a_failure_is_tried_again(
    tmp_path: Path, failed_with: dict[str, Any], now_with: dict[str, Any]
) -> None:
    """When it is old, from a clock that was wrong, or the user has given it more."""
    try_again(tmp_path, TIMEOUT, after_s=0, **failed_with)
    again = try_again(tmp_path, **now_with)
    assert len(again.service.jobs) == 1
    assert again.kinds(PieceCompiled, FailureRemembered) == ["PieceCompiled"]
    assert not list(tmp_path.rglob("failed-*")), "it is forgotten"


def test_another_machine_or_compiler_tries_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A refusal counts on all machines, what ran out of time only where it did.
    """
    from precast.cache import failures

    for number, (answer, is_tried) in enumerate(
        [(TIMEOUT, True), (refusal("compile-failed"), False), (refusal("verify-mismatch"), False)]
    ):
        root = tmp_path / str(number)
        try_again(root, answer, after_s=0)
        with monkeypatch.context() as patched:
            patched.setattr(failures, "machine_identity", lambda: "another")
            assert len(try_again(root).service.jobs) == is_tried
        if not is_tried:
            monkeypatch.setenv("CXX", "no-such-compiler")
            assert len(try_again(root).service.jobs) == 1
            monkeypatch.delenv("CXX")


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


def test_a_record_of_a_failed_piece_counts_as_long_as_the_failure(tmp_path: Path) -> None:
    """
    An assembly that holds it must not pin it for ever.
    """
    setup = Setup(tmp_path, Planted(), TIMEOUT)
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.record is not None
    assert setup.manager.failures.still_stands(result.record)
    reason = setup.manager.failures.reason_of(result.record)
    assert reason is not None
    assert "remembered from" in reason.message
    setup.now_s += 86401
    assert not setup.manager.failures.still_stands(result.record)
    assert not setup.manager.failures.still_stands({**result.record, "failure": None})
    assert setup.manager.failures.still_stands({**result.record, "reason": None, "failure": None})


def test_a_damaged_memory_is_none(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), TIMEOUT)
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.record is not None
    failure = result.record["failure"]
    for bad in (
        {},
        {**failure, "failed_s": "yesterday"},
        {**failure, "reason": {"code": "nonsense", "message": "", "remedy": ""}},
        {**failure, "reason": None},
    ):
        assert not setup.manager.failures.still_stands({**result.record, "failure": bad})


# -- one compile for all


class SlowService(HereService):
    """Takes its time, in a thread of its own, as workers do."""

    def __init__(self, compiler: Planted, answer: Any, takes_s: float) -> None:
        super().__init__(compiler, answer)
        self.takes_s = takes_s
        self.is_started = threading.Event()

    def submit(self, job: CompileJob) -> Future[JobResult]:
        self.is_started.set()
        future: Future[JobResult] = Future()

        def run() -> None:
            time.sleep(self.takes_s)
            inner = super(SlowService, self).submit(job)
            if inner.exception() is not None:
                future.set_exception(inner.exception())
            else:
                future.set_result(inner.result())

        threading.Thread(target=run).start()
        return future


def slow_setup(root: Path, takes_s: float, answer: Any = None, **settings: Any) -> Setup:
    setup = Setup(root, Planted(), **settings)
    setup.service = SlowService(setup.service.compiler, answer, takes_s)
    return setup


def in_thread(setup: Setup) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.extend(setup.manager.compile([TINY], ["tiny"]))
    )
    thread.start()
    return thread, results


def outcomes(setup: Setup) -> list[str]:
    return [event.outcome for event in setup.events if isinstance(event, LeaseAwaited)]


def test_what_another_compiles_is_waited_for_and_loaded(tmp_path: Path) -> None:
    first, second = slow_setup(tmp_path, 0.5), slow_setup(tmp_path, 0.0)
    thread, mine = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    thread.join()
    assert result.from_cache
    assert result.call(X)[0].sum() == 12
    assert mine[0].call(X)[0].sum() == 12
    assert second.service.jobs == []
    assert outcomes(second) == ["found"]
    assert list((tmp_path / "v1" / "lease").iterdir()) == []


def test_a_failure_of_another_is_not_repeated(tmp_path: Path) -> None:
    first, second = slow_setup(tmp_path, 0.5, refusal("compile-failed")), slow_setup(tmp_path, 0.0)
    thread, _ = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    thread.join()
    assert second.service.jobs == []
    assert result.reason is not None
    assert "remembered" in result.reason.message
    assert outcomes(second) == ["found"]


def test_nobody_waits_longer_than_allowed(tmp_path: Path) -> None:
    """
    Then it compiles for itself, and what was published meanwhile is not published again.
    """
    first = slow_setup(tmp_path, 1.0)
    second = slow_setup(tmp_path, 2.0, lease_wait=0.2)
    thread, _ = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    thread.join()
    assert outcomes(second) == ["gave up"]
    assert len(second.service.jobs) == 1
    assert result.from_cache
    assert second.kinds(ArtifactPublished, PieceCompiled) == []


def test_what_a_dead_holder_left_is_taken_over(tmp_path: Path) -> None:
    setup = slow_setup(tmp_path, 0.0)
    leases = DiskCache(tmp_path).leases
    assert leases is not None
    work = setup.manager.compilers.work_name(TINY)
    assert leases.try_acquire(work, "dead", 0.5)
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert outcomes(setup) == ["taken over"]
    assert not result.from_cache
    assert result.call(X)[0].sum() == 12


def test_a_place_for_leases_that_is_away_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "lease").write_text("a file where the folder should be")
    setup = Setup(tmp_path, Planted())
    [result] = setup.manager.compile([TINY], ["tiny"])
    assert result.call(X)[0].sum() == 12
    assert setup.kinds(TierFailed) == ["TierFailed"]


def test_closing_ends_the_waiting(tmp_path: Path) -> None:
    setup = slow_setup(tmp_path, 0.0)
    leases = DiskCache(tmp_path).leases
    assert leases is not None
    assert leases.try_acquire(setup.manager.compilers.work_name(TINY), "other", 600.0)
    thread, results = in_thread(setup)
    time.sleep(0.2)
    setup.manager.close()
    thread.join(10)
    assert not thread.is_alive()
    assert results[0].compiler == "eager"
    leases.release(setup.manager.compilers.work_name(TINY), "other")


def test_one_of_several_has_its_turn(tmp_path: Path) -> None:
    """
    The others get what it made; where it leaves nothing, they do not wait one after the other.
    """
    managers = [Setup(tmp_path, Planted()).manager for _ in range(3)]
    made: list[int] = []
    turns: list[str] = []

    def take(i: int, makes: bool) -> None:
        work = "work-1" if makes else "work-2"
        with managers[i].turn(work, lambda: bool(made), lambda: made[0] if made else None) as found:
            turns.append("found" if found is not None else "did it")
            if found is None:
                time.sleep(0.5)
                if makes:
                    made.append(i)
                else:
                    managers[i].failures.remember(work, TIMEOUT.reason, ("capture-failed",))

    for makes, expected in ((True, ["did it", "found", "found"]), (False, ["did it"] * 3)):
        made.clear()
        turns.clear()
        started = time.monotonic()
        threads = [threading.Thread(target=take, args=(i, makes)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert turns == expected
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("trust", [NO_KEYS, Trust(allow_unsigned=True)], ids=["none", "unsigned"])
def test_nobody_waits_for_what_may_not_be_used(tmp_path: Path, trust: Trust) -> None:
    """
    Without keys, or with pickles that nobody signed, what others publish is refused: a fleet
    would do the same work one process after the other.
    """
    shared = tmp_path / "shared"

    def setup(name: str, takes_s: float) -> Setup:
        return slow_setup(tmp_path / name, takes_s, shared=shared, trust=trust)

    setup("before", 0.0).manager.compile([TINY], ["tiny"])
    first, second = setup("first", 2.0), setup("second", 0.0)
    thread, mine = in_thread(first)
    assert first.service.is_started.wait(10)
    [result] = second.manager.compile([TINY], ["tiny"])
    assert not mine, "it was not waited for"
    thread.join()
    assert len(second.service.jobs) == 1
    assert result.call(X)[0].sum() == 12
    assert outcomes(second) == []


def test_who_holds_the_lease_of_a_whole_waits_for_no_part(tmp_path: Path) -> None:
    """
    Two that wait for parts which the other one holds would wait until they give up.
    """
    setup = slow_setup(tmp_path, 0.0)
    leases = DiskCache(tmp_path).leases
    assert leases is not None
    assert leases.try_acquire(setup.manager.compilers.work_name(TINY), "other", 600.0)
    [result] = setup.manager.compile([TINY], ["tiny"], may_wait=False)
    leases.release(setup.manager.compilers.work_name(TINY), "other")
    assert result.call(X)[0].sum() == 12
    assert len(setup.service.jobs) == 1
    assert outcomes(setup) == []


def test_a_record_in_parts_stands_as_long_as_each_part_does(tmp_path: Path) -> None:
    setup = Setup(tmp_path, Planted(), refusal("compile-failed"))
    [result] = setup.manager.compile([TINY], ["tiny"])
    sound = {"key": "k", "compiler": "planted", "details": {}, "files": {}}
    whole = {"kind": "parts", "details": {"records": [sound, result.record]}}
    assert setup.manager.failures.still_stands(whole)
    setup.now_s += 2 * 86400.0
    assert not setup.manager.failures.still_stands(whole)
    assert setup.manager.failures.still_stands({"kind": "parts", "details": {"records": [sound]}})
