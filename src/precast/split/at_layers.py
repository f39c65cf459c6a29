"""Cut at the boundaries of repeated blocks, and choose a rule for a graph."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from precast.values import Value

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from precast.split.plan import Placement, Splitter

#: Fewer blocks than this are not worth a cut of their own.
MIN_REPEATS = 4


class SplitAtLayers(Value):
    """Make each repeated block one piece, and what lies between them pieces of their own.

    Blocks are entries of one class in one `ModuleList` (or `Sequential`), at the outermost level
    where there are at least `min_repeats`. `modules` names the blocks instead: by class
    (`LlamaDecoderLayer`) or by path (`model.layers.*`).
    """

    min_repeats: int = MIN_REPEATS
    modules: tuple[str, ...] = ()

    def place(self, graph_module: GraphModule) -> Placement:
        """Make a region of each block."""
        from precast.split.nodes import is_call
        from precast.split.plan import Placement

        nodes = [node for node in graph_module.graph.nodes if is_call(node)]
        stacks = {node: module_stack(node) for node in nodes}
        if self.modules:
            is_block, unmatched = self._named(stacks)
        else:
            is_block, unmatched = self._repeated(stacks), ()
        found: list[str | None] = []
        for node in nodes:
            blocks = [path for path, _ in stacks[node] if path in is_block]
            # None: nothing is known, as of calls that the tracer made up.
            found.append(blocks[0] if blocks else "" if stacks[node] else None)
        return Placement(
            native={},
            regions={node.name: region for node, region in zip(nodes, _fill(found), strict=True)},
            unmatched=unmatched,
        )

    def _repeated(self, stacks: dict[Node, list[tuple[str, str]]]) -> set[str]:
        lists: dict[str, dict[str, set[str]]] = {}
        for stack in stacks.values():
            for path, kind in stack:
                prefix, _, last = path.rpartition(".")
                if last.isdigit() and not _is_leaf(kind):
                    lists.setdefault(prefix, {}).setdefault(kind, set()).add(path)
        blocks: set[str] = set()
        for kinds in lists.values():
            # One kind that repeats is enough: the others in that list are its neighbours.
            if max(map(len, kinds.values())) >= self.min_repeats:
                blocks.update(path for paths in kinds.values() for path in paths)
        return blocks

    def _named(self, stacks: dict[Node, list[tuple[str, str]]]) -> tuple[set[str], tuple[str, ...]]:
        from fnmatch import fnmatchcase

        blocks: set[str] = set()
        unmatched = dict.fromkeys(self.modules)
        for stack in stacks.values():
            for path, kind in stack:
                for pattern in self.modules:
                    names = (path, kind, kind.rpartition(".")[2])
                    if any(fnmatchcase(name, pattern) for name in names):
                        blocks.add(path)
                        unmatched.pop(pattern, None)
        return blocks, tuple(unmatched)


def auto_splitter(graph_module: GraphModule) -> Splitter:
    """Choose a rule: at foreign operators that repeat, else at repeated blocks, else not at all."""
    from precast.split.at_ops import SplitAtOps
    from precast.split.plan import Whole, foreign_operators

    if max(foreign_operators(graph_module).values(), default=0) >= MIN_REPEATS:
        return SplitAtOps()
    rule = SplitAtLayers()
    regions = set(rule.place(graph_module).regions.values()) - {""}
    return rule if len(regions) >= MIN_REPEATS else Whole()


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Return the modules around a node, outermost first: (path from the model, class name).

    The same module called again is another entry, as far as the trace tells them apart.
    """
    stack: Any = node.meta.get("nn_module_stack") or {}
    found = []
    for key, (path, kind) in stack.items():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        call = re.search(r"@\d+$", str(key))
        found.append((_plain_path(path) + (call.group() if call else ""), name))
    return found


def _plain_path(path: str) -> str:
    """Write `L['self']._modules['layers'][0].mlp` as `layers.0.mlp`."""
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    path = re.sub(r"getattr\(([^,]+), ['\"](\w+)['\"]\)", r"\1.\2", path)
    return re.sub(r"^L\.\w+\.?", "", path)


def _is_leaf(kind: str) -> bool:
    # A list of bare Linears repeats too, but a piece each would be all overhead.
    return kind.startswith("torch.nn.modules.") and ".transformer." not in kind


def _fill(regions: list[str | None]) -> list[str]:
    """Give nodes of unknown place that of their neighbours, where these agree."""
    following: list[str] = []
    known = ""
    for region in reversed(regions):
        known = known if region is None else region
        following.append(known)
    filled = []
    before = ""
    for region, after in zip(regions, reversed(following), strict=True):
        before = region if region is not None else before if before == after else ""
        filled.append(before)
    return filled
