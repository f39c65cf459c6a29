"""What all wrappers share is compiled once, and whatever is unexpected is left to torch's way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from precast import behind
from precast.compilers import wrapper_build
from precast.compilers.wrapper_build import WrapperBuild
from precast.torch_private import aoti_interface

INTERFACE = "#include <string>\nint interface() { return 1; }"


def kernel_loading_source() -> str:
    """Return the C++ with which torch's wrappers load a GPU's kernels."""
    from torch._inductor.codegen.common import get_device_op_overrides

    return get_device_op_overrides("cuda").kernel_driver()


# A compiler in name: notes its arguments and makes the file that it is asked for.
FAKE_COMPILER = """#!{python}
import sys, time
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
if "FAIL" in "".join(open(a).read() for a in arguments if a.endswith(".cpp")):
    sys.exit(1)
time.sleep(0.2)
open(arguments[arguments.index("-o") + 1], "w").close()
"""


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "g++"
    path.write_text(FAKE_COMPILER.format(python=sys.executable, log=str(tmp_path / "log")))
    path.chmod(0o755)
    return path


def compile_wrapper(folder: Path, compiler: Path, name: str, model: str = "int model();") -> bool:
    source = folder / f"{name}.wrapper.cpp"
    source.write_text(f"#define DEVICE\n{INTERFACE}\n\n{model}\n")
    build = WrapperBuild(INTERFACE, folder / "kept", "2.13")
    target = str(folder / f"{name}.wrapper.o")
    return build.run([str(compiler), "-O1", "-c", str(source), "-o", target], str(folder))


def lines_with(folder: Path, text: str) -> list[str]:
    return [line for line in (folder / "log").read_text().splitlines() if text in line]


def test_the_interface_is_compiled_once_and_joined_to_each_model(
    tmp_path: Path, compiler: Path
) -> None:
    assert compile_wrapper(tmp_path, compiler, "a")
    assert compile_wrapper(tmp_path, compiler, "b")

    assert len(lines_with(tmp_path, " interface.cpp")) == 1
    assert len(lines_with(tmp_path, ".model.cpp")) == 2
    assert [(tmp_path / f"{name}.wrapper.o").exists() for name in "ab"] == [True, True]
    model = (tmp_path / "a.wrapper.model.cpp").read_text()
    assert "interface()" not in model
    assert model.split() == ["#define", "DEVICE", "#include", "<string>", "int", "model();"]
    kept = sorted(path.suffix for path in (tmp_path / "kept").iterdir())
    assert kept == [".lock", ".o"], "temporary files are left"


def test_an_interface_of_another_form_is_compiled_as_it_is() -> None:
    assert wrapper_build.unlocked(INTERFACE) == INTERFACE
    twice = 2 * f"{wrapper_build._RUN}) {{}}\n{wrapper_build._DELETE}) {{}}\n"
    assert wrapper_build.unlocked(twice) == twice


def test_a_wrapper_gives_way_before_each_kernel_that_it_loads() -> None:
    assert wrapper_build.giving_way("int model();") == "int model();"
    loads = [
        f"{wrapper_build._LOADING}(&mod, filePath.c_str()));",
        f"{wrapper_build._LOADING}Data(&mod, start));",
    ]
    changed = wrapper_build.giving_way("\n".join(loads)).splitlines()
    for load in loads:
        assert changed[changed.index(load) - 1] == "precast_give_way();"
    assert f'std::strcmp(name, "{behind.NAME}")' in "\n".join(changed)


def test_torch_still_loads_kernels_as_the_change_expects() -> None:
    assert wrapper_build._LOADING in kernel_loading_source()


def test_several_at_once_share_one_interface(tmp_path: Path, compiler: Path) -> None:
    done: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: done.append(compile_wrapper(tmp_path, compiler, n)))
        for n in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert done == [True] * 4
    assert len(lines_with(tmp_path, " interface.cpp")) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "x.kernel.cpp", "-o", "x.o"],
        ["-shared", "x.wrapper.cpp", "-o", "x.so"],
        ["-c", "absent.wrapper.cpp", "-o", "x.o"],
    ],
)
def test_other_commands_are_left_alone(
    tmp_path: Path, compiler: Path, arguments: Sequence[str]
) -> None:
    build = WrapperBuild(INTERFACE, tmp_path / "kept", "2.13")

    assert not build.run([str(compiler), *arguments], str(tmp_path))
    assert not (tmp_path / "log").exists()


def test_a_wrapper_of_another_form_is_left_alone(tmp_path: Path, compiler: Path) -> None:
    source = tmp_path / "x.wrapper.cpp"
    source.write_text("int another_interface();")
    build = WrapperBuild(INTERFACE, tmp_path / "kept", "2.13")

    assert not build.run([str(compiler), "-c", str(source), "-o", "x.o"], str(tmp_path))


def test_what_does_not_compile_so_is_left_to_the_command_as_it_was(
    tmp_path: Path, compiler: Path
) -> None:
    assert not compile_wrapper(tmp_path, compiler, "a", model="FAIL")


def test_another_compiler_gets_another_interface(tmp_path: Path, compiler: Path) -> None:
    compile_wrapper(tmp_path, compiler, "a")
    os.utime(compiler, (1, 1))  # An update.
    compile_wrapper(tmp_path, compiler, "b")

    assert len(lines_with(tmp_path, " interface.cpp")) == 2


def test_torch_has_the_text_and_the_header_that_are_expected() -> None:
    """A canary: where this fails wrappers are compiled as torch does it, in twice
    the time, and they keep Python's lock while they run.
    """
    import torch

    interface, _ = aoti_interface()
    include = Path(torch.__file__).parent / "include"
    header = (include / wrapper_build._HEADER).read_text()
    changed, count = wrapper_build._PARSER.subn("", header)

    assert "AOTInductorModelContainerRun(" in interface
    assert "PyEval_SaveThread" in wrapper_build.unlocked(interface)
    assert count == 1
    assert "std::regex" in header
    assert "std::regex" not in changed


PARSER_CHECK = r"""
#include <cstdint>
#include <iostream>
#include <regex>
#include <stdexcept>
#include <string>
#define AOTI_RUNTIME_CHECK(EXPR, MSG) do { if (!(EXPR)) throw std::runtime_error(MSG); } while (0)
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
namespace theirs { THEIRS }
namespace ours { OURS }
template <class F> std::string say(F parse, const std::string& name) {
  int32_t kind = -7, index = -7;
  try { parse(name, kind, index); } catch (const std::runtime_error& e) { return e.what(); }
  return std::to_string(kind) + "/" + std::to_string(index);
}
int main() {
  for (std::string name : {"cpu", "cpu:3", "cuda", "cuda:0", "cuda:12", "cuda:",
                           "cuda:x", "cuda:1x", "cuda:-1", "cuda:1:2", "", ":", "cudax",
                           "CPU", "xpu", "mps:0"})
    if (say(theirs::parse_device_str, name) != say(ours::parse_device_str, name)) {
      std::cout << name << ": " << say(theirs::parse_device_str, name) << " != "
                << say(ours::parse_device_str, name) << "\n";
      return 1;
    }
}
"""


@pytest.mark.compile
def test_device_names_are_parsed_as_torch_parses_them(tmp_path: Path) -> None:
    import torch

    header = Path(torch.__file__).parent / "include" / wrapper_build._HEADER
    theirs = wrapper_build._PARSER.search(header.read_text())
    assert theirs is not None
    program = PARSER_CHECK.replace("THEIRS", theirs.group())
    program = program.replace("OURS", wrapper_build._NEW_PARSER)
    (tmp_path / "check.cpp").write_text(program)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-std=c++17", str(tmp_path / "check.cpp"), "-o", str(tmp_path / "check")],
        check=True,
    )
    done = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout
