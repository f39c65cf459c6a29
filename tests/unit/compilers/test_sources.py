"""What Inductor generated is kept as text: small, without paths, and read back with a bound."""

from __future__ import annotations

import zlib
from base64 import b64encode
from pathlib import Path

from precast.compilers.sources import aoti_sources, pack, unpack

WRAPPER = """\
#include <torch/csrc/inductor/aoti_runtime/interface.h>
/* @triton.jit
def triton_kernel(): ... */
/* another comment */
static void check_input_0() {}
void AOTInductorModel::run_impl(
    int stream) { kernel(); }
// Compile cmd
// g++ /home/me/build/a.wrapper.cpp -o /home/me/build/a.o
"""
KERNEL = """\
// Triton kernels are embedded as comments in /home/me/build/a.wrapper.cpp
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel() {}  // a / b stays
"""


def test_kernels_and_their_calls_are_kept_without_paths(tmp_path: Path) -> None:
    (tmp_path / "a.wrapper.cpp").write_text(WRAPPER)
    (tmp_path / "a.wrapper.model.cpp").write_text(WRAPPER)
    (tmp_path / "b.kernel.cpp").write_text(KERNEL)
    found = aoti_sources(tmp_path)
    assert sorted(found) == ["kernels.cpp", "wrapper.cpp"]
    assert "kernel() {}  // a / b stays" in found["kernels.cpp"]
    assert found["wrapper.cpp"].startswith("/* @triton.jit")
    assert "run_impl" in found["wrapper.cpp"]
    assert "check_input_0" not in found["wrapper.cpp"]
    assert "/home" not in "".join(found.values())


def test_texts_come_back_as_they_were() -> None:
    sources = {"kernels.cpp": "void kernel() {}  // µ\n" * 1000}
    packed = pack(sources)
    assert len(packed["kernels.cpp"]) < 1000
    assert unpack(packed) == sources


def test_what_was_not_packed_is_left_out_and_nothing_grows_without_bound() -> None:
    bomb = b64encode(zlib.compress(bytes(64 << 20))).decode()
    found = unpack({"a": "no base64!", "b": 3, "c": b64encode(b"no zlib").decode(), "d": bomb})
    assert list(found) == ["d"]
    assert len(found["d"]) == 256 << 10
    assert unpack(None) == unpack(["a"]) == {}
