"""Several processes on one cache: one compiles what all miss, whoever is killed meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.cache.collect import prune
from precast.cache.lease import Leases
from precast.cache.redis import RedisCache
from precast.cache.scratch import sweep_dead_folders
from precast.cache.trust import Trust
from precast.events import Event, LeaseAwaited
from servers import RedisServer

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])


# -- Writers that are killed: no torch, so that two hundred of them take seconds.

#: A warm parent forks writers, each of which kills itself at one of its file operations, from the
#: first to the last; parent and reader look after each of them.
KILLS = f"""
import os, signal, sys, time, hashlib
sys.path.insert(0, {str(ROOT / "src")!r})
from precast.cache import CacheLoader, CacheStorage, DiskCache
from precast.cache.collect import prune
from precast.cache.lease import Leases
from precast.testing import FILE_OPERATIONS

root, num_kills = sys.argv[1], int(sys.argv[2])
KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(4)]
OPERATIONS = (*FILE_OPERATIONS, "ftruncate", "lseek")

def contents(key, version):
    seed = hashlib.sha256(f"{{key}} {{version}}".encode()).digest()
    return {{"piece.so": seed * 300, "kernel.cubin": seed[::-1] * 50}}

def work(key, version):
    events = []
    tiers = [DiskCache(root)]
    loader = CacheLoader(tiers, events.append, time.monotonic)
    storage = CacheStorage(tiers, events.append, time.monotonic)
    with Leases(tiers, events.append) as leases:
        assert leases.try_acquire(key), "the lease of a killed writer was not free"
        payload = storage.publish(key, {{"version": version}}, contents(key, version))
        assert loader.files(payload["files"]) is not None
        leases.release(key)
    prune(tiers, emit=events.append, max_bytes=40_000, max_age_s=None, grace_s=0.0)
    failed = [event for event in events if type(event).__name__ == "TierFailed"]
    assert not failed, failed

def check():
    events = []
    loader = CacheLoader([DiskCache(root)], events.append, time.monotonic)
    found = 0
    for key in KEYS:
        manifest = loader.manifest(key)
        files = None if manifest is None else loader.files(manifest["files"])
        if files is None:
            continue  # Pruned
        wanted = contents(key, manifest["version"])
        for name, path in files.items():
            try:
                with open(path, "rb") as file:
                    assert file.read() == wanted[name], path
            except FileNotFoundError:
                continue  # Pruned after it was handed out.
            found += 1
    loader.close()
    bad = [e for e in events if type(e).__name__ not in ("CacheHit", "CacheMiss")]
    assert not bad, bad
    return found

def arm(n):
    count = 0
    def counting(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in OPERATIONS:
        setattr(os, name, counting(getattr(os, name)))
    return lambda: count

def read_until_stopped():
    found = 0
    while not os.path.exists(os.path.join(root, "stop")):
        found += check()
    assert found > 0
    os._exit(0)

def fork(run):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            if code:
                import traceback
                traceback.print_exc()
            os._exit(code)
    return pid

def end_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def count_operations():
    count = arm(0)
    work(KEYS[1], "counted")
    with open(os.path.join(root, "count"), "w") as file:
        file.write(str(count()))

work(KEYS[0], "first")
assert end_of(fork(count_operations)) == 0
with open(os.path.join(root, "count")) as file:
    num_operations = int(file.read())
reader = fork(read_until_stopped)
num_killed = version = 0
while num_killed < num_kills:
    version += 1
    n = 1 + num_killed * num_operations // num_kills
    def write():
        arm(n)
        work(KEYS[version % len(KEYS)], version)
    end = end_of(fork(write))
    assert end in (0, -signal.SIGKILL), (n, end)
    num_killed += end != 0  # There is more to do at one time than at another.
    check()
    if num_killed % 10 == 0:
        work(KEYS[version % len(KEYS)], f"after {{version}}")  # Nothing is in anybody's way.
open(os.path.join(root, "stop"), "w").close()
assert end_of(reader) == 0
work(KEYS[0], "last")
assert check() > 0
print(num_killed, num_operations)
"""


def test_writers_are_killed_at_every_stage_two_hundred_times(tmp_path: Path) -> None:
    """
    While they hold a lease, publish, link and prune. Never a wrong byte, never a crash, and the
    lease of a killed one is free at once.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "200"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    num_killed, num_operations = map(int, done.stdout.split())
    assert num_killed == 200
    assert num_operations > 50
    for folder in ("tmp", "lease"):
        for path in (tmp_path / "v1" / folder).iterdir():
            os.utime(path, (0, 0))  # An hour later
    prune([DiskCache(tmp_path)], emit=lambda _: None, max_bytes=None, max_age_s=None)
    assert list((tmp_path / "v1" / "lease").iterdir()) == []
    assert list((tmp_path / "v1" / "tmp").iterdir()) == []


# -- One compile for all, at the level of pieces: forked, since a start of torch takes seconds.


class QuickLeases(CacheStorage):
    """Leases that expire after three seconds, so that tests need not wait longer."""

    def open_leases(self) -> Leases:
        return Leases(self._layered.tiers, self._emit, ttl_s=3.0, heartbeat_s=0.2)


def pieces_of(number: int) -> list[Any]:
    from precast.graph.piece import Piece
    from unit.compilers.example_pieces import TINY

    data = TINY.to_json()
    return [
        Piece.from_json({**data, "text": data["text"].replace("1.0", f"{i}.0")})
        for i in range(number)
    ]


def compile_here(
    tiers: list[Any], order: list[int], log: Path, takes_s: float = 0.15
) -> list[Event]:
    """Compile all pieces as one process of a fleet does, and note each compile."""
    import torch

    from precast.config import CompilationConfig
    from precast.manager import CompilerManager
    from unit.planted_manager import PlantedWithoutPickle, SlowService

    class Noting(SlowService):
        def submit(self, job: Any) -> Any:
            with log.open("a") as file:
                file.write(
                    f"{os.getpid()} {hashlib.sha256(job.piece['text'].encode()).hexdigest()}\n"
                )
            return super().submit(job)

    events: list[Event] = []
    compiler = PlantedWithoutPickle()
    manager = CompilerManager(
        CompilationConfig(compiler=compiler, lease_wait=60.0),
        CacheLoader(tiers, events.append, time.monotonic, trust=Trust(allow_unsigned=True)),
        QuickLeases(tiers, events.append, time.monotonic, trust=Trust(allow_unsigned=True)),
        events.append,
        lambda: Noting(compiler, None, takes_s),
    )
    pieces = pieces_of(len(order))
    results = manager.compile([pieces[i] for i in order], [f"piece {i}" for i in order])
    manager.close()
    for result in results:
        assert result.compiler == "planted", result.reason
        assert result.call([torch.ones(2, 4)])[0].sum() == 24
    return events


def fork(run: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent is told by the exit code
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ends_of(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.fixture(scope="module", autouse=True)
def warm_parent() -> Iterator[None]:
    """Import what the forks need, which would take each of them seconds."""
    import torch

    import unit.planted_manager

    assert unit.planted_manager.Planted
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads do not survive a fork.
    yield
    torch.set_num_threads(num_threads)  # It counts in the keys of other tests.


@pytest.fixture(params=["disk", "redis"])
def make_tiers(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], list[Any]]:
    """Return what opens the tiers of the n-th process: one disk, or machines with a Redis."""
    if request.param == "disk":
        return lambda _: [MemoryCache(), DiskCache(tmp_path / "cache")]
    url = request.getfixturevalue("redis_server").url
    return lambda number: [
        MemoryCache(),
        DiskCache(tmp_path / f"machine {number}"),
        RedisCache(url, prefix=str(tmp_path)),
    ]


NUM_PIECES = 4
_BAD = ("ArtifactQuarantined", "LeaseLost", "TierFailed")


def test_eight_processes_compile_each_piece_once(
    tmp_path: Path, make_tiers: Callable[[int], list[Any]]
) -> None:
    """
    Started together, each with the pieces in another order.
    """
    log = tmp_path / "log"
    start_at = time.monotonic() + 0.5

    def run(number: int) -> None:
        order = [(i + number) % NUM_PIECES for i in range(NUM_PIECES)]
        time.sleep(max(0.0, start_at - time.monotonic()))
        events = compile_here(make_tiers(number), order, log)
        assert not [e for e in events if type(e).__name__ in _BAD]

    assert ends_of([fork(lambda number=number: run(number)) for number in range(8)]) == [0] * 8
    assert len(log.read_text().splitlines()) == NUM_PIECES


def test_a_killed_holder_is_replaced_by_one_of_those_who_wait(
    tmp_path: Path, make_tiers: Callable[[int], list[Any]]
) -> None:
    log = tmp_path / "log"
    order = list(range(NUM_PIECES))
    holder = fork(lambda: compile_here(make_tiers(0), order, log, takes_s=60.0))
    deadline = time.monotonic() + 30
    while not (log.exists() and len(log.read_text().splitlines()) == NUM_PIECES):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    def wait_for_it(number: int) -> None:
        events = compile_here(make_tiers(number), order, log)
        assert any(isinstance(event, LeaseAwaited) for event in events)

    waiters = [fork(lambda number=number: wait_for_it(number)) for number in (1, 2, 3)]
    time.sleep(0.5)
    os.kill(holder, signal.SIGKILL)
    assert ends_of([holder, *waiters]) == [-signal.SIGKILL, 0, 0, 0]
    assert len(log.read_text().splitlines()) == 2 * NUM_PIECES


def test_a_stopped_holder_does_not_publish_twice(tmp_path: Path) -> None:
    """
    It is taken for dead, wakes up when another one has published, and takes that.
    """
    log = tmp_path / "log"
    published = tmp_path / "published"

    def tiers() -> list[Any]:
        return [DiskCache(tmp_path / "cache")]

    def run_slowly() -> None:
        events = compile_here(tiers(), [0], log, takes_s=1.0)
        names = [type(event).__name__ for event in events]
        published.write_text(str(names.count("ArtifactPublished")))
        assert "PieceCompiled" not in names

    holder = fork(run_slowly)
    deadline = time.monotonic() + 30
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(holder, signal.SIGSTOP)
    compile_here(tiers(), [0], log)
    os.kill(holder, signal.SIGCONT)
    assert ends_of([holder]) == [0]
    assert published.read_text() == "0"
    assert len(log.read_text().splitlines()) == 2


# -- Whole starts: real processes, real workers, a compiler that takes no time.

START = """
import json, os, sys, tempfile
import torch
from system.models import Filed, compiled, make_net
import precast

model, events = compiled(make_net(), sys.argv[1], compiler=Filed())
print("ready", flush=True)
sys.stdin.readline()
with torch.no_grad():
    total = model(torch.linspace(-2, 2, 24).reshape(3, 8)).double().sum().item()
names = [type(event).__name__ for event in events]
if sys.argv[2] == "release":
    precast.release(model)
    left = os.listdir(tempfile.gettempdir())
    assert not [name for name in left if name.startswith(f"precast-{os.getpid()}-")], left
unique = [event.unique_pieces for event in events if type(event).__name__ == "PlanMade"]
print(json.dumps({
    "total": total,
    "compiled": names.count("PieceCompiled"),
    "captured": names.count("CaptureFinished"),
    "awaited": [e.outcome for e in events if type(e).__name__ == "LeaseAwaited"],
    "unique": sum(unique),
    "failed": [str(event) for event in events if type(event).__name__ == "TierFailed"],
    "modules": "torch._dynamo" in sys.modules,
}))
"""


def start(
    program: str, *arguments: object, place: Path, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": PATH,
            "TMPDIR": str(place),
            "PRECAST_WORKER_WARM": "0",
            **environment,
        },
    )


def answers_of(fleet: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Let all that were started with `START` begin at once; return what they say at the end."""
    for process in fleet:
        wait_until_ready(process)
    for process in fleet:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = []
    for process in fleet:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        answers.append(json.loads(output))
    assert len({answer["total"] for answer in answers}) == 1
    assert not [answer["failed"] for answer in answers if answer["failed"]]
    return answers


def assert_one_did_it(answers: list[dict[str, Any]]) -> None:
    """One captured and compiled; the others waited for it, and imported nothing to compile."""
    [unique] = {answer["unique"] for answer in answers if answer["captured"]}
    assert sum(answer["captured"] for answer in answers) == 1
    assert sum(answer["compiled"] for answer in answers) == unique > 0
    waited = [answer for answer in answers if not answer["captured"]]
    assert [answer["awaited"] for answer in waited] == [["found"]] * (len(answers) - 1)
    assert not any(answer["modules"] for answer in waited)


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a place for temporary files, with a short name."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]


def test_a_fleet_that_starts_cold_captures_and_compiles_once(tmp_path: Path, place: Path) -> None:
    """
    The others load what the first one made, without tracing: they do not even import Dynamo.
    Nobody leaves anything behind.
    """
    assert_one_did_it(
        answers_of(
            [start(START, tmp_path, "release" if i % 2 else "exit", place=place) for i in range(3)]
        )
    )
    assert [path.name for path in place.iterdir() if path.name.startswith("precast-")] == []
    assert not list((tmp_path / "v1" / "lease").iterdir())
    assert not list((tmp_path / "v1" / "tmp").iterdir())


def test_eight_machines_that_start_cold_on_one_redis_compile_once(
    tmp_path: Path, place: Path, redis_server: RedisServer
) -> None:
    """
    Their disks are empty and their own. A ninth one, later, has all it needs from Redis alone.
    """
    import redis

    prefix = tmp_path.name
    chain = f"disk,{redis_server.url}?prefix={prefix}&connect_ms=20000&deadline_ms=20000"

    def machine(number: int) -> subprocess.Popen[str]:
        return start(
            START,
            tmp_path / f"machine-{number}",
            "release" if number % 2 else "exit",
            place=place,
            PRECAST_CACHE_URL=chain,
            PRECAST_ALLOW_UNSIGNED="1",
        )

    assert_one_did_it(answers_of([machine(number) for number in range(8)]))
    with redis.Redis(port=redis_server.port) as client:
        assert not list(client.scan_iter(match=f"{prefix}/v1/lease/*"))
    [ninth] = answers_of([machine(9)])
    assert (ninth["captured"], ninth["compiled"], ninth["awaited"]) == (0, 0, [])
    assert not ninth["modules"]
    assert [path.name for path in place.iterdir() if path.name.startswith("precast-")] == []


HANGING = """
import sys, signal
import torch
from system.models import compiled, make_net
from unit.background.planted import Held

if sys.argv[2] == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
model, events = compiled(make_net(), sys.argv[1], compiler=Held())
print("ready", flush=True)
with torch.no_grad():
    model(torch.linspace(-2, 2, 24).reshape(3, 8))
"""


def processes_with(text: str) -> list[int]:
    """Return the processes in whose environment a text stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("how", "number"),
    [("polite", signal.SIGTERM), ("rude", signal.SIGKILL)],
)
def test_a_process_that_ends_while_it_compiles_leaves_nothing(
    tmp_path: Path, place: Path, how: str, number: int
) -> None:
    """
    Its workers end, hung ones with their children too. Files and leases go at once where Python
    may still run, else with the next collection of any process.
    """
    process = start(HANGING, tmp_path, how, place=place)
    wait_until_ready(process)
    deadline = time.monotonic() + 60
    while not list(place.glob("precast-*-compile-*/*/*/*/child")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list((tmp_path / "v1" / "lease").iterdir())
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while left := processes_with(str(place)):
        assert time.monotonic() < deadline, f"workers are still there: {left}"
        time.sleep(0.05)
    folders = [path for path in place.iterdir() if path.name.startswith("precast-")]
    if how == "polite":
        assert folders == []
        assert not list((tmp_path / "v1" / "lease").iterdir())
    for path in folders:
        os.utime(path, (0, 0))
    prune([DiskCache(tmp_path)], emit=lambda _: None, max_bytes=None, max_age_s=None)
    sweep_dead_folders(str(place))
    assert [path for path in place.iterdir() if path.name.startswith("precast-")] == []
    assert not list((tmp_path / "v1" / "lease").iterdir())


# -- A disk that is full, really.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of half a mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount(8)")
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_it_has_and_takes_more_once_pruned(small_disk: Path) -> None:
    events: list[Event] = []
    tiers = [DiskCache(small_disk / "cache")]
    storage = CacheStorage(tiers, events.append, time.monotonic)
    loader = CacheLoader(tiers, events.append, time.monotonic)
    kept: dict[str, bytes] = {}
    for i in range(20):
        content = os.urandom(60_000)
        key = f"key-{i}"
        storage.publish(key, {}, {"file": content})
        if any(type(event).__name__ == "TierFailed" for event in events):
            break
        kept[key] = content
    else:
        pytest.fail("it never was full")
    assert len(kept) >= 3
    with Leases(tiers, lambda _: None) as leases:
        assert leases.try_acquire("some-work"), "a full disk must not keep a start from compiling"

    def assert_sound() -> None:
        for key, content in kept.items():
            manifest = loader.manifest(key)
            if manifest is not None:
                files = loader.files(manifest["files"])
                assert files is not None
                assert Path(files["file"]).read_bytes() == content

    assert_sound()
    for path in (small_disk / "cache" / "v1").rglob("*"):
        os.utime(path, (0, path.stat().st_mtime - 7200))
    prune(tiers, emit=events.append, max_bytes=200_000, max_age_s=None)
    events.clear()
    storage.publish("key-new", {}, {"file": b"x" * 60_000})
    assert [type(event).__name__ for event in events] == ["ArtifactPublished"]
    assert_sound()
