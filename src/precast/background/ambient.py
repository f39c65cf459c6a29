"""The state of a thread and its process that changes what a model computes, taken elsewhere.

A capture in another thread or process must see what the call saw: `contract.ambient_state` goes
into the contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from precast.contract import ambient_state
from precast.runtime.gpu import on_gpu
from precast.values import Value


class Ambient(Value, kw_only=True):
    """What was set around a call; plain data."""

    state: dict[str, Any]
    is_inference: bool
    is_grad_enabled: bool
    gpu: int | None  # The current one: `device="cuda"` in a model's code is there.

    @staticmethod
    def now(*, is_on_gpu: bool) -> Ambient:
        """Return what is set here; which GPU is the current one only for what is on one."""
        import torch

        return Ambient(
            state=ambient_state(),
            is_inference=torch.is_inference_mode_enabled(),
            is_grad_enabled=torch.is_grad_enabled(),
            gpu=torch.cuda.current_device() if is_on_gpu else None,
        )

    @contextmanager
    def around(self) -> Iterator[bool]:
        """Set in this thread what belongs to a thread; yields whether all is as it was."""
        import torch

        with ExitStack() as stack:
            stack.enter_context(on_gpu(self.gpu))
            stack.enter_context(torch.inference_mode(self.is_inference))
            stack.enter_context(torch.set_grad_enabled(self.is_grad_enabled))
            for device, dtype in self.state["autocast"]:
                kind = getattr(torch, dtype.removeprefix("torch."))
                stack.enter_context(torch.autocast(device, dtype=kind))
            yield ambient_state() == self.state

    def set_in_process(self) -> None:
        """Set in this process what belongs to a process: for a child that does nothing else."""
        import torch

        state = self.state
        torch.set_default_dtype(getattr(torch, state["default_dtype"].removeprefix("torch.")))
        torch.use_deterministic_algorithms(state["deterministic"])
        torch.set_float32_matmul_precision(state["matmul_precision"])
        if state["default_device"] != "None":
            torch.set_default_device(state["default_device"])
        flash, memory_efficient, plain, cudnn = state["sdp"]
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(memory_efficient)
        torch.backends.cuda.enable_math_sdp(plain)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch._C._set_mkldnn_enabled(state["mkldnn"])
        if "tf32" in state:
            matmul: Any = torch.backends.cuda.matmul
            (
                matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32,
                matmul.allow_bf16_reduced_precision_reduction,
                matmul.allow_fp16_reduced_precision_reduction,
            ) = state["tf32"]
