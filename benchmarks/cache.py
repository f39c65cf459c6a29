# T201, BLE001: a script that prints, and that reports what fails.
"""What a shared cache saves: loads, the cost of a dead tier, hits, and one compile for a fleet.

    python benchmarks/cache.py                      # everything; compiles three times
    python benchmarks/cache.py --repeats 50 --json cache.json
    python benchmarks/cache.py --parts dead hits    # without a compile

Starts a Redis and an S3 endpoint (rclone) on this machine; needs the packages of the extra `dev`.

*Load*: from a fresh loader to the opened library: manifest, blob, digests checked, `dlopen`. Each
repeat has a directory of its own, so that the library is opened anew. *First*: the same in a new
process that has imported torch, with the import of the tier's client, which fsspec then keeps for
the process. *Compile*: what the worker took for that piece.

*A dead tier*: the time that one adds to a load from disk, asked before the disk, which is the worst
place for it: at the first request of a process, and at the second.

*Hits*: 50 starts with empty disks and one Redis, two versions of the code (of three pieces one
differs), three kinds of machines, simulated by the parts of the keys that tell machines apart.

*Fleet*: one process, then eight at once, then one again, each with an empty disk and a Redis that
knows nothing, start a decoder of four layers (`--layers`). All CPU seconds count until the model
has answered and its workers have ended, those of the workers and their compilers included, and of
the import of torch; *net* leaves out what a process takes to import torch and make its model. What
Python takes to end after that (0.3 to 0.5 s with torch) is no part of a start: *to the end* has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "tests"))

from precast.cache import CacheLoader, CacheStorage, MemoryCache, open_cache
from precast.cache.trust import Trust
from servers import RedisServer, S3Server

LEAST_TIMES = {"memory": None, "disk": 1000.0, "redis": 100.0, "s3": 100.0}
MOST_DEAD_MS = 100.0
MOST_FLEET_CPU = 1.5
PARTS = ("load", "dead", "hits", "fleet")
COLD_START = Path(__file__).absolute().with_name("cold_start.py")


@contextmanager
def servers(folder: Path) -> Iterator[tuple[RedisServer, S3Server]]:
    """Run both servers for a while."""
    redis, s3 = RedisServer(folder / "redis"), S3Server(folder / "s3")
    try:
        redis.start()
        s3.start()
        yield redis, s3
    finally:
        redis.stop()
        s3.stop()


@contextmanager
def dropping_port() -> Iterator[int]:
    """Give a port where packets are dropped: a listener whose queue is full and not served."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def open_chain(folder: Path, chain: str | None) -> tuple[CacheLoader, CacheStorage]:
    """Open a cache that keeps its events to itself."""
    return open_cache(
        folder,
        disabled=False,
        emit=lambda _: None,
        clock=time.monotonic,
        cache_url=chain,
        trust=Trust(allow_unsigned=True),
    )


# ---------------------------------------------------------------------------
# Load against recompile


def compile_piece(folder: Path) -> dict[str, Any]:
    """Compile a one-layer decoder; return the key and the seconds of its costliest piece."""
    import torch
    from decoder import Shape, build_decoder, decoder_inputs

    import precast

    shape = Shape(layers=1, hidden=256, intermediate=688, heads=4, kv_heads=4, vocabulary=512)
    model = build_decoder(shape, device="cpu", dtype=torch.float32)
    found: list[Any] = []
    precast.compile(
        model, cache_dir=folder, progress=False, revalidate="never", listeners=[found.append]
    )
    with torch.inference_mode():
        model(*decoder_inputs(shape, 17, device="cpu"))
    precast.release(model)
    compiled = [event for event in found if type(event).__name__ == "PieceCompiled"]
    if not compiled:
        raise RuntimeError(f"nothing was compiled: {found}")
    piece = max(compiled, key=lambda event: event.seconds)
    return {"key": piece.key, "compile_s": piece.seconds, "compiler": piece.compiler}


def load_once(loader: CacheLoader, piece: dict[str, Any]) -> None:
    """Load a piece from its tier to an opened library."""
    from precast.plugins import load_plugin

    manifest = loader.manifest(piece["key"])
    assert manifest is not None
    paths = loader.files(manifest["files"])
    assert paths is not None
    load_plugin("compilers", piece["compiler"])().load(manifest["details"], paths, None)


def load_first(folder: Path, chain: str | None, piece: dict[str, Any]) -> float:
    """Return the milliseconds of the first load in a new process."""
    given = json.dumps([str(folder), chain, piece])
    command = [sys.executable, str(Path(__file__).absolute()), "--child", given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def load_in_child(folder: str, chain: str | None, piece: dict[str, Any]) -> float:
    """Load in this process, which must be new; torch is imported before the clock runs."""
    import torch  # noqa: F401

    loader, _ = open_chain(Path(folder), chain)
    begun = time.perf_counter()
    load_once(loader, piece)
    return (time.perf_counter() - begun) * 1e3


def measure_loads(
    folder: Path, redis: RedisServer, s3: S3Server, repeats: int
) -> list[dict[str, Any]]:
    """Return, for each tier, how long a load takes and how often that fits into the compile."""
    piece = compile_piece(folder / "disk")
    disk, _ = open_chain(folder / "disk", None)
    manifest = disk.manifest(piece["key"])
    assert manifest is not None
    paths = disk.files(manifest["files"])
    assert paths is not None
    load_once(disk, piece)  # torch's own loading of what it needs, once a process.
    files = {name: Path(path) for name, path in paths.items()}
    payload = {
        name: value
        for name, value in manifest.items()
        if name not in ("files", "format", "key", "sizes")
    }
    num_bytes = sum(path.stat().st_size for path in files.values())
    memory = MemoryCache()
    CacheStorage([memory], lambda _: None, time.monotonic).publish(piece["key"], payload, files)
    urls = {
        "redis": f"{redis.url}?deadline_ms=20000&connect_ms=20000",
        "s3": f"{s3.url('load')}&deadline_ms=20000&connect_ms=20000",
    }
    for url in urls.values():
        storage = open_chain(folder, url)[1]
        storage.publish(piece["key"], payload, files)
        assert storage.flush(60)

    def open_memory(_: Path) -> CacheLoader:
        return CacheLoader([memory], lambda _: None, time.monotonic)

    def open_disk(place: Path) -> CacheLoader:
        shutil.copytree(folder / "disk", place)
        return open_chain(place, None)[0]

    def open_remote(name: str) -> Callable[[Path], CacheLoader]:
        return lambda place: open_chain(place, urls[name])[0]

    rows = []
    for name, make in (
        ("memory", open_memory),
        ("disk", open_disk),
        ("redis", open_remote("redis")),
        ("s3", open_remote("s3")),
    ):
        seconds = []
        for i in range(repeats):
            loader = make(folder / f"{name}-{i}")
            begun = time.perf_counter()
            load_once(loader, piece)
            seconds.append(time.perf_counter() - begun)
            loader.close()
        load_s = statistics.median(seconds)
        rows.append(
            {
                "tier": name,
                "num_bytes": num_bytes,
                "load_ms": load_s * 1e3,
                "least_ms": min(seconds) * 1e3,
                "first_ms": None
                if name == "memory"
                else load_first(
                    folder / ("disk" if name == "disk" else name), urls.get(name), piece
                ),
                "compile_s": piece["compile_s"],
                "times": piece["compile_s"] / load_s,
            }
        )
    return rows


# ---------------------------------------------------------------------------
# A dead tier


def measure_dead(
    folder: Path, redis: RedisServer, s3: S3Server, port: int, repeats: int
) -> list[dict[str, Any]]:
    """Return what a dead tier adds to a load from disk; packets to `port` are dropped."""
    key = sha256(b"dead").hexdigest()
    open_chain(folder / "near", None)[1].publish(key, {}, {"piece.so": bytes(100_000)})

    def start(chain: str | None) -> tuple[float, float]:
        loader, _ = open_chain(folder / "near", chain)
        taken = []
        for _ in range(2):
            begun = time.perf_counter()
            manifest = loader.manifest(key)
            assert manifest is not None
            assert loader.files(manifest["files"]) is not None
            taken.append(time.perf_counter() - begun)
            # The memory tier would answer from now on.
            loader._layered.tiers[0].delete_manifest(key)
        return taken[0], taken[1]

    dropping_s3 = s3.url("dead", f"http://127.0.0.1:{port}")
    usual = [start(None) for _ in range(repeats)]
    rows = []
    for how in ("refused", "hangs", "drops packets"):
        if how == "refused":
            redis.stop()
            s3.stop()
        elif how == "hangs":
            for server in (redis, s3):
                server.start()
                server.sleep()
        for name in ("redis", "s3"):
            url = redis.url if name == "redis" else s3.url("dead")
            if how == "drops packets":
                url = f"redis://127.0.0.1:{port}" if name == "redis" else dropping_s3
            taken = [start(f"{url},disk") for _ in range(repeats)]
            rows.append(
                {
                    "tier": name,
                    "how": how,
                    "first_ms": 1e3 * statistics.median(t[0] for t in taken)
                    - 1e3 * statistics.median(t[0] for t in usual),
                    "most_first_ms": 1e3 * max(t[0] for t in taken)
                    - 1e3 * statistics.median(t[0] for t in usual),
                    "second_ms": 1e3 * statistics.median(t[1] for t in taken)
                    - 1e3 * statistics.median(t[1] for t in usual),
                }
            )
    for server in (redis, s3):
        server.stop()
        server.start()
    return rows


# ---------------------------------------------------------------------------
# A fleet's hits


def measure_hits(folder: Path, redis: RedisServer, num_starts: int) -> dict[str, Any]:
    """Start machines in a random order; return their hits and misses."""
    from precast.graph.key import HashComputer

    kinds: list[dict[str, Any]] = [
        {"cpu": "x86_64 AVX512 0001"},
        {"cpu": "x86_64 AVX2 0002"},
        {"cpu": "x86_64 AVX512 0001", "device": "cuda", "architecture": "sm_90"},
    ]
    texts = {"1": ["embed", "layer", "head"], "2": ["embed", "layer, changed", "head"]}
    compiler = {"compiler": "aot_inductor", "options": ""}
    hits = misses = 0
    seen: set[str] = set()
    needless: list[str] = []
    order = random.Random(0)
    starts = [(version, kind) for version in texts for kind in range(len(kinds))]
    starts += [(order.choice(list(texts)), order.randrange(3)) for _ in range(num_starts - 6)]
    order.shuffle(starts)
    for number, (version, kind) in enumerate(starts):
        hasher = HashComputer()
        hasher._toolchain = {**hasher._toolchain, **kinds[kind]}
        keys = [hasher.assembly_key(f"model, version {version}", "call", {})]
        keys += [hasher.piece_key(text, compiler) for text in texts[version]]
        loader, storage = open_chain(
            folder / f"machine-{number}",
            f"disk,{redis.url}?prefix=hits&deadline_ms=20000&connect_ms=20000",
        )
        for key in keys:
            if loader.manifest(key.digest) is not None:
                hits += 1
                continue
            misses += 1
            if key.digest in seen:
                needless.append(key.digest)
            seen.add(key.digest)
            storage.publish(key.digest, {"parts": key.parts}, {"piece.so": key.digest.encode()})
        storage.close()
        loader.close()
    # Of the two versions' assemblies and pieces, all but the two equal pieces differ.
    expected = len(kinds) * (2 + 3 + 1)
    return {
        "starts": len(starts),
        "lookups": hits + misses,
        "hits": hits,
        "misses": misses,
        "expected_misses": expected,
        "needless_misses": len(needless),
        "hit_rate": hits / (hits + misses),
    }


# ---------------------------------------------------------------------------
# One compile for a fleet


def run_bare(layers: int) -> float:
    """Return the CPU seconds of a process that only makes the model."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        f"from decoder import Shape, build_decoder\nbuild_decoder(Shape(layers={layers}))\n"
        "print(time.process_time())"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).absolute().parent)]
    return float(subprocess.check_output(command, text=True))


def run_cold(
    folder: Path, redis: RedisServer, name: str, number: int, layers: int
) -> list[dict[str, Any]]:
    """Start processes together; return what each says, and its CPU seconds to its very end."""
    url = f"{redis.url}?prefix={name}&deadline_ms=20000&connect_ms=20000"
    processes = []
    for i in range(number):
        given = [str(folder / f"{name}-{i}"), f"disk,{url}", f"--layers={layers}"]
        command = [sys.executable, str(COLD_START), *given]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = []
    for process in processes:
        assert process.stdout is not None
        answer = json.loads(process.stdout.read())
        # With those of its descendants, which have ended.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        answers.append({**answer, "ended_cpu_s": usage.ru_utime + usage.ru_stime})
    return answers


def measure_fleet(folder: Path, redis: RedisServer, layers: int, number: int = 8) -> dict[str, Any]:
    """Return what a cold fleet takes in CPU seconds, and what one process takes."""
    bare_s = statistics.median(run_bare(layers) for _ in range(3))
    # Before and after: a machine that others use is not the same for two minutes.
    [before] = run_cold(folder, redis, "before", 1, layers)
    fleet = run_cold(folder, redis, "fleet", number, layers)
    [after] = run_cold(folder, redis, "after", 1, layers)
    alone_s = statistics.mean((before["cpu_s"], after["cpu_s"]))
    waited = [answer for answer in fleet if not answer["compiled"]]
    total_s = sum(answer["cpu_s"] for answer in fleet)
    return {
        "processes": number,
        "unique_pieces": before["unique"],
        "compiles": sum(answer["compiled"] for answer in fleet),
        "alone_cpu_s": alone_s,
        "fleet_cpu_s": total_s,
        "ratio": total_s / alone_s,
        "ended_ratio": sum(answer["ended_cpu_s"] for answer in fleet)
        / statistics.mean((before["ended_cpu_s"], after["ended_cpu_s"])),
        "net_ratio": (total_s - number * bare_s) / (alone_s - bare_s),
        "bare_s": bare_s,
        "waiting_cpu_s": statistics.median(answer["cpu_s"] for answer in waited),
        "waiting_imports": sorted({name for answer in waited for name in answer["imports"]}),
        "answers": [before, *fleet, after],
    }


# ---------------------------------------------------------------------------
# What it comes to


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was measured and whether it is met."""
    judged = []
    for row in results.get("load", ()):
        limit = LEAST_TIMES[row["tier"]]
        if limit is not None:
            target = f"load from {row['tier']}, times faster than compiling"
            is_met = row["times"] >= limit
            judged.append({"target": target, "limit": limit, "value": row["times"], "met": is_met})
    for row in results.get("dead", ()):
        target = f"{row['tier']} {row['how']}: ms added to the first request, at most"
        is_met = row["first_ms"] <= MOST_DEAD_MS
        judged.append(
            {"target": target, "limit": MOST_DEAD_MS, "value": row["first_ms"], "met": is_met}
        )
    if hits := results.get("hits"):
        value = abs(hits["misses"] - hits["expected_misses"]) + hits["needless_misses"]
        target = "misses that are no true change"
        judged.append({"target": target, "limit": 0, "value": value, "met": value == 0})
    if fleet := results.get("fleet"):
        value = fleet["compiles"] - fleet["unique_pieces"]
        target = f"compiles of {fleet['processes']} cold processes beyond the unique pieces"
        judged.append({"target": target, "limit": 0, "value": value, "met": value == 0})
        target = "their CPU seconds, times those of one"
        is_met = fleet["ratio"] <= MOST_FLEET_CPU
        judged.append(
            {"target": target, "limit": MOST_FLEET_CPU, "value": fleet["ratio"], "met": is_met}
        )
    return judged


def shown(milliseconds: float | None) -> str:
    """Return a figure for a table; nothing where it was not measured."""
    return "" if milliseconds is None else f"{milliseconds:.1f}"


def render(results: dict[str, Any]) -> str:
    """Return the results and the targets as markdown tables."""
    lines: list[str] = []
    if "load" in results:
        lines += [
            "| tier | bytes | load ms (median) | least | first, with imports | compile s | times |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['tier']} | {r['num_bytes']:,} | {r['load_ms']:.2f} | {r['least_ms']:.2f} "
            f"| {shown(r['first_ms'])} | {r['compile_s']:.1f} | {r['times']:,.0f} |"
            for r in results["load"]
        ]
        lines.append("")
    if "dead" in results:
        lines += [
            "| dead tier | how | adds to the first request ms | most | to the second |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['tier']} | {r['how']} | {r['first_ms']:.1f} | {r['most_first_ms']:.1f} "
            f"| {r['second_ms']:.2f} |"
            for r in results["dead"]
        ]
        lines.append("")
    if "hits" in results:
        f = results["hits"]
        lines += [
            "| starts | lookups | hits | misses | true changes | hit rate |",
            "|---|---|---|---|---|---|",
            f"| {f['starts']} | {f['lookups']} | {f['hits']} | {f['misses']} "
            f"| {f['expected_misses']} | {f['hit_rate']:.0%} |",
            "",
        ]
    if "fleet" in results:
        f = results["fleet"]
        lines += [
            "| processes | pieces | compiles | CPU s of one | of all | ratio | to the end | net "
            "| of one that only imports torch and makes the model | of one that waits |",
            "|---|---|---|---|---|---|---|---|---|---|",
            f"| {f['processes']} | {f['unique_pieces']} | {f['compiles']} | {f['alone_cpu_s']:.1f} "
            f"| {f['fleet_cpu_s']:.1f} | {f['ratio']:.2f} | {f['ended_ratio']:.2f} "
            f"| {f['net_ratio']:.2f} | {f['bare_s']:.2f} | {f['waiting_cpu_s']:.2f} |",
            "",
            f"Those that waited imported of the compilers: {f['waiting_imports'] or 'nothing'}",
            "",
        ]
    lines += ["| target | limit | measured | |", "|---|---|---|---|"]
    for j in judge(results):
        verdict = "met" if j["met"] else "**MISSED**"
        lines.append(f"| {j['target']} | {j['limit']:,g} | {j['value']:,.2f} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    """Run, and print tables; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4, help="of the fleet's decoder")
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", help="write everything there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(load_in_child(*json.loads(options.child)))
        return 0
    results: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="precast-cache-"))
    try:
        with servers(folder) as (redis, s3):
            if "load" in options.parts:
                results["load"] = measure_loads(folder, redis, s3, options.repeats)
            if "dead" in options.parts:
                with dropping_port() as port:
                    results["dead"] = measure_dead(folder, redis, s3, port, options.repeats)
            if "hits" in options.parts:
                results["hits"] = measure_hits(folder, redis, options.starts)
            if "fleet" in options.parts:
                results["fleet"] = measure_fleet(folder, redis, options.layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(render(results))
    if options.json:
        data = results | {"targets": judge(results)}
        Path(options.json).write_text(json.dumps(data, indent=1))
    return int(any(not j["met"] for j in judge(results)))


if __name__ == "__main__":
    sys.exit(main())
