from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from precast.blueprint import check_source
from precast.capture.call_check import signature_of
from precast.capture.dynamo import Capture, capture_call
from precast.capture.guards import GuardRecorder
from precast.capture.places import Scope
from precast.contract import Unrecordable, decode


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = 2.0
        self.steps = [1, 2]

    def forward(
        self, x: torch.Tensor, past: list[torch.Tensor], flag: bool = True, **options: Any
    ) -> torch.Tensor:
        if not flag or options["mode"] != "sum" or "other" in options:
            return x
        for step in self.steps:
            x = x + step
        if x.shape[0] == past[0].shape[0] and x.shape[0] > 2:
            return self.linear(x) * self.scale + past[0]
        return x


@pytest.fixture(scope="module")
def captured() -> Capture:
    with torch.no_grad():
        capture = capture_call(
            Model.forward, Model(), (torch.ones(3, 4), [torch.ones(3, 4)]), {"mode": "sum"}
        )
    assert capture is not None
    assert capture.unrecordable is None
    return capture


def test_guards_on_the_model_are_checks_of_the_contract(captured: Capture) -> None:
    """What the model holds is checked once at load, so none of it is asked at a call."""
    contract = captured.contract
    assert contract is not None
    checks = {
        (contract.node_name(node), kind): payload
        for node, kind, payload in captured.recorder.checks
    }

    assert checks["self", "type"] == f"{__name__}:Model"
    assert checks["self.scale", "value"] == ["float", (2.0).hex()]
    assert checks["self.steps", "len"] == 2
    assert checks["self.steps[1]", "value"] == 2
    weight = "self._modules['linear']._parameters['weight']"
    assert checks[weight, "tensor"] == ["torch.float32", [4, 4], [4, 1], "cpu"]
    assert "forward" in checks["self._modules['linear']", "absent"]
    assert {name.partition(".")[0] for name, _ in checks} == {"self"}
    assert not [text for text in captured.recorder.writer.conditions if "self" in text]


def test_guards_on_the_call_refuse_another_call_with_the_condition(captured: Capture) -> None:
    """Every argument that tracing looked at is asked again; a size that varies is not."""
    writer = captured.recorder.writer
    header = f"def check({signature_of(Model.forward.__code__)}):"
    namespace: dict[str, Any] = {
        "TENSORS": frozenset((torch.Tensor, nn.Parameter)),
        "is_grad_enabled": torch.is_grad_enabled,
    }
    namespace.update((name, decode(data)) for name, data in writer.constants.items())
    exec(check_source(header, writer.lines), namespace)

    def check(*args: Any, flag: Any = True, **options: Any) -> str:
        return writer.conditions[namespace["check"](None, *args, flag, **options)]

    x, longer = torch.ones(3, 4), torch.ones(5, 4)
    assert check(x, [x], mode="sum") == "everything holds"
    assert check(longer, [longer], mode="sum") == "everything holds"
    assert check(x, [x.half()], mode="sum") == "past[0] is torch.float32"
    assert check(x, [x, x], mode="sum") == "past has 1 items"
    assert check(x, [x], mode="mean") == "options['mode'] == 'sum'"
    assert check(x, [x], mode="sum", flag=False) == "flag is True"
    assert check(x, [x], mode="sum", flag=1) == "flag is True"
    assert check(x, [x], mode="sum", other=1) == "'other' is not in options"
    assert check(x[:2], [x[:2]], mode="sum") == "3 <= x.size()[0]"
    assert "L['past'][0].size()[0]" in check(x, [longer], mode="sum")


def guard(kind: str, source: str, value: Any = None, **options: Any) -> Any:
    """Return a guard as Dynamo hands it over, as far as the recorder looks."""
    create = functools.partial(print, **options)
    original = SimpleNamespace(originating_source=source, create_fn=create, code_list=[source])
    return SimpleNamespace(guard_type=kind, value=value, has_value=True, orig_guard=original)


def record(*guards: Any) -> GuardRecorder:
    recorder = GuardRecorder(Scope(Model.forward, True, {"__import_torch": "torch"}, {}))
    recorder.record_all(guards, {})
    return recorder


def test_what_the_builds_or_the_process_state_settle_is_not_recorded() -> None:
    recorder = record(
        guard("GRAD_MODE", ""),
        guard("FUNCTION_MATCH", "G['__import_torch'].add", torch.add),
        guard("FUNCTION_MATCH", "__import__('torch').add", torch.add),
    )

    assert recorder.checks == []
    assert recorder.writer.conditions == ["everything holds"]


@pytest.mark.parametrize(
    "unknown",
    [
        guard("OF_ANOTHER_TORCH", "L['self'].scale", 2.0),
        guard("OF_ANOTHER_TORCH", "L['x']", 2.0),
        guard("EQUALS_MATCH", "__import__('unit').scale", 2.0),
        guard("EQUALS_MATCH", "type(L['x']).scale", 2.0),
        guard("DUPLICATE_INPUT", "L['x']", source_b="L['self'].buffer"),
        guard("DUPLICATE_INPUT", "L['self'].buffer", source_b="L['x']"),
        guard("SHAPE_ENV", "L['self'].weight.size()[0] == L['x'].size()[0]"),
        guard("SHAPE_ENV", "unheard_of(L['x'].size()[0])"),
    ],
    ids=lambda unknown: f"{unknown.guard_type} {unknown.orig_guard.originating_source}",
)
def test_a_guard_that_is_no_data_is_refused_and_never_left_out(unknown: Any) -> None:
    """A model whose guards cannot be kept whole is traced at each start."""
    with pytest.raises(Unrecordable):
        record(unknown)
