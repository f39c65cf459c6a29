from __future__ import annotations

import torch

from precast.torch_private import storage_use_count


def test_shared_memory_is_counted() -> None:
    """
    Every tensor over a memory counts, and goes with it: whether a weight may move depends on it.
    """
    tensor = torch.ones(4)
    alone = storage_use_count(tensor)
    view = tensor[1:]
    assert storage_use_count(tensor) == storage_use_count(view) == alone + 1
    del view
    assert storage_use_count(tensor) == alone
    parameter = torch.nn.Parameter(torch.ones(1))
    assert storage_use_count(parameter) == alone
