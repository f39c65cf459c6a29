"""A capture on one GPU serves on any: with fake tensors, so that no GPU is needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from precast.background.capture import draw_call
from precast.binding import Binding, bind
from precast.capture import gpus
from precast.capture.dynamo import capture_call
from precast.config import CompilationConfig
from precast.errors import CaptureError, Reason
from precast.passes.chosen import NO_PASSES


class Net(torch.nn.Module):
    """A weight, a buffer, and a tensor that its code makes on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.register_buffer("shift", torch.empty(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        return torch.nn.functional.linear(x, self.weight) + self.shift + place


class Spread(Net):
    """One part of it is on another GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.empty(4, device="cuda:2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight).to(self.shift.device) + self.shift


class Attribute(Net):
    """Its code names the device that it was made on."""

    def __init__(self) -> None:
        super().__init__()
        self.device = self.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.arange(4, device=self.device)


class Text(Net):
    """As who gathers outputs on the first GPU writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to("cuda:0")


class Device(Net):
    """The same with a device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(torch.device("cuda", 0))


class Built(Net):
    """A name that is built of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(f"cuda:{self.number}")


class Made(Net):
    """A tensor that is made on a GPU of its own choice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.arange(4, device="cuda:0")


class Current(Net):
    """It names no GPU, and means the current one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.arange(4, device="cuda")


class Told(Net):
    """The call says where to."""

    def forward(self, x: torch.Tensor, where: str = "cuda:0") -> torch.Tensor:
        return super().forward(x).to(where)


class Answered(Net):
    """A device is a part of its answer."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x.device


def make(kind: Any, number: int) -> tuple[Any, Any]:
    """Return a model and its input on a GPU that need not be there."""
    with FakeTensorMode(), torch.device(f"cuda:{number}"):
        return kind().eval(), torch.empty(5, 4)


def blueprint(kind: Any, number: int) -> dict[str, Any]:
    """Return a captured and cut model as data."""
    model, x = make(kind, number)
    config = CompilationConfig(compiler="eager")
    with torch.inference_mode():
        captured = draw_call(kind.forward, model, (x,), {}, config, NO_PASSES, "net")
    return captured.blueprint.to_json()


def test_a_capture_is_the_same_on_every_gpu() -> None:
    first, second = blueprint(Net, 0), blueprint(Net, 1)
    assert (first.pop("gpu"), second.pop("gpu")) == (0, 1)
    assert first["is_for_any_gpu"]
    assert "cuda:" not in json.dumps(first)
    # Dynamo's names for a compiled function are new each time.
    for found in (first, second):
        del found["entry"], found["check"]["filename"]
    assert first == second


@pytest.mark.parametrize(
    "kind",
    [Attribute, Text, Device, Built, Made, Current, Told, Answered],
    ids=lambda k: k.__name__,
)
def test_a_model_that_names_its_gpu_is_for_that_one(kind: Any) -> None:
    found = blueprint(kind, 0)
    assert found["gpu"] == 0
    assert not found["is_for_any_gpu"]
    is_current = "current_gpu() == GPU" in "\n".join(found["check"]["lines"])
    assert is_current == (kind is Current)


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "is_name"),
    [
        ("to", (0,), {}, True),
        ("to", ("cuda:0",), {}, True),
        ("cuda", (1,), {}, True),
        ("new_zeros", ((2, 3),), {"device": 1}, True),
        (
            "new_zeros",
            ((2, 3),),
            {"device": torch.device("cuda", 1)},
            False,
        ),  # An input's, perhaps.
        ("view", (2, 3), {}, False),
        ("to", (torch.float16,), {}, False),
    ],
)
def test_a_number_is_a_gpu_where_a_device_belongs(
    method: str, args: Any, kwargs: Any, is_name: bool
) -> None:
    graph = torch.fx.Graph()
    node = graph.call_method(method, (graph.placeholder("x"), *args), kwargs)
    assert any(map(gpus._is_name, gpus._devices(node))) == is_name


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_contract_binds_where_the_model_is_and_nowhere_else() -> None:
    model, x = make(Net, 0)
    with torch.inference_mode():
        capture = capture_call(Net.forward, model, (x,), {}, name="net")
        assert capture is not None
        assert capture.contract is not None
        other, _ = make(Net, 1)
        assert isinstance(bind(capture.contract, Net.forward, other, gpu=1), Binding)
        refused = bind(capture.contract, Net.forward, other, gpu=0)
    assert isinstance(refused, Reason)
    assert "cuda:1" in refused.message


def test_a_model_on_several_gpus_is_refused() -> None:
    model, x = make(Spread, 0)
    with torch.inference_mode(), pytest.raises(CaptureError, match="cuda:0, cuda:2"):
        capture_call(Spread.forward, model, (x,), {}, name="net")
