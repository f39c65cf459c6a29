"""Compiling AOTInductor's C++ wrapper in half the time: what all pieces share is compiled once.

A piece's `wrapper.cpp` holds two things. The *interface* is the same in every piece: the C
functions of a library, over a container of models. The *model* is the piece. torch compiles both
together, and with them an instance of `std::regex` that parses the name of a device. Here

- the interface becomes an object file once a machine, kept beside torch's own caches, and is
  joined to each model's object;
- the parser of device names is one without a regular expression, in a copy of torch's header that
  is found before the original;
- a GPU's kernels are loaded with pauses where calls are served meanwhile;
- the interface's entry lets other Python threads run while a piece does, as every operator of torch
  does when it runs eager. torch's runner keeps Python's lock, and a server stands still meanwhile.

g++ over one wrapper, seconds of CPU time, torch 2.13, gcc 12: 5.5 to 6.6 as torch does it, 2.5 so
(the interface once: 3). Nothing here knows torch's build system: a command comes in, and False
goes out where it is to be run as it is, which is always right.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from precast.behind import NAME

_HEADER = Path("torch/csrc/inductor/aoti_runtime/model_base.h")
_PARSER = re.compile(r"^inline void parse_device_str\(.*?^}$", re.DOTALL | re.MULTILINE)
_INCLUDE_REGEX = "#include <regex>"
# What `<regex>` brought in by the way.
_INSTEAD_OF_REGEX = "\n".join(
    f"#include <{name}>"
    for name in (
        "algorithm",
        "functional",
        "locale",
        "map",
        "memory",
        "sstream",
        "string",
        "vector",
    )
)
# As strict as "(cpu|cuda|xpu|mps)(:([0-9]+))?".
_NEW_PARSER = """\
inline void parse_device_str(
    const std::string& device_str,
    int32_t& device_type,
    int32_t& device_idx) {
  const auto colon = device_str.find(':');
  const std::string kind = device_str.substr(0, colon);
  if (kind == "cpu") {
    device_type = aoti_torch_device_type_cpu();
  } else if (kind == "cuda") {
    device_type = aoti_torch_device_type_cuda();
#ifdef USE_XPU
  } else if (kind == "xpu") {
    device_type = aoti_torch_device_type_xpu();
#endif
#ifdef USE_MPS
  } else if (kind == "mps") {
    device_type = aoti_torch_device_type_mps();
#endif
  } else {
    AOTI_RUNTIME_CHECK(false, "Invalid device: " + device_str);
  }
  device_idx = -1;
  if (colon != std::string::npos) {
    const std::string index = device_str.substr(colon + 1);
    AOTI_RUNTIME_CHECK(
        !index.empty() && index.find_first_not_of("0123456789") == std::string::npos,
        "Invalid device: " + device_str);
    device_idx = std::stoi(index);
  }
}"""

_RUN, _DELETE = (
    f"AOTIRuntimeError AOTInductorModelContainer{name}(" for name in ("RunSingleThreaded", "Delete")
)
# The first run of a container folds constants, and on a GPU loads kernels, which changes it: that
# run is alone. Later ones keep no state, and several threads may be inside. On a GPU they only
# queue kernels, too little to hand Python's lock over for. No frame that takes the lock again
# catches exceptions: taking it ends a thread by one while the interpreter exits.
_UNLOCKED_ENTRY = """

#include <atomic>
#include <mutex>
#include <set>

extern "C" {

// Of the process, where that is Python.
__attribute__((weak)) int PyGILState_Check(void);
__attribute__((weak)) void* PyEval_SaveThread(void);
__attribute__((weak)) void PyEval_RestoreThread(void*);

}

namespace {

std::recursive_mutex precast_first_runs; // Never waited for with Python's lock.
std::mutex precast_guard; // Held for a look at the set only.
std::set<void*> precast_has_run;
std::atomic<void*> precast_ran_last{nullptr};

bool precast_did_run(void* container) {
  const std::lock_guard<std::mutex> look(precast_guard);
  if (!precast_has_run.count(container)) {
    return false;
  }
  precast_ran_last = container;
  return true;
}

} // namespace

extern "C" {

AOTIRuntimeError AOTInductorModelContainerRunSingleThreaded(
    AOTInductorModelContainerHandle container,
    AtenTensorHandle* inputs,
    size_t num_inputs,
    AtenTensorHandle* outputs,
    size_t num_outputs,
    AOTInductorStreamHandle stream,
    AOTIProxyExecutorHandle executor) {
  const bool has_run = precast_ran_last.load() == container;
#ifdef USE_CUDA
  if (has_run) {
    return precast_run(
        container, inputs, num_inputs, outputs, num_outputs, stream, executor);
  }
#endif
  const bool is_locked =
      PyGILState_Check && PyEval_SaveThread && PyEval_RestoreThread && PyGILState_Check();
  void* const thread = is_locked ? PyEval_SaveThread() : nullptr;
  std::unique_lock<std::recursive_mutex> alone(precast_first_runs, std::defer_lock);
  if (!has_run && !precast_did_run(container)) {
    alone.lock();
    if (precast_did_run(container)) { // In another thread, meanwhile.
      alone.unlock();
    }
  }
  const AOTIRuntimeError result = precast_run(
      container, inputs, num_inputs, outputs, num_outputs, stream, executor);
  if (alone.owns_lock()) {
    if (result == AOTI_RUNTIME_SUCCESS) {
      const std::lock_guard<std::mutex> look(precast_guard);
      precast_has_run.insert(container);
      precast_ran_last = container;
    }
    alone.unlock();
  }
  if (thread) {
    PyEval_RestoreThread(thread);
  }
  return result;
}

AOTIRuntimeError AOTInductorModelContainerDelete(
    AOTInductorModelContainerHandle container) {
  {
    const std::lock_guard<std::mutex> look(precast_guard);
    precast_has_run.erase(container);
    precast_ran_last = nullptr;
  }
  return precast_delete(container);
}

}
"""

# A GPU's driver starts no kernel, for any thread, while it loads one: a millisecond each. In the
# thread that works behind calls (`behind.py`) there is time for calls between two.
_LOADING = "CUDA_DRIVER_CHECK(cuModuleLoad"
_GIVE_WAY = f"""\
#include <pthread.h>
#include <unistd.h>
#include <cstring>

static inline void precast_give_way() {{
  char name[16] = "";
  if (!pthread_getname_np(pthread_self(), name, sizeof(name)) &&
      !std::strcmp(name, "{NAME}")) {{
    usleep(5000);
  }}
}}

"""


def giving_way(source: str) -> str:
    """Return a wrapper that pauses before each kernel that it loads behind calls."""
    if _LOADING not in source:
        return source
    return _GIVE_WAY + source.replace(_LOADING, f"precast_give_way();\n{_LOADING}")


def unlocked(interface: str) -> str:
    """Return torch's interface with an entry that gives Python's lock back; or as it is.

    It stays as it is where it is not of the form that is known.
    """
    if interface.count(_RUN) != 1 or interface.count(_DELETE) != 1:
        return interface
    changed = interface.replace(_RUN, "static AOTIRuntimeError precast_run(")
    return changed.replace(_DELETE, "static AOTIRuntimeError precast_delete(") + _UNLOCKED_ENTRY


class WrapperBuild:
    """Runs the compile commands of wrappers, in place of whoever asked for them.

    Args:
        interface: The text that every wrapper begins with, as torch's sources have it.
        folder: Keeps objects and headers; shared by all processes of the user.
        version: Of torch.
    """

    def __init__(self, interface: str, folder: Path, version: str) -> None:
        self._interface = interface.strip()
        self._folder = folder
        self._version = version

    def run(self, command: Sequence[str], cwd: str) -> bool:
        """Run a compile command if it compiles a wrapper; False: it is to be run as it is."""
        source = next((part for part in command if part.endswith(".wrapper.cpp")), None)
        if source is None or "-c" not in command or "-o" not in command:
            return False
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            return self._compile(list(command), str(Path(cwd, source)), source, cwd)
        return False

    def _compile(self, command: list[str], path: str, source: str, cwd: str) -> bool:
        before, found, model = Path(path).read_text().partition(self._interface)
        if not found:
            return False
        target = command.pop(command.index("-o") + 1)
        command.remove("-o")
        command.remove(source)
        command[1:1] = [f"-I{folder}" for folder in self._overlay(command)]
        # Errors name the file that they come from; an artifact is to name no path of a machine.
        folders = [part[2:] for part in command if part.startswith("-I")]
        command.extend(f"-fmacro-prefix-map={folder}/=" for folder in folders)
        model_source = Path(path).with_suffix(".model.cpp")
        includes = re.findall(r"^#include .*$", self._interface, re.MULTILINE)
        model_source.write_text(giving_way("\n".join((before, *includes, model))))
        shared = _SharedObject(
            command, before + unlocked(self._interface), self._folder, self._version
        )
        building = shared.begin()
        model_object = f"{target}.model.o"
        done = _run([*command, str(model_source), "-o", model_object], cwd)
        shared_object = shared.finish(building)
        if not done or shared_object is None:
            return False
        joined = [command[0], "-r", "-nostdlib", model_object, str(shared_object), "-o", target]
        return _run(joined, cwd)

    def _overlay(self, command: Sequence[str]) -> list[str]:
        """Return the folder with torch's header changed; empty where it is not as expected."""
        for part in command:
            header = Path(part[2:], _HEADER) if part.startswith("-I") else None
            if header is None or not header.is_file():
                continue
            text = header.read_text()
            changed, count = _PARSER.subn(lambda _: _NEW_PARSER, text)
            changed = changed.replace(_INCLUDE_REGEX, _INSTEAD_OF_REGEX)
            if count != 1 or "std::regex" in changed:
                return []
            folder = self._folder / f"include-{sha256(changed.encode()).hexdigest()[:32]}"
            place = folder / _HEADER
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(place, changed)
            return [str(folder)]
        return []


class _SharedObject:
    """The interface as an object file: found, or compiled by one process for all."""

    def __init__(self, command: list[str], text: str, folder: Path, version: str) -> None:
        compiler = Path(shutil.which(command[0]) or command[0]).resolve()
        stat = compiler.stat()
        parts = (version, str(compiler), str(stat.st_mtime_ns), str(stat.st_size), *command, text)
        key = sha256("\0".join(parts).encode()).hexdigest()
        self._path = folder / f"{key}.o"
        self._scratch = folder / f"{key}-{os.getpid()}"
        self._command = command
        self._text = text
        self._lock: int | None = None

    def begin(self) -> subprocess.Popen[bytes] | None:
        """Start compiling beside the model, unless it is there or another process is at it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() or not self._take_lock(wait=False):
            return None
        return self._start()

    def finish(self, building: subprocess.Popen[bytes] | None) -> Path | None:
        """Return the object when it is there; None: it cannot be compiled."""
        try:
            if building is None and not self._path.exists():
                self._take_lock(wait=True)  # Whoever is at it: done, or dead.
                if not self._path.exists():
                    building = self._start()
            if building is not None:
                if building.wait() != 0:
                    return None
                (self._scratch / "interface.o").replace(self._path)
            return self._path
        finally:
            if self._lock is not None:
                os.close(self._lock)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _take_lock(self, *, wait: bool) -> bool:
        import fcntl

        self._lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            return False
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        self._scratch.mkdir(exist_ok=True)
        (self._scratch / "interface.cpp").write_text(self._text)
        return subprocess.Popen(
            [*self._command, "interface.cpp", "-o", "interface.o"],
            cwd=self._scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _run(command: list[str], cwd: str) -> bool:
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    return done.returncode == 0


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
