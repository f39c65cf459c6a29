"""Cut into pieces that have about as much to compute as each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from precast.values import Value

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from precast.split.plan import Placement


class SplitByCompute(Value):
    """Make `num_pieces` of equal work, or as many as have about `flops` each.

    Work is FLOPs; an operator that moves more than it computes counts by its bytes
    (`cost.FLOPS_PER_BYTE`). Each piece is within one operator of an even share. Operators that
    have to run natively cut besides, and do not count.
    """

    num_pieces: int | None = None
    flops: int | None = None

    def __post_init__(self) -> None:
        """Refuse both at once, and what gives no piece."""
        given = [value for value in (self.num_pieces, self.flops) if value is not None]
        if len(given) > 1 or any(value <= 0 for value in given):
            raise ValueError(
                "SplitByCompute takes a positive num_pieces or positive flops, "
                f"got num_pieces={self.num_pieces}, flops={self.flops}"
            )

    def place(self, graph_module: GraphModule) -> Placement:
        """Name each operator after the piece that it belongs to."""
        from precast.split.cost import CostModel
        from precast.split.plan import Placement, is_idle, stretches
        from precast.split.storages import Storages

        costs, storages = CostModel(graph_module), Storages(graph_module)
        units = [unit for stretch in stretches(graph_module) for unit in stretch]
        work = [sum(map(costs.work, unit)) for unit in units]
        total = sum(work)
        wanted = self._number(total)
        regions: dict[str, str] = {}
        number = done = 0
        current: list[Node] = []
        for unit, amount in zip(units, work, strict=True):
            # A cut is made at the side of a unit that is nearer to the even share.
            share = int((done + amount / 2) * wanted / total) if total else 0
            if min(share, wanted - 1) > number and not is_idle(current, storages):
                number, current = min(share, wanted - 1), []
            regions.update({node.name: f"part {number}" for node in unit})
            current.extend(unit)
            done += amount
        return Placement(native={}, regions=regions)

    def _number(self, total: int) -> int:
        if self.flops is not None:
            return max(1, round(total / self.flops))
        return self.num_pieces or DEFAULT_NUM_PIECES


#: Of `split="compute"`.
DEFAULT_NUM_PIECES = 4
