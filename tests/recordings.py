"""A recording as a process would write one, small and complete; for tests of what is made of it."""

from __future__ import annotations

from typing import Any

REASON = {
    "code": "compile-timeout",
    "message": "aot_inductor could not compile piece 'head': not finished after 4 s",
    "remedy": "Raise `max_compile_time` (now 4) to wait longer",
    "location": "model.py:12",
}
KEYS = ["a" * 64, "b" * 64, "c" * 64]


def timing(compiled_s: float = 1e-4, eager_s: float = 2e-4) -> dict[str, Any]:
    return {
        "sizes": {"s0": 16},
        "compiled_s": compiled_s,
        "eager_s": eager_s,
        "compiled_range_s": [compiled_s * 0.9, compiled_s * 1.1],
        "eager_range_s": [eager_s * 0.9, eager_s * 1.1],
        "num_turns": 25,
    }


def piece(number: int) -> dict[str, Any]:
    lines = ["# precast piece 1", "def piece(a0):", f"    v{number} = a0 + {number}"]
    return {
        "text": "\n".join([*lines, f"    return (v{number},)\n"]),
        "key": KEYS[number],
        "seconds": 9.5,
        "artifact_bytes": 270_000,
        "num_parts": 1,
        "parts": {"kind": "piece", "compiler": {"compiler": "aot_inductor"}, "torch": "2.13.0"},
        "verification": {"max_abs_error": 1e-6, "sizes": [{"s0": 16}]},
        "source": {"kernels.cpp": f"// kernel {number}\nvoid kernel_{number}() {{}}\n"},
        "timing": [timing()],
        "passes": [],
    }


def recording(
    num_layers: int = 4, *, name: str = "Decoder", is_warm: bool = False
) -> dict[str, Any]:
    """Return a recording of an embedding, equal layers with a native op after each, and a head.

    The head's compile ran out of time, so that it runs eager.
    """
    slots = []
    code = ["def execution_fn(pieces, weights, x):"]
    for number in range(num_layers + 2):
        kind = 0 if number == 0 else 2 if number == num_layers + 1 else 1
        slots.append(
            {
                "name": ("embed", f"layers.{number - 1}", "head")[kind],
                "place": 2 * number,
                "piece": KEYS[kind],
                "compiler": "eager" if kind == 2 else "aot_inductor",
                "from": "cache" if is_warm else "compiled here",
                "reason": REASON if kind == 2 else None,
                "num_weights": 3,
            }
        )
        code.append(f"    x, = pieces[{2 * number}]([x, *weights[{2 * number}]])")
        if kind == 1:
            code.append("    x = torch.ops.mylib.attention(x)")
    head = {**piece(2), "key": None, "source": {}, "timing": None, "verification": None}
    head.update(artifact_bytes=0, seconds=None)
    ready = {"model": name, "seconds": 0.04 if is_warm else 21.0, "warm": is_warm}
    ready |= {"seconds_saved": 19.0 if is_warm else 0.0}
    jobs = [
        {"at": 2.0, "event": "CompileStarted", "piece": "embed", "worker_pid": 7},
        {"at": 2.1, "event": "CompileStarted", "piece": "layers.0", "worker_pid": 8},
        job(11.5, "embed", 7, None),
        job(11.6, "layers.0", 8, None),
        {"at": 16.0, "event": "CompileStarted", "piece": "head", "worker_pid": 9},
        job(20.0, "head", 9, "compile-timeout"),
        {"at": 20.1, "event": "PieceFailed", "piece": "head", "key": "", "reason": REASON},
        compiled(11.7, "embed", 0, 7),
        compiled(11.8, "layers.0", 1, 8),
    ]
    capture = {"at": 1.5, "event": "CaptureFinished", "model": name, "seconds": 1.4, "nodes": 90}
    missed = {"at": 0.1, "event": "PieceMissed", "piece": "embed", "key": KEYS[0], "parts": {}}
    loaded = {"at": 0.02, "event": "PieceLoaded", "key": KEYS[0], "tier": "cache", "seconds": 0.001}
    hit = {"at": 0.01, "event": "CacheHit", "key": "0", "tier": "disk", "seconds": 0.002}
    miss = {"kind": "piece", "name": "embed", "key": KEYS[0], "cause": "torch", "nearest": KEYS[1]}
    return {
        "kind": "precast-recording",
        "format": 1,
        "precast": "0.1.0",
        "opened_at": 1_700_000_000.0,
        "seconds": 30.0,
        "process": {"pid": 4711, "python": "3.11.7", "machine": "Linux x86_64", "num_cores": 2},
        "memory": [{"at": 0.0, "resident_bytes": 4e8}, {"at": 21.0, "resident_bytes": 5e8}],
        "num_dropped": 0,
        "events": [
            *([hit, loaded] if is_warm else [missed, capture, *jobs]),
            {"at": ready["seconds"], "event": "ModelReady", **ready},
            {"at": 22.0, "event": "SomethingOfALaterVersion", "answer": 42},
        ],
        "model": {
            "model": name,
            "is_warm": is_warm,
            "start_seconds": ready["seconds"],
            "torch": "2.13.0",
            "settings": {
                "mode": {"value": "blocking", "from": "default"},
                "max_compile_time": {"value": 4.0, "from": "environment PRECAST_MAX_COMPILE_TIME"},
            },
            "assemblies": [
                {
                    "key": f"{'d' * 64}-0",
                    "slots": slots,
                    "native": ["torch.ops.mylib.attention"],
                    "execution_code": "\n".join(code),
                    "conditions": ["x is torch.float32"],
                    "passes": [],
                    "parts": {"kind": "assembly"},
                    "example": [[16, 64]],
                }
            ],
            "pieces": {KEYS[0]: piece(0), KEYS[1]: piece(1), KEYS[2]: head},
            "reasons": [],
            "blocks": [],
            "behind": {"doing": None, "waiting": 0},
            "weights": {"num_tensors": 9, "num_elements": 1000, "bytes": 4000},
            "misses": [] if is_warm else [{**miss, "differs": ["torch: was 'a', is 'b'"]}],
            "device": None,
        },
    }


def job(at_s: float, name: str, pid: int, code: str | None) -> dict[str, Any]:
    return {
        "at": at_s,
        "event": "JobFinished",
        "piece": name,
        "key": "",
        "compiler": None if code else "aot_inductor",
        "code": code,
        "seconds": at_s - 2.0 if code is None else 4.0,
        "cpu_seconds": 5.0,
        "peak_bytes": 7e8,
        "written_bytes": 2e6,
        "attempts": 1,
        "worker_pid": pid,
    }


def compiled(at_s: float, name: str, number: int, pid: int) -> dict[str, Any]:
    return {
        "at": at_s,
        "event": "PieceCompiled",
        "piece": name,
        "key": KEYS[number],
        "compiler": "aot_inductor",
        "seconds": 9.5,
        "artifact_bytes": 270_000,
        "worker_pid": pid,
    }
