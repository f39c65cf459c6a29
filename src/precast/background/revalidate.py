"""A second look at a warm start: trace the model again, elsewhere, and compare the pieces' texts.

`ask_child` sends the model's skeleton (tensors as sizes and dtypes, no data) to a
child process of low priority, `python -m precast.background.revalidate`, which captures and
cuts it as the cold path does. The serving process neither traces nor waits. The pickle is
this process's own, goes through a pipe and is never stored.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class CannotRevalidateError(Exception):
    """The model cannot be sent to another process; says why."""


def ask_child(request: dict[str, Any], called_off: threading.Event) -> set[str]:
    """Trace a model again in a child process; return the digests of its pieces' texts.

    Args:
        request: From `second_look`: `function` (None: the owner's `forward`), `owner`, `args`,
            `kwargs`, `config`, `packs`, `is_inference`.
        called_off: Set: the child is ended, and what comes back means nothing.

    Raises:
        CannotRevalidateError: The model cannot be sent, or cannot be captured there.
    """
    try:
        return _ask(_skeleton(request), called_off)
    except (OSError, ValueError, KeyError) as error:
        raise CannotRevalidateError(f"{type(error).__name__}: {error}") from error


def _ask(data: bytes, called_off: threading.Event) -> set[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PRECAST_DISABLE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "precast.background.revalidate", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )

    done = threading.Event()

    def end_when_called_off() -> None:
        while not done.wait(0.5):
            if called_off.is_set():
                process.kill()

    threading.Thread(target=end_when_called_off, daemon=True).start()
    try:
        answer, _ = process.communicate(data)
    finally:
        done.set()
        process.kill()
    for line in answer.decode(errors="replace").splitlines():
        if line.startswith('{"precast"'):
            found = json.loads(line)["precast"]
            if "problem" in found:
                raise CannotRevalidateError(found["problem"])
            return set(found["texts"])
    raise CannotRevalidateError(f"the child process ended with {process.returncode}")


# ---------------------------------------------------------------------------
# The model without its data


class _SkeletonPickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter):
                raise CannotRevalidateError(f"a tensor is a {type(value).__name__}")
            if value.device.type != "cpu":
                # An empty CPU tensor costs address space; on a GPU it would cost the model's size.
                raise CannotRevalidateError("tensors on a GPU are not copied for a second look")
            spec = (str(value.dtype), tuple(value.shape), tuple(value.stride()))
            is_parameter = isinstance(value, torch.nn.Parameter)
            return empty_tensor, (*spec, is_parameter, value.requires_grad)
        return NotImplemented


def empty_tensor(
    dtype: str, shape: Any, stride: Any, is_parameter: bool, requires_grad: bool
) -> Any:
    """Return a tensor of the given kind whose memory is never touched."""
    import torch

    tensor = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype.removeprefix("torch.")))
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor


def _skeleton(request: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        _SkeletonPickler(buffer).dump(request)
    except CannotRevalidateError:
        raise
    except Exception as error:
        raise CannotRevalidateError(
            f"it cannot be sent: {type(error).__name__}: {error}"
        ) from error
    if b"__main__" in buffer.getvalue():
        raise CannotRevalidateError("a class is defined in the main script, which no child may run")
    return buffer.getvalue()


# ---------------------------------------------------------------------------
# The child


def texts_of(request: dict[str, Any]) -> list[str]:
    """Return the digests of the pieces' texts of a call, as an assembly keeps them.

    Raises:
        PrecastError: It cannot be captured or cut.
    """
    from precast.backend import digests_of_texts
    from precast.capture.dynamo import capture_call

    owner, config = request["owner"], request["config"]
    capture = capture_call(
        request["function"] or type(owner).forward,
        owner,
        request["args"],
        request["kwargs"],
        dynamic_shapes=config.dynamic_shapes,
        name="revalidation",
    )
    return [] if capture is None else digests_of_texts(capture, config, request["packs"])


def main() -> None:
    """Read one skeleton, answer the digests of its pieces' texts."""
    from precast.background.limits import die_with_parent, lower_priority

    lower_priority()
    die_with_parent(int(sys.argv[1]))
    data = sys.stdin.buffer.read()
    try:
        import torch

        # The parent's own bytes, straight from its pipe: never from a tier.
        request = pickle.loads(data)
        with torch.inference_mode(request["is_inference"]), torch.no_grad():
            texts = texts_of(request)
        answer: dict[str, Any] = {"texts": texts}
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told.
        answer = {"problem": f"{type(error).__name__}: {error}"}
    print(json.dumps({"precast": answer}), flush=True)  # noqa: T201 - this is the answer.


if __name__ == "__main__":
    main()
