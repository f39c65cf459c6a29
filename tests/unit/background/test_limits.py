from __future__ import annotations

from precast.background.limits import gpu_names


def test_workers_are_given_gpus_by_the_names_that_this_process_was_given() -> None:
    assert gpu_names([0, 1], None) == ["0", "1"]
    assert gpu_names([0, 2], "4, 5,GPU-6") == ["4", "GPU-6"]
    assert gpu_names([1], "4,5") == ["5"]
    assert gpu_names([], None) == []
