"""Cut so that no piece has more tensors alive than a budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from precast.errors import SplitError
from precast.values import Value

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from precast.split.plan import Placement
    from precast.split.storages import Storages


class SplitByMemory(Value):
    """Make the fewest pieces of which each keeps its live tensors within `budget_bytes`.

    What lives at an operator: tensors that the piece reads or makes, that exist by then and are
    needed there or later. Weights and inputs of the graph live all the time. `operator_bytes`
    are counted for each operator besides: what a compiler needs grows with their number.

    Raises (when it places):
        SplitError: One operator alone needs more.
    """

    budget_bytes: int = 1 << 30
    operator_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse a budget that nothing can keep to."""
        if self.budget_bytes <= 0 or self.operator_bytes < 0:
            raise ValueError(
                f"SplitByMemory needs a positive budget_bytes, got {self.budget_bytes} "
                f"with operator_bytes={self.operator_bytes}"
            )

    def place(self, graph_module: GraphModule) -> Placement:
        """Name each operator after the piece that it belongs to."""
        from precast.split.plan import Placement

        regions = {}
        lives = _Lives(graph_module, self.operator_bytes)
        for number, piece in enumerate(lives.pieces(self.budget_bytes)):
            if piece.cost > self.budget_bytes:
                raise SplitError(
                    repr(self),
                    piece.nodes[-1].name,
                    f"it needs {piece.cost:,} bytes of live tensors by itself",
                )
            regions.update({node.name: f"part {number}" for node in piece.nodes})
        return Placement(native={}, regions=regions)


def smallest_budget(graph_module: GraphModule, num_pieces: int, operator_bytes: int = 0) -> int:
    """Return the smallest budget, to 1 %, with which `SplitByMemory` makes at most `num_pieces`."""
    lives = _Lives(graph_module, operator_bytes)
    largest = max((piece.cost for piece in lives.pieces(0)), default=1)
    high = max((piece.cost for piece in lives.pieces(None)), default=1)
    low = min(largest, high)
    if len(lives.pieces(low)) <= num_pieces:
        return max(low, 1)
    # `low` makes too many pieces, `high` does not.
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        if len(lives.pieces(middle)) <= num_pieces:
            high = middle
        else:
            low = middle
    return high


class _Lives:
    """When each tensor of a graph is made and needed last, in units of the cutting algorithm."""

    def __init__(self, graph_module: GraphModule, operator_bytes: int) -> None:
        from precast.split.cost import CostModel
        from precast.split.plan import stretches
        from precast.split.storages import Storages

        self._costs = CostModel(graph_module)
        self._storages = Storages(graph_module)
        self._operator_bytes = operator_bytes
        found = stretches(graph_module)
        self._place = {
            node: place
            for place, unit in enumerate(unit for stretch in found for unit in stretch)
            for node in unit
        }
        self._made: dict[object, float] = {}
        self._last: dict[object, float] = {}
        self._find_ends(graph_module)
        self._units = [[self._unit(nodes) for nodes in stretch] for stretch in found]

    def _find_ends(self, graph_module: GraphModule) -> None:
        place = -1.0
        for node in graph_module.graph.nodes:
            # What is native is between two units.
            place = float(self._place[node]) if node in self._place else place
            own = self._costs.storage(node)
            if own is not None:
                self._made.setdefault(own, place)
                if node.op in ("placeholder", "get_attr"):
                    self._last[own] = float("inf")
            for argument in node.all_input_nodes:
                storage = self._costs.storage(argument)
                if storage is not None:
                    end = float("inf") if node.op == "output" else place
                    self._last[storage] = max(end, self._last.get(storage, end))

    def pieces(self, budget_bytes: int | None) -> list[_Piece]:
        """Return the pieces that a budget makes; None: no budget. One unit may exceed it."""
        pieces: list[_Piece] = []
        for stretch in self._units:
            piece: _Piece | None = None
            for unit in stretch:
                is_over = (
                    piece is not None
                    and budget_bytes is not None
                    and not piece.is_idle
                    and piece.with_unit(unit).cost > budget_bytes
                )
                if piece is None or is_over:
                    piece = _Piece(self._storages)
                    pieces.append(piece)
                piece.add(unit)
        return pieces

    def _unit(self, nodes: list[Node]) -> _Unit:
        operators = sum(not self._costs.is_free(node) for node in nodes)
        return _Unit(
            nodes, self._place[nodes[0]], self._touched(nodes), operators * self._operator_bytes
        )

    def _touched(self, nodes: list[Node]) -> dict[object, _Tensor]:
        """Return the tensors that a unit's operators read and make; views are none of their own."""
        found: dict[object, _Tensor] = {}
        here = self._place[nodes[0]]
        for node in nodes:
            if self._costs.is_free(node) and not self._is_new_pick(node):
                continue
            for other in (*node.all_input_nodes, node):
                storage = self._costs.storage(other)
                if storage is not None:
                    found[storage] = _Tensor(
                        self._costs.storage_bytes(storage),
                        self._made[storage] == here,
                        max(here, self._last.get(storage, here)),
                    )
        return found

    def _is_new_pick(self, node: Node) -> bool:
        from precast.split.nodes import is_pick

        return is_pick(node) and self._storages.parent(node) is None


class _Tensor(NamedTuple):
    """A tensor as one unit sees it."""

    num_bytes: int
    is_made_here: bool
    last: float  # Where it is needed last.


class _Unit(NamedTuple):
    """Nodes that stay together, and the tensors that they touch."""

    nodes: list[Node]
    place: int
    touched: dict[object, _Tensor]
    more_bytes: int


class _Cost(NamedTuple):
    """The most that lives in a piece at once, and what lives at its end."""

    peak: int
    alive: int
    more_bytes: int

    @property
    def cost(self) -> int:
        return self.peak + self.more_bytes


class _Piece:
    """A run of units, and what lives in it."""

    def __init__(self, storages: Storages) -> None:
        self.nodes: list[Node] = []
        self._storages = storages
        self._is_idle = True
        self._known: set[object] = set()
        self._ends: dict[float, int] = {}
        self._cost = _Cost(0, 0, 0)

    @property
    def cost(self) -> int:
        """The bytes that count against the budget."""
        return self._cost.cost

    @property
    def is_idle(self) -> bool:
        """Whether the cutting algorithm would not make a piece of it."""
        from precast.split.plan import is_idle

        if self._is_idle:  # More nodes never make it idle again.
            self._is_idle = is_idle(self.nodes, self._storages)
        return self._is_idle

    def with_unit(self, unit: _Unit) -> _Cost:
        """Return the cost with another unit at the end."""
        new = [tensor for token, tensor in unit.touched.items() if token not in self._known]
        # What comes from elsewhere was there all the time.
        outside = sum(tensor.num_bytes for tensor in new if not tensor.is_made_here)
        alive = self._cost.alive + sum(tensor.num_bytes for tensor in new)
        peak = max(self._cost.peak + outside, alive)
        return _Cost(peak, alive, self._cost.more_bytes + unit.more_bytes)

    def add(self, unit: _Unit) -> None:
        """Take a unit in."""
        peak, alive, more_bytes = self.with_unit(unit)
        self.nodes.extend(unit.nodes)
        for token, tensor in unit.touched.items():
            if token not in self._known:
                self._known.add(token)
                self._ends[tensor.last] = self._ends.get(tensor.last, 0) + tensor.num_bytes
        self._cost = _Cost(peak, alive - self._ends.pop(float(unit.place), 0), more_bytes)
