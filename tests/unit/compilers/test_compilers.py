"""Real compiles: what each Inductor adaptor makes computes what eager does, wherever it lies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.background.service import CompileService
from precast.compilers.aot_inductor import AOTInductorAdaptor
from precast.compilers.inductor import InductorAdaptor
from precast.compilers.inductor_standalone import InductorStandaloneAdaptor
from precast.compilers.job import CompileJob, JobResult
from precast.compilers.verify import verify_from_text
from precast.graph.inputs import edge_sizes, random_inputs, zero_sizes
from precast.graph.piece import SymbolRange
from precast.graph.read import eager_function
from precast.torch_private import swap_symbols
from unit.compilers.example_pieces import FOREIGN, GATED, MUTATING, TINY, spec

pytestmark = pytest.mark.compile

PIECES = {"gated": GATED, "mutating": MUTATING, "foreign": FOREIGN}
# Heads by a fixed factor: only where s0 is a multiple of 4.
BY_FOUR = replace(
    TINY,
    text="""def piece(a0):
    v0 = a0.view(-1, 4, 4)
    v1 = torch.softmax(v0, dim=-1)
    return (v1,)
""",
    inputs=(spec("s0", 4),),
    outputs=(),
    symbols={"s0": SymbolRange(low=2, high=1024)},
    hints={"s0": 64},
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], JobResult]:
    """Every piece by every compiler, each pair in one worker job, two workers side by side."""
    folder = tmp_path_factory.mktemp("compiled")
    futures = {}
    with CompileService(2) as service:
        service.prestart()
        for compiler in ("aot_inductor", "inductor_standalone"):
            for name, piece in PIECES.items():
                futures[compiler, name] = service.submit(
                    CompileJob(
                        piece=piece.to_json(),
                        compilers=(compiler,),
                        directory=str(folder / f"{compiler}-{name}"),
                        imports=("unit.compilers.example_pieces",),
                        name=name,
                    )
                )
        return {pair: future.result() for pair, future in futures.items()}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("adaptor", [AOTInductorAdaptor(), InductorStandaloneAdaptor()])
def test_a_compiled_piece_equals_eager_at_every_size(
    compiled: dict[tuple[str, str], JobResult], adaptor: Any, name: str
) -> None:
    result = compiled[adaptor.name, name]
    assert result.compiler == adaptor.name, result.failures
    assert result.details["ranges"] == {}
    assert "unproven" not in result.details
    run = adaptor.load(result.details, result.files, None)

    sizes = [*edge_sizes(PIECES[name]), *zero_sizes(PIECES[name]), {"s0": 1000}]
    assert {row["s0"] for row in sizes} >= {0, 1, 2, 3, 17, 1000}
    verify_from_text(PIECES[name], run, sizes, adaptor.name)


def test_compiling_in_this_process_equals_eager(tmp_path: Path) -> None:
    adaptor = InductorAdaptor()
    result = adaptor.compile(TINY, str(tmp_path))
    run = adaptor.load(result.details, result.files, TINY)

    assert not adaptor.is_saveable
    verify_from_text(TINY, run, [*edge_sizes(TINY), {"s0": 0}], adaptor.name)


LOADING = """
import json, sys
job = json.loads(sys.argv[1])
import torch
from precast.compilers.aot_inductor import AOTInductorAdaptor
run = AOTInductorAdaptor().load(job["details"], job["files"], None)
x, y = torch.ones(3, 8), torch.zeros(3, 8)
outputs = run([x, y])
assert y[0].tolist() == [5.0, 5.0] + [2.0] * 6, y
heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton")
print([name for name in sys.modules if name.startswith(heavy)])
"""


def test_loading_imports_no_compiler_and_works_from_any_name(
    compiled: dict[tuple[str, str], JobResult], tmp_path: Path
) -> None:
    result = compiled["aot_inductor", "mutating"]
    blob = tmp_path / "cas.v1" / "ab" / "abcdef"  # A content address: no extension.
    blob.parent.mkdir(parents=True)
    (library,) = result.files.values()
    blob.write_bytes(Path(library).read_bytes())
    job = {"details": dict(result.details), "files": {result.details["entry"]: str(blob)}}
    done = subprocess.run(
        [sys.executable, "-c", LOADING, json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_operators_without_a_c_shim_need_a_second_file(
    compiled: dict[tuple[str, str], JobResult], tmp_path: Path
) -> None:
    result = compiled["aot_inductor", "foreign"]
    assert set(result.files) == {"model.so", "model.json"}
    files = {}
    for name, path in result.files.items():
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(Path(path).read_bytes())
    run = AOTInductorAdaptor().load(result.details, files, None)

    verify_from_text(FOREIGN, run, [{"s0": 5}], "aot_inductor")


def test_other_threads_run_while_a_piece_does(
    compiled: dict[tuple[str, str], JobResult],
) -> None:
    """
    As while an operator of eager does: a thread of Python gets on in the middle of a run.
    """
    result = compiled["aot_inductor", "gated"]
    run = AOTInductorAdaptor().load(result.details, result.files, None)
    inputs = random_inputs(GATED, {"s0": 200_000}, 0)
    run(inputs)
    times: list[float] = []

    def call() -> None:
        started = time.perf_counter()
        run(inputs)
        times.extend((started, time.perf_counter()))

    for _ in range(10):  # More than once: a busy machine may leave one of the two waiting.
        times.clear()
        thread = threading.Thread(target=call)
        thread.start()
        seen = []
        while thread.is_alive():
            seen.append(time.perf_counter())
        started, ended = times
        quarter = (ended - started) / 4
        if any(started + quarter < at < ended - quarter for at in seen):
            return
    pytest.fail("no other thread ran in the middle of a run")


@pytest.mark.parametrize("name", ["gated", "foreign"])
def test_several_threads_run_one_piece_from_its_first_run_on(
    compiled: dict[tuple[str, str], JobResult], tmp_path: Path, name: str
) -> None:
    """With an operator in Python, too, which needs the lock of Python that a run gives back."""
    result = compiled["aot_inductor", name]
    for attempt in range(5):
        files = {}
        for file, path in result.files.items():  # Under another name: it has never run.
            files[file] = str(tmp_path / str(attempt) / file)
            Path(files[file]).parent.mkdir(exist_ok=True)
            Path(files[file]).write_bytes(Path(path).read_bytes())
        opened = [AOTInductorAdaptor().load(result.details, files, None) for _ in range(2)]
        all_inputs = [random_inputs(PIECES[name], {"s0": size}, size) for size in range(1, 9)]
        expected = [eager_function(PIECES[name])(*inputs) for inputs in all_inputs]
        barrier = threading.Barrier(len(all_inputs))

        def call(
            number: int,
            barrier: threading.Barrier = barrier,
            opened: list[Any] = opened,
            all_inputs: list[Any] = all_inputs,
        ) -> list[list[Any]]:
            barrier.wait()
            return [opened[number % 2](all_inputs[number]) for _ in range(20)]

        with ThreadPoolExecutor(len(all_inputs)) as threads:
            for number, rounds in enumerate(threads.map(call, range(len(all_inputs)))):
                for outputs in rounds:
                    for output, wanted in zip(outputs, expected[number], strict=True):
                        torch.testing.assert_close(output, wanted)


def test_a_library_names_no_path_of_the_machine_that_made_it(
    compiled: dict[tuple[str, str], JobResult],
) -> None:
    (library,) = compiled["aot_inductor", "gated"].files.values()
    found = Path(library).read_bytes()
    assert str(Path(library).parent).encode() not in found
    # Compiled as torch does it, a wrapper names torch's headers by where they lie.
    assert b"aoti_runtime/model_base.h" in found
    assert b"include/torch/csrc/inductor/aoti_runtime/model_base.h" not in found
    assert b"precast-wrapper" not in found


def test_what_was_specialised_is_narrowed_or_refused(tmp_path: Path) -> None:
    with CompileService(1) as service:
        result = service.submit(
            CompileJob(
                piece=BY_FOUR.to_json(),
                compilers=("aot_inductor",),
                directory=str(tmp_path / "job"),
            )
        ).result()

    assert result.compiler is None
    assert "holds only where Eq(Mod(" in result.failures[0].message


def test_exchanging_symbols_needs_a_library_that_has_both() -> None:
    with pytest.raises(ValueError, match="not a 64-bit"):
        swap_symbols(bytearray(b"no library at all"), "a", "b")
