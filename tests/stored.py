"""A cache as models leave it, really published and without a compiler."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from precast.cache import CacheStorage, DiskCache
from precast.graph.key import Key

TEXT = "def piece(a0):\n    v0 = torch.relu(a0)\n    return (v0,)\n"
OTHER_TEXT = TEXT.replace("relu", "sigmoid")
TOOLCHAIN = {"torch": "2.13.0 cf30153", "cpu": "x86_64 AVX512 9e8f", "threads": "many"}


def piece_key(text: str = TEXT, **toolchain: str) -> Key:
    """Return the key of a piece, on a machine with other parts where such are given."""
    compiler = {"compiler": "aot_inductor", "adaptor": "1"}
    parts = {"kind": "piece", "version": 1, "text": str(hash_of(text)), "compiler": compiler}
    return Key({**parts, "passes": [], **TOOLCHAIN, **toolchain})


def hash_of(text: str) -> str:
    """Return the digest of a text."""
    return Key({"text": text}).digest


def assembly_key(model: str = "Decoder", **toolchain: str) -> Key:
    """Return the key of a model's assemblies."""
    parts = {"kind": "assembly", "version": 1, "model": hash_of(model), "call": "torch.float32/2"}
    return Key({**parts, "config": {"split": "None"}, "passes": [], **TOOLCHAIN, **toolchain})


class Stored:
    """A disk tier with what was put into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tier = DiskCache(root)
        self._storage = CacheStorage([self.tier], lambda event: None, time.perf_counter)

    def add_piece(self, text: str = TEXT, code: bytes = b"code", **toolchain: str) -> str:
        """Publish a piece and return its key."""
        key = piece_key(text, **toolchain)
        self._storage.publish(
            key.digest,
            {
                "kind": "piece",
                "compiler": "aot_inductor",
                "details": {},
                "seconds": 12.5,
                "parts": key.parts,
                "piece": {"text": text},
                "verification": {"max_abs_error": 0.0},
            },
            {"model.so": code},
        )
        return key.digest

    def add_assembly(self, *pieces: str, model: str = "Decoder", **toolchain: str) -> str:
        """Publish an assembly of pieces and return its key."""
        key = assembly_key(model, **toolchain)
        payload: dict[str, Any] = {
            "kind": "assembly",
            "model": model,
            "parts": key.parts,
            "seconds": 12.5,
            "call_check": {"conditions": ["check(x)", "x has 2 dimensions"]},
            "execution": {"source": "def run(x):\n    return pieces[0](x)\n"},
            "pieces": [
                {
                    "key": piece,
                    "compiler": "aot_inductor",
                    "files": self.payload(piece)["files"],
                }
                for piece in pieces
            ],
        }
        self._storage.publish(f"{key.digest}-0", payload, {})
        return f"{key.digest}-0"

    def payload(self, key: str) -> dict[str, Any]:
        """Return what a manifest says."""
        from precast.cache.catalog import read_payload

        payload = read_payload(self.tier, key)
        assert payload is not None
        return payload

    def blob(self, key: str) -> Path:
        """Return where the library of a piece lies."""
        path = self.tier.local_blob_path(self.payload(key)["files"]["model.so"])
        assert path is not None
        return Path(path)

    def manifest(self, key: str) -> Path:
        """Return where a manifest lies."""
        return self.root / "v1" / "ac" / key[:2] / f"{key}.json"
