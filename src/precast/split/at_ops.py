"""Cut at operators by name: each runs natively, between the pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from precast.values import Value

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from precast.split.plan import Placement


class SplitAtOps(Value):
    """Cut before and after the named operators. Operators of foreign libraries always are.

    Names as a person knows them: `aten::scaled_dot_product_attention`, `mylib::attention`,
    `my_ns.op`, `torch.nn.functional.scaled_dot_product_attention`, or a pattern as `mylib.*`.
    """

    ops: tuple[str, ...] = ()

    def place(self, graph_module: GraphModule) -> Placement:
        """Make the nodes that a name fits native; report names that fit none."""
        from fnmatch import fnmatchcase

        from precast.split.nodes import is_call, names_of
        from precast.split.plan import Placement

        patterns = {op: op.replace("::", ".") for op in self.ops}
        unmatched = dict.fromkeys(self.ops)
        native: dict[str, str] = {}
        for node in graph_module.graph.nodes:
            if not is_call(node) or not patterns:
                continue
            names = names_of(node)
            for op, pattern in patterns.items():
                if any(fnmatchcase(name, pattern) for name in names):
                    native[node.name] = "split-op"
                    unmatched.pop(op, None)
        return Placement(native=native, regions={}, unmatched=tuple(unmatched))
