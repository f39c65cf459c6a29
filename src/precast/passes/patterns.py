"""Passes from pairs of functions: wherever a graph computes the first, it computes the second.

Built on torch's matchers: `torch.fx.subgraph_rewriter` for a piece's own graph, which matches
torch's functions and methods as they are written, and Inductor's pattern matcher after its passes,
which matches ATen operators however they were written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from precast.passes.identity import identity_of
from precast.passes.interface import InductorPass, Ranges

if TYPE_CHECKING:
    import torch


class PatternPass(InductorPass):
    """Replaces a pattern, given as a function, by what another function computes."""

    def __init__(
        self,
        pattern: Callable[..., Any],
        replacement: Callable[..., Any],
        *,
        stage: Literal["piece", "post_grad"],
        examples: Callable[[], Sequence[torch.Tensor]] | None,
        sizes: tuple[int, int | None] | None,
    ) -> None:
        self.pattern = pattern
        self.replacement = replacement
        self.stage = stage
        self.examples = examples
        self.sizes = sizes
        self.name = replacement.__name__
        self._home = (replacement.__module__, replacement.__qualname__)
        self._matcher: Any = None

    def __call__(self, graph: torch.fx.Graph) -> int:
        """Replace all matches; return how many there were."""
        if self.stage == "piece":
            from torch.fx.subgraph_rewriter import replace_pattern

            module = graph.owning_module
            assert module is not None
            return sum(
                len(replace_pattern(module, pattern, self.replacement))
                for pattern in _spellings(self.pattern)
            )
        if self._matcher is None:
            from precast.torch_private import replacement_matcher

            assert self.examples is not None
            self._matcher = replacement_matcher(
                self.pattern, self.replacement, self.examples, self.name
            )
        count: int = self._matcher.apply(graph)
        return count

    def identity(self) -> str | None:
        """Return the digest of both functions, and of what they refer to."""
        return identity_of((self.stage, self.sizes, self.pattern, self.replacement, self.examples))

    def applies_to(self, ranges: Ranges) -> bool:
        """Whether every size of the piece lies in `sizes`."""
        if self.sizes is None:
            return True
        least, most = self.sizes
        return all(
            low >= least and (most is None or (high is not None and high <= most))
            for low, high in ranges.values()
        )

    def __reduce__(self) -> Any:
        """Pickle by name: the decorated function's name stands for the pass."""
        module, qualname = self._home
        if "<locals>" in qualname or module == "__main__":
            raise TypeError(f"{qualname} is not at the top of a module that can be imported")
        return _named, (module, qualname)


def pattern_pass(
    pattern: Callable[..., Any],
    *,
    stage: Literal["piece", "post_grad"] = "piece",
    examples: Callable[[], Sequence[torch.Tensor]] | None = None,
    sizes: tuple[int, int | None] | None = None,
) -> Callable[[Callable[..., Any]], PatternPass]:
    """Make a pass of the decorated function: it replaces the pattern.

    Both take the same tensors, by position, and return one tensor. Numbers that they write are
    part of the pattern.

    Args:
        pattern: What is looked for.
        stage: `"piece"` or `"post_grad"`; see `InductorPass`.
        examples: For `"post_grad"`: returns tensors to trace both functions with.
        sizes: Only for pieces whose open sizes are all within (least, most).
    """
    if stage not in ("piece", "post_grad"):
        raise ValueError(f"stage must be 'piece' or 'post_grad', got {stage!r}")
    if (stage == "post_grad") != (examples is not None):
        raise ValueError("`examples` are for stage 'post_grad', which cannot do without")

    def decorate(replacement: Callable[..., Any]) -> PatternPass:
        if len(inspect.signature(replacement).parameters) != len(
            inspect.signature(pattern).parameters
        ):
            raise ValueError("the pattern and its replacement must take the same tensors")
        return PatternPass(pattern, replacement, stage=stage, examples=examples, sizes=sizes)

    return decorate


def _spellings(pattern: Callable[..., Any]) -> list[torch.fx.GraphModule]:
    """Return a pattern with the defaults that torch's functions pass on, and as people write it."""
    from torch.fx import symbolic_trace

    traced, written = symbolic_trace(pattern), symbolic_trace(pattern)
    for node in written.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            parameters = inspect.signature(node.target).parameters
        except (TypeError, ValueError):  # Built into torch: what is written is what is passed.
            continue
        node.kwargs = {
            name: value
            for name, value in node.kwargs.items()
            if name not in parameters or parameters[name].default is not value
        }
    is_same = str(traced.graph) == str(written.graph)
    return [written] if is_same else [written, traced]


def _named(module: str, qualname: str) -> Any:
    from importlib import import_module

    found: Any = import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found
