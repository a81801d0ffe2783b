"""Trees: soft binary trees that compute only the nodes that a row reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Rule, Site


class Pairs:
    """The choices that are asked, out of ``count`` that each of ``batch`` rows has: one (row, place) each, in order of rows."""

    def __init__(self, rows: Tensor, places: Tensor, batch: int, count: int) -> None:
        self.rows, self.places, self.batch, self.count = rows, places, batch, count

    def dense(self, values: Tensor) -> Tensor:
        """``values`` of the pairs as (batch, count, ...), 0 for those that weren't asked."""
        empty = values.new_zeros((self.batch, self.count, *values.shape[1:]))
        return empty.index_put((self.rows, self.places), values)

    def pick(self, values: Tensor) -> Tensor:
        """The pairs' own of (batch, count, ...)."""
        return values[self.rows, self.places]

    def units(self) -> Tensor:
        """How many each row has, (batch,) int64."""
        ones = torch.ones_like(self.rows)
        return ones.new_zeros(self.batch).index_add(0, self.rows, ones)


class PairSite(Site):
    """A site with many choices a row, only some of which are asked: the rule sees those, a trace shows 0 for the others.

    The rule must judge each pair by itself, as all do that don't rank. Its scores come ready-made: the scorer is idle.
    """

    def __init__(self, rule: Rule, *, shape: tuple[int, ...]) -> None:
        super().__init__(nn.Identity(), rule, shape=shape)

    def pairs(self, scores: Tensor, pairs: Pairs) -> Decision:
        """Decide for the pairs; the decision's value is (pairs, ...), the recorded one is dense."""
        here = tape.here()
        if self.rule.reads_scores:
            outcome = self.rule(scores)
        else:
            whole = self.rule(scores.new_zeros((pairs.batch, *self.shape)))
            soft = None if whole.soft is None else pairs.pick(whole.soft)
            outcome = Outcome(pairs.pick(whole.value), soft, weight=whole.weight or whole.soft is whole.value)
        if here.tape is None:
            return Decision(outcome.value, soft=outcome.soft)
        visit = here.tape.visits(self)
        dense = Decision(
            pairs.dense(outcome.value), pairs.dense(scores),
            None if outcome.soft is None else pairs.dense(outcome.soft),
            None if outcome.log_prob is None else pairs.dense(outcome.log_prob),
            here.rows, here.reached, None, visit, outcome.weight or outcome.soft is outcome.value,
        )  # fmt: skip
        here.tape.decided(self, dense)
        return Decision(outcome.value, soft=outcome.soft, visit=visit)


class Trees(Executor):
    r"""The sum of :math:`m` full binary trees of depth :math:`d`: every node splits softly, every leaf it comes to adds its vector.

    .. math:: y = \sum_l P_l(x)\, o_l, \qquad P_l = \prod_{n \text{ above } l} v_n^{\text{side}}, \qquad
        (v_n^{\text{left}}, v_n^{\text{right}}) = \mathrm{rule}(w_n \cdot x,\ -w_n \cdot x)

    With :class:`pliant.rules.SmoothStep` the two sides' weights add up to 1 and one of them is often exactly 0. Gathered, only
    nodes of weight above 0 are computed, one level after the other, in training too; masked, all are. ``Always`` goes both ways
    everywhere: then the plain form is the sum of all leaves, the same for every row.

    Shape:
        ``x``: :math:`(R, I)`; the answer is :math:`(R, O)`. The site of level :math:`k` decides :math:`(R, m 2^k, 2)`.

    Args:
        inputs: :math:`I`.
        outputs: :math:`O`.
        trees: :math:`m`.
        rules: one for each level, :math:`d` in all; they must judge every number by itself.
        dense_above: share of a level's nodes, over the batch, above which all are computed, since that is faster (some 1/24): then
            rows cost more than their decisions ask for. 1 is never.

    Raises:
        PliantError: where there are no trees or no levels.

    >>> from pliant.rules import Never, SmoothStep
    >>> trees = Trees(3, 2, trees=5, rules=[SmoothStep() for _ in range(4)])
    >>> trees(torch.randn(7, 3)).shape, trees.leaves.shape
    (torch.Size([7, 2]), torch.Size([80, 2]))

    References:
        Survey section 2.1.3 (2b); Hazimeh et al., The Tree Ensemble Layer, ICML 2020.

    Differs from the paper: nothing in the formulas. A level's nodes are computed together, where the released kernel walks each
    row's trees by itself; exported, everything is computed.
    """

    def __init__(
        self, inputs: int, outputs: int, *, trees: int, rules: Sequence[Rule], dense_above: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__()
        if trees < 1 or len(rules) == 0:
            raise PliantError(
                got=f"{trees} trees of {len(rules)} levels", expected="at least one of each",
                do="pass trees=10, rules=[SmoothStep() for _ in range(4)]",
            )  # fmt: skip
        self.trees = trees
        self.dense_above = dense_above
        counts = [trees * 2**level for level in range(len(rules) + 1)]
        self.nodes = nn.ModuleList(nn.Linear(inputs, count, bias=False) for count in counts[:-1])
        self.sites = nn.ModuleList(PairSite(r, shape=(n, 2)) for r, n in zip(rules, counts, strict=False))
        self.leaves = nn.Parameter(torch.empty(counts[-1], outputs))
        for p in self.parameters():
            nn.init.uniform_(p, -0.01, 0.01)  # small, so that every split is soft at first

    def plain(self, x: Tensor) -> Tensor:
        """All leaves of all trees."""
        return x.new_ones(x.shape[0], self.leaves.shape[0]) @ self.leaves

    def masked(self, x: Tensor) -> Tensor:
        """Every node and every leaf."""
        reach = soft = x.new_ones(x.shape[0], self.trees)
        t = self.nodes[0](x)
        for level, site in enumerate(self.sites):
            decision = site(torch.stack([t, -t], -1))
            reach = _children(reach, decision.value)
            soft = _children(soft, decision.value if decision.soft is None else decision.soft)
            with tape.part(site, decision.visit, "1/next", wanted=soft.sum(1), of=reach.shape[1]):
                t = reach @ self.leaves if level == len(self.sites) - 1 else self.nodes[level + 1](x)
        return t

    def gathered(self, x: Tensor) -> Tensor:
        """The nodes and leaves that each row reaches."""
        if torch.compiler.is_exporting():
            return self.masked(x)
        batch = x.shape[0]
        every = torch.arange(batch * self.trees, device=x.device)
        pairs = Pairs(every // self.trees, every % self.trees, batch, self.trees)
        reach, t = x.new_ones(len(every)), self.nodes[0](x).flatten()
        for level, site in enumerate(self.sites):
            decision = site.pairs(torch.stack([t, -t], -1), pairs)  # pyright: ignore[reportCallIssue]
            parents, before = reach, pairs
            pairs, reach = _reached(pairs, _children(reach, decision.value))
            whole = len(pairs.rows) > self.dense_above * batch * pairs.count and level + 1 < len(self.nodes)
            booked = {} if tape.tape() is None else _booked(before, None if whole else pairs, parents, decision)
            with tape.part(site, decision.visit, "1/next", of=pairs.count, **booked):
                if level + 1 == len(self.nodes):
                    t = _summed(self.leaves, reach, pairs)
                elif whole:
                    t = pairs.pick(self.nodes[level + 1](x))
                else:
                    t = _products(x, self.nodes[level + 1].weight, pairs)  # pyright: ignore[reportArgumentType]
        return t


def _children(reach: Tensor, value: Tensor) -> Tensor:
    """Weights of both children of every node, side by side."""
    return (reach[..., None] * value).flatten(-2)


def _reached(pairs: Pairs, reach: Tensor) -> tuple[Pairs, Tensor]:
    """The children with a weight above 0 (or NaN), and their weights."""
    kept = (~(reach <= 0)).nonzero().squeeze(1)
    parent = kept // 2
    places = 2 * pairs.places.index_select(0, parent) + kept % 2
    below = Pairs(pairs.rows.index_select(0, parent), places, pairs.batch, 2 * pairs.count)
    return below, reach.index_select(0, kept)


def _booked(before: Pairs, now: Pairs | None, reach: Tensor, decision: Decision) -> dict[str, Any]:
    """What a level costs each row: nodes that run (None: all), and those that the decision wants; ``reach`` is the parents'."""
    soft = decision.value if decision.soft is None else decision.soft
    wanted = reach.new_zeros(before.batch).index_add(
        0, before.rows, _children(reach, soft).unflatten(0, (-1, 2)).sum(1)
    )
    return {"units": None if now is None else now.units(), "wanted": wanted}


def _products(x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """Each pair's node's weights times its row."""
    rows, nodes = x.index_select(0, pairs.rows), weight.index_select(0, pairs.places)
    return torch.bmm(rows[:, None], nodes[:, :, None]).flatten()


def _summed(leaves: Tensor, reach: Tensor, pairs: Pairs) -> Tensor:
    """Each row's leaves, weighted and added up."""
    parts = torch.bmm(reach[:, None, None], leaves.index_select(0, pairs.places)[:, None]).squeeze(1)
    return parts.new_zeros(pairs.batch, leaves.shape[1]).index_add(0, pairs.rows, parts)
