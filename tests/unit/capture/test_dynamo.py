from __future__ import annotations

import re
import sys
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.codegen import PyCodegen
from torch._dynamo.output_graph import OutputGraph

from precast.capture.dynamo import capture_call
from precast.contract import ambient_state
from precast.errors import CaptureError

EPS = 1e-5


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + EPS


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.scale = 2.0

    def forward(self, x: torch.Tensor, flag: bool = True) -> Any:
        if flag:
            return {"y": self.inner(x) * self.scale, "n": x.shape[0]}
        return x


@pytest.fixture(autouse=True)
def known_to_sys_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, module))


def test_a_call_becomes_data() -> None:
    """
    The graph, what the contract must hold of the model, and how each input is found.
    """
    model = Model()
    with torch.no_grad():
        capture = capture_call(Model.forward, model, (torch.randn(3, 4),), {}, name="Model")

    assert capture is not None
    assert capture.unrecordable is None
    contract = capture.contract
    assert contract is not None
    places = [contract.node_name(i) for i in contract.weights]
    assert [place.rpartition("['")[2] for place in places] == ["weight']", "bias']"]
    assert {path.rpartition(":")[2] for path, _ in contract.code} >= {"@", "Inner.forward"}
    checked = {contract.node_name(node): (kind, payload) for node, kind, payload in contract.checks}
    assert checked["self.scale"] == ("value", ["float", (2.0).hex()])
    assert any("EPS" in name for name in checked)
    assert contract.state == ambient_state()
    assert len(capture.entry.arguments) == 1
    assert [(bounds.low, bounds.high) for bounds in capture.ranges.values()]


def test_marks_on_a_users_tensor_are_taken_off_again() -> None:
    x = torch.randn(3, 4)
    with torch.no_grad():
        capture_call(Model.forward, Model(), (x,), {})

    assert not vars(x)


def constant(x: torch.Tensor) -> int:
    return 3


def test_a_call_that_computes_nothing_is_none() -> None:
    assert capture_call(constant, None, (torch.randn(3, 4),), {}) is None


def breaking(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def test_a_graph_break_is_an_error_that_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture_call(breaking, None, (torch.randn(3),), {}, name="breaking")

    assert caught.value.reason.code == "capture-failed"
    assert "breaking" in str(caught.value)
    assert re.search(r"test_dynamo\.py:\d+$", caught.value.location or "")


def test_a_call_that_eager_refuses_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch would print pages of its own; the error says it all."""
    with pytest.raises(CaptureError), torch.no_grad():
        capture_call(Model.forward, Model(), (torch.randn(3, 5),), {})

    assert capfd.readouterr().err == ""


def test_captures_in_several_threads_do_not_spoil_each_other() -> None:
    """Each takes its own arguments only, and Dynamo is afterwards what it was before."""
    before = (PyCodegen.make_call_generated_code, OutputGraph.graphargs)
    start = threading.Barrier(4)
    found: list[Any] = []

    def capture() -> None:
        model = Model()
        start.wait()
        for _ in range(3):
            captured = capture_call(Model.forward, model, (torch.randn(3, 4),), {})
            assert captured is not None
            found.append(captured.entry.arguments)

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(arguments) for arguments in found] == [1] * 12
    assert (PyCodegen.make_call_generated_code, OutputGraph.graphargs) == before
