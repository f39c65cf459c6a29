"""Checking some of a model's calls against eager while it serves: `verify="sample"`.

A `Sampler` stands before the compiled call of one assembly. It counts; of one call in N it keeps
the inputs and the outputs, and a thread of its own runs eager on them later. A difference counts
only if it shows again when both are run anew: weights may have been changed in between.
"""

from __future__ import annotations

import contextlib
import dis
import queue
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from precast.background.ambient import Ambient
from precast.breakable import Breakable, EndingThread
from precast.compilers.verify import TOLERANCES

#: Times a piece's tolerance: a model is many pieces, each of which may be that far from eager.
SLACK = 10.0

_TRIES = 3
_PAUSE_S = 0.05  # After each check: calls come first.
_WRITES = {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_SUBSCR"}
_WRITERS = {"object_setattr_ignore_descriptor", "append", "extend", "update", "clear", "insert"}
_PLAIN = (int, float, str, bytes, bool, complex, type(None), torch.dtype, torch.device)


class Sampler:
    """A compiled call of which one in so many is checked. Checks are left out while one runs."""

    def __init__(
        self,
        entry: Callable[..., Any],
        eager: Callable[..., Any],
        every: int,
        report: Callable[[str, Any, Any], None],
    ) -> None:
        """Check nothing yet.

        Args:
            entry: The compiled call.
            eager: The same, eager; takes the same arguments.
            every: One call in so many is checked.
            report: Told how compiled code gets a call wrong, and of its args and kwargs, from
                another thread.
        """
        self._entry = entry
        self._eager = eager
        self._every = every
        self._report = report
        self._num_calls = 0
        self._samples: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._breakable = Breakable()
        self.num_checked = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call."""
        # Not exact under several threads, and need not be.
        self._num_calls = number = self._num_calls + 1
        if number % self._every:
            return self._entry(*args, **kwargs)
        if not self._samples.empty() or not _is_plain((args, kwargs)):
            self._ensure_thread()
            return self._entry(*args, **kwargs)
        inputs = _copied((args, kwargs))
        result = self._entry(*args, **kwargs)
        ambient = Ambient.now(is_on_gpu=torch.cuda.is_initialized())
        self._hand_over((inputs, _copied(result), ambient, _marks(inputs, result)))
        return result

    def _hand_over(self, sample: Any) -> None:
        with contextlib.suppress(queue.Full):
            self._samples.put_nowait(sample)
        self._ensure_thread()

    def _ensure_thread(self) -> None:
        if self._breakable.is_over or (self._thread is not None and self._thread.is_alive()):
            return
        self._breakable = breakable = Breakable()  # One for each thread: a fork's has its own.
        samples = self._samples

        def end(patience_s: float) -> None:
            breakable.break_off(patience_s)
            with contextlib.suppress(queue.Full):  # Else it has one, and is not let in.
                samples.put_nowait(None)

        self._thread = EndingThread(self._check_all, breakable, name="precast-sample", end=end)
        with contextlib.suppress(RuntimeError):  # There is no thread left: nothing is checked.
            self._thread.start()

    def _check_all(self, breakable: Breakable) -> None:
        while self._check_next(breakable):
            threading.Event().wait(_PAUSE_S)

    def _check_next(self, breakable: Breakable) -> bool:
        """Wait for a sample and check it; False: there is none, or no need of another one."""
        try:
            # A thread of a model that is called no more ends.
            sample = self._samples.get(timeout=5.0)
        except queue.Empty:
            return False
        with breakable:
            problem = self._check_sample(*sample)
            if problem:
                self._report(problem, *sample[0])
            del sample  # Letting go of tensors is C++ too.
        if problem:
            return False
        self.num_checked += 1
        return True

    def _check_sample(self, inputs: Any, result: Any, ambient: Ambient, marks: Any) -> str | None:
        for mark in marks:
            mark.synchronize()
        args, kwargs = inputs
        with ambient.around() as is_alike:
            return self._check(args, kwargs, result) if is_alike else None

    def _check(self, args: Any, kwargs: Any, result: Any) -> str | None:
        """Return how compiled code is wrong; None where it is not, or nobody can say."""
        problem = None
        for _ in range(_TRIES):
            try:
                expected = self._eager(*args, **kwargs)
            except Exception:  # noqa: BLE001 - eager's own business.
                return None
            problem = difference(result, expected)
            if problem is None:
                return None
            if difference(self._eager(*args, **kwargs), expected):
                return None  # It draws random numbers, or somebody is changing the weights.
            result = self._entry(*args, **kwargs)
        return problem


def why_not_sampled(entry: types.CodeType, mutates: bool) -> str | None:
    """Say why an assembly's calls cannot be run a second time; None: they can."""
    if mutates:
        return "a call writes into its arguments or the model, and is not run a second time"
    for code in _with_nested(entry):
        if any(step.opname in _WRITES for step in dis.get_instructions(code)) or (
            _WRITERS & set(code.co_names)
        ):
            return "a call changes Python objects, and is not run a second time"
    return None


def difference(found: Any, expected: Any) -> str | None:
    """Say how two results of a call differ by more than rounding; None: they do not."""
    mine, others = list(_tensors(found)), list(_tensors(expected))
    if len(mine) != len(others):
        return f"{len(mine)} tensors come out, in eager {len(others)}"
    for number, (ours, theirs) in enumerate(zip(mine, others, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {number} is {ours.dtype}{tuple(ours.shape)}, in eager {theirs.dtype}"
        if not (theirs.is_floating_point() or theirs.is_complex()):
            if not torch.equal(ours, theirs):
                return f"output {number}: integers differ"
            continue
        wide = torch.complex128 if theirs.is_complex() else torch.float64
        one, other = ours.to(wide), theirs.to(wide)
        finite = torch.isfinite(other)
        if not torch.equal(torch.isfinite(one), finite):
            return f"output {number} has NaN or infinity at other places than eager"
        if not bool(finite.any()):
            continue
        scale = max(float(other[finite].abs().max()), 1e-6)
        name = str(theirs.dtype).removeprefix("torch.")
        allowed = SLACK * TOLERANCES.get(name, 0.25) * scale
        off = float((one - other)[finite].abs().max())
        if off > allowed:
            return f"output {number} ({name}) is off by {off:.3g}, allowed {allowed:.3g}"
    return None


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        yield from _tensors(vars(value))


def _is_plain(value: Any) -> bool:
    """Whether a call's arguments can be kept: no object that a second run would change."""
    kind = type(value)
    if kind is torch.Tensor or kind in _PLAIN or isinstance(value, torch.nn.Module):
        return True
    if kind in (tuple, list):
        return all(map(_is_plain, value))
    return kind is dict and all(map(_is_plain, value.values()))


def _copied(value: Any) -> Any:
    """Return arguments or outputs with their tensors copied, layouts kept."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        return value.clone() if 0 in value.stride() else copy.copy_(value)
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        return {key: _copied(item) for key, item in vars(value).items()}
    return value


def _marks(*values: Any) -> list[Any]:
    """Return what to wait for before copies may be read in another thread."""
    devices = {tensor.device for tensor in _tensors(values) if tensor.device.type == "cuda"}
    marks = []
    for device in devices:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(device))
        marks.append(mark)
    return marks
