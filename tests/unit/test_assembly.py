from __future__ import annotations

import base64
import marshal
from typing import Any

import pytest
import torch

from precast.assembly import Assembly, make_entry, open_assembly, open_check
from precast.errors import ArtifactIncompatibleError
from precast.runtime.slot import SlotTable

CHECK = "def check(x, y=1):\n    if not (type(x) is c0): return 1\n    return 0\n"


def marshalled(source: str) -> str:
    return base64.b64encode(marshal.dumps(compile(source, "<check>", "exec"))).decode()


def check_data(**changes: Any) -> dict[str, Any]:
    return {
        "source": CHECK,
        "filename": "<check>",
        "marshalled": marshalled(CHECK),
        "constants": {"c0": ["type", "torch:Tensor"]},
        "conditions": ["everything holds", "x is a Tensor"],
        **changes,
    }


def function(x: Any, y: int = 1) -> Any:
    return x


def fields(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(Assembly.__slots__)
    return {**found, "call_check": check_data(), **changes}


def test_an_assembly_survives_json() -> None:
    data = Assembly(**fields(seconds=3.0)).to_json()

    assert Assembly.from_json(data).to_json() == data


@pytest.mark.parametrize("name", ["version", "contract", "slots"])
def test_another_format_or_a_missing_part_is_incompatible(name: str) -> None:
    """An old or incomplete entry is a miss, never a crash."""
    data = Assembly(**fields()).to_json()
    del data[name]

    with pytest.raises(ArtifactIncompatibleError):
        Assembly.from_json(data)


def test_a_check_binds_arguments_as_the_function_does() -> None:
    check = open_check(check_data(), function)

    assert check(torch.ones(1)) == 0
    assert check(y=2, x=torch.ones(1)) == 0
    assert check(3) == 1
    with pytest.raises(TypeError):
        check()


@pytest.mark.parametrize(
    "changes",
    [
        {"marshalled": ""},
        {"marshalled": base64.b64encode(b"rubbish").decode()},
        {"constants": {"c0": ["type", "torch:NoSuchClass"]}},
        {"constants": {"c0": ["type", "no_such_package:Thing"]}},
    ],
)
def test_code_that_does_not_open_here_is_incompatible(changes: dict[str, Any]) -> None:
    """Bytecode of another Python, or a class that is not installed: captured again."""
    assembly = Assembly(**fields(call_check=check_data(**changes)))

    with pytest.raises(ArtifactIncompatibleError):
        open_assembly(assembly, "key", SlotTable(), function)


def test_an_entry_keeps_defaults_and_closure() -> None:
    factor = 3

    def closing(x: int, y: int = 2, *, z: int = 4) -> int:
        return (x + y + z) * factor

    entry = make_entry(closing.__code__, {}, closing)

    assert entry(1) == closing(1)
    assert entry(1, 5, z=6) == closing(1, 5, z=6)
