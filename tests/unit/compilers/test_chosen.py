"""What may be chosen as a compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from precast.compilers.chosen import ChosenCompilers, check_compiler
from precast.config import CompilationConfig
from precast.errors import ConfigError
from precast.passes.chosen import NO_PASSES
from unit.compilers.example_pieces import TINY, spec


def test_what_is_no_compiler_is_refused() -> None:
    with pytest.raises(ConfigError, match="is_saveable"):
        check_compiler(object())


@pytest.mark.parametrize("setting", ["auto", "inductor_standalone"])
def test_code_for_the_first_gpu_is_not_for_another(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pieces elsewhere are eager, or another compiler's; what is shared keeps its name."""
    compilers = ChosenCompilers(CompilationConfig(compiler=setting), NO_PASSES)
    on_gpu = replace(TINY, inputs=(replace(spec("s0"), device="cuda"),))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "inductor_standalone" in compilers.names_here(on_gpu)
    work = compilers.work_name(on_gpu)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert compilers.names_here(on_gpu) == (("aot_inductor",) if setting == "auto" else ())
    assert compilers.names_for_worker(on_gpu) == compilers.names_here(on_gpu)
    assert compilers.work_name(on_gpu) == work
    assert compilers.names_here(TINY) == compilers.names


def test_a_key_is_for_the_kind_of_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs of one machine, each has its own."""
    compilers = ChosenCompilers(CompilationConfig(), NO_PASSES)
    on_gpu = replace(TINY, inputs=(replace(spec("s0"), device="cuda"),))
    found = []
    for capability in ((9, 0), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)  # noqa: B023
        key = compilers.compute_hash_keys(on_gpu, compilers.make("aot_inductor"))
        found.append((key.digest, key.parts["architecture"]))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert [architecture for _, architecture in found] == ["sm_90", "sm_80", "sm_90"]
