"""Routes: one layer of a routed network. Each node sends its feature along those of its edges whose gates are open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows


@dataclass(frozen=True)
class Node:
    """A node of a layer and what leaves it.

    Args:
        site: gates of its edges, (R, edges), decided from the node's input.
        edges: target and network of each edge, in the order of the gates; several may lead to one target.
        trunk: runs before the edges, once, where any of them is open; default, nothing.
        keep: target to which the input passes unchanged where no edge is open; None drops it.
    """

    site: Site
    edges: Sequence[tuple[int, nn.Module]]
    trunk: nn.Module | None = None
    keep: int | None = None


class Routes(Executor):
    r"""From the features of a layer's nodes to those of the next one's.

    .. math:: x'_j = \sum_{s:\, a_{sj} > 0} a_{sj}\, F_{sj}(T_s(x_s)) + \sum_{s \text{ kept at } j} 1[\max a_s = 0]\, x_s

    Masked, every edge runs for every row and is multiplied by its gate. Gathered, each runs on the rows whose gate is open: they're
    selected, run, scaled and added into their target. A node to which nothing came has the input 0 and decides like any other.

    With one-hot gates this selects a path, with free ones (:class:`pliant.rules.ReluTanh`) it routes through many at once.

    Shape:
        ``x``: one :math:`(R, ...)` for each node; answers one for each target. Edges to the same target return the same shape.

    Args:
        nodes: of this layer, in the order of the inputs.

    Raises:
        PliantError: where a node's gates aren't as many as its edges, or targets have gaps.

    >>> import pliant
    >>> site = pliant.Site(nn.Identity(), pliant.rules.ReluTanh(), shape=(2,))
    >>> layer = Routes([Node(site, [(0, nn.Identity()), (0, nn.ReLU())])]).eval()
    >>> layer([torch.tensor([[99.0, -1.0], [-1.0, 99.0]])])[0]  # the gates are (1, 0) and (0, 1)
    tensor([[99., -1.],
            [ 0., 99.]])

    References:
        Survey section 2.1.3, Eq. 6; Li et al., Learning Dynamic Routing for Semantic Segmentation, CVPR 2020.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        targets = {target for node in nodes for target, _ in node.edges}
        wrong = [n for n in nodes if n.site.shape != (len(n.edges),)]
        if wrong or targets != set(range(len(targets))) or not targets:
            raise PliantError(
                got=f"gates of shape {wrong[0].site.shape} for {len(wrong[0].edges)} edges" if wrong else f"targets {sorted(targets)}",
                expected="a gate for each edge, and targets 0, 1, ... without gaps",
                do="make each node's site with shape=(edges,), and lead an edge to every target",
            )  # fmt: skip
        self.sites = nn.ModuleList(node.site for node in nodes)
        self.trunks = nn.ModuleList(nn.Identity() if node.trunk is None else node.trunk for node in nodes)
        self.edges = nn.ModuleList(edge for node in nodes for _, edge in node.edges)
        self.targets = [[target for target, _ in node.edges] for node in nodes]
        self.kept = [node.keep for node in nodes]

    def plain(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Every edge at weight 1."""
        out = _Sums()
        for node, (_, trunk, edges) in enumerate(self._nodes()):
            h = trunk(x[node])
            for target, edge in edges:
                out.add(target, edge(h))
        return out.all()

    def masked(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Every edge for every row, weighed by its gate."""
        out = _Sums()
        for here, kept, (site, trunk, edges) in zip(x, self.kept, self._nodes(), strict=True):
            decision = site(here)
            open_, asked = _any(decision)
            with tape.part(site, decision.visit, "1/trunk", reached=open_, wanted=asked):
                h = trunk(here)
            for k, (target, edge) in enumerate(edges):
                gate, wanted = _gate(decision, k)
                with tape.part(site, decision.visit, f"1/{k}", reached=~(gate.value <= 0), wanted=wanted):
                    y = edge(h)
                out.add(target, rows.mix(gate, y, torch.zeros_like(y)))
            if kept is not None:
                out.add(kept, torch.where(rows.weigh(open_, here), torch.zeros_like(here), here))
        return out.all()

    def gathered(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Every edge for the rows whose gate is open."""
        out = _Sums()
        for here, kept, (site, trunk, edges) in zip(x, self.kept, self._nodes(), strict=True):
            decision = site(here)
            open_, asked = _any(decision)
            some = _Some(open_, decision)
            h = some.run(site, decision, "1/trunk", asked, trunk, here)
            for k, (target, edge) in enumerate(edges):
                gate, wanted = _gate(decision, k)
                chosen = _Some(~(gate.value <= 0), decision, within=some)
                y = chosen.run(site, decision, f"1/{k}", wanted, edge, h)
                if y is not None and rows.weighted(gate):
                    y = y * rows.weigh(chosen.rows(gate.value), y)
                out.put(target, chosen, y, partial(_nothing, here, trunk, edge))
            if kept is not None:
                rest = _Some(~open_, decision)
                out.put(kept, rest, rest.of(here), partial(_nothing, here))
        return out.all()

    def _nodes(self) -> list[tuple[Any, nn.Module, list[tuple[int, nn.Module]]]]:
        """Site, trunk and edges of every node."""
        edges = iter(self.edges)
        each = [[(target, next(edges)) for target in targets] for targets in self.targets]
        return list(zip(self.sites, self.trunks, each, strict=True))


def _any(decision: Decision) -> tuple[Tensor, Tensor]:
    """Whether any edge of a row is open; and how likely that is: by independent gates, or the largest of weights."""
    soft = decision.value if decision.soft is None else decision.soft
    asked = soft.amax(1) if decision.is_weight else 1 - (1 - soft).prod(1)
    return ~(decision.value <= 0).all(1), asked


def _gate(decision: Decision, k: int) -> tuple[Decision, Tensor]:
    """The ``k``-th edge's gate as a decision of its own, and what it wants."""
    value, soft = decision.value[:, k], None if decision.soft is None else decision.soft[:, k]
    return Decision(value, soft=soft, weight=decision.is_weight), value if soft is None else soft


def _nothing(x: Tensor, *networks: nn.Module) -> Tensor:
    """What the networks make of no rows: the shape of their answer."""
    x = x[:0]
    for network in networks:
        x = network(x)
    return x


class _Some:
    """Those of the rows in flight for which a mask holds; ``within`` are the rows that there still is something of."""

    def __init__(self, mask: Tensor, decision: Decision, within: _Some | None = None) -> None:
        exporting = torch.compiler.is_exporting()
        if exporting and decision.reached is not None:
            mask = mask & decision.reached  # not an outer dummy: they would add up
        self.mask, self.exporting = mask, exporting
        self.index = mask.nonzero().squeeze(1)
        self.every = not exporting and self.index.shape[0] == mask.shape[0]
        self.run_on, self.real = rows.never_empty(self.index, mask.shape[0]) if exporting else (self.index, None)
        self.local = self.run_on
        if within is not None and not within.every:
            self.local = (within.mask.cumsum(0) - 1).clamp_min(0).index_select(0, self.run_on)

    def of(self, x: Tensor) -> Tensor:
        """The rows to run of ``x``, which holds all rows in flight, or those ``within``."""
        return x if self.every else rows.select(x, self.local)

    def rows(self, x: Tensor) -> Tensor:
        """The same of ``x`` that holds all rows in flight in any case."""
        return x if self.every else x.index_select(0, self.run_on)

    def run(
        self, site: Site, decision: Decision, choice: str, wanted: Tensor, network: nn.Module, x: Tensor | None
    ) -> Tensor | None:  # fmt: skip
        """What the network makes of these rows of ``x``, noted as ``choice`` of the site; None where there are none."""
        if x is None or (not self.exporting and self.index.shape[0] == 0):
            return None
        if self.every:
            with tape.part(site, decision.visit, choice, wanted=wanted):
                return network(x)
        wanted = wanted.index_select(0, self.run_on)
        with tape.part(site, decision.visit, choice, index=self.run_on, reached=self.real, wanted=wanted):
            return network(self.of(x))


class _Sums:
    """The targets' features, put together from what the edges send."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.ours: set[int] = set()  # made here, so that they may be added to in place
        self.empty: dict[int, tuple[int, Callable[[], Tensor]]] = {}

    def add(self, target: int, y: Tensor) -> None:
        """All rows of a target."""
        self.sums[target] = self.sums[target] + y if target in self.sums else y

    def put(self, target: int, some: _Some, y: Tensor | None, empty: Callable[[], Tensor]) -> None:
        """Some rows of a target, or none; ``empty`` gives the shape that they would have."""
        self.empty[target] = (some.mask.shape[0], empty)
        if y is None:
            return
        if some.every:
            self.add(target, y)
            return
        y = y.narrow(0, 0, some.index.shape[0]) if some.exporting else y
        before = self.sums.get(target)
        if before is None:
            before = y.new_zeros((some.mask.shape[0], *y.shape[1:]))
        elif target not in self.ours:
            before = before.clone()
        self.ours.add(target)
        self.sums[target] = before.index_add_(0, some.index, y)

    def all(self) -> list[Tensor]:
        """Every target's feature; 0 where nothing came."""
        for target in self.empty.keys() - self.sums.keys():
            count, empty = self.empty[target]
            like = empty()
            self.sums[target] = like.new_zeros((count, *like.shape[1:]))
        return [self.sums[target] for target in sorted(self.sums)]
