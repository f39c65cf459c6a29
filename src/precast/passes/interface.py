"""What a pass is: a change to an FX graph, with an identity that stands for what it does.

A pass computes the same with less. It may run in another process than the model, once for each
piece, and never at a warm start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from precast.passes.identity import identity_of

if TYPE_CHECKING:
    import torch

#: Matches: how many, or how many of each pattern; None where the pass does not count.
Matches = int | Mapping[str, int] | None
#: Ranges of sizes: symbol to (least, most), the most None where there is no bound.
Ranges = Mapping[str, tuple[int, int | None]]


class InductorPass:
    """Base of passes: `__call__` changes a graph in place and returns how often it matched.

    At the stage `"piece"` the graph is the piece as the model wrote it, torch's functions and
    methods, and nodes carry `meta["example_value"]`. At `"post_grad"` it is Inductor's, ATen
    operators after Inductor's own passes, and nodes carry `meta["val"]`. Both are fake tensors.
    New nodes need neither: what they compute is found out afterwards.

    What the pass made must compute outputs of the same number, shapes, strides and dtypes, and
    write into the same inputs; else it is undone. Whether the values are right is found out when
    the compiled piece is compared with the piece as it was.
    """

    stage: Literal["piece", "post_grad"] = "piece"
    name: str  # For reports; by default the class's.

    def __init_subclass__(cls) -> None:
        """Name a class that gives itself no name."""
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __call__(self, graph: torch.fx.Graph) -> Matches:
        """Change the graph in place."""
        raise NotImplementedError

    def identity(self) -> str | None:
        """Return what stands for this pass in a key; None: nothing does, so nothing is kept.

        By default the digest of the class's source, of what that refers to (functions, classes
        and constants, outside of torch and the standard library), and of the object's attributes.
        """
        return identity_of(self)

    def applies_to(self, ranges: Ranges) -> bool:
        """Whether the pass is for a piece whose sizes may lie in these ranges."""
        return True


class FunctionPass(InductorPass):
    """A function that takes a graph, as a pass."""

    def __init__(self, function: Callable[[torch.fx.Graph], Matches]) -> None:
        self.function = function
        self.name = getattr(function, "__qualname__", type(function).__name__)

    def __call__(self, graph: torch.fx.Graph) -> Matches:
        """Let the function change the graph."""
        return self.function(graph)

    def identity(self) -> str | None:
        """Return the digest of the function and of what it refers to."""
        return identity_of(self.function)


def as_pass(value: Any) -> InductorPass:
    """Return what a person gave as a pass: an object, its class, or a function of a graph.

    Raises:
        TypeError: It is none of them.
    """
    if isinstance(value, type):
        value = value()
    if isinstance(value, InductorPass):
        return value
    if callable(value):
        return FunctionPass(value)
    raise TypeError(f"a {type(value).__name__} is no pass")
