"""Halting: a loop of units whose finished rows leave with a weighted mixture of their states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows


class Halted(NamedTuple):
    """What a halting decision carries: the weight of the unit before it, and whether that was the loop's first unit.

    Both have the decision's shape; the ponder cost is put together from them.
    """

    weight: Tensor
    first: Tensor


class Halting(Executor):
    r"""Run units until a row's halting probabilities have added up; the answer mixes all states that it went through.

    .. math::
        h_n = \sigma(\mathrm{halt}_n(s_n)), \quad N = \min\{n : \textstyle\sum_{i \le n} h_i \ge 1 - \varepsilon\} \le M, \quad
        p_n = h_n\ (n < N), \quad p_N = 1 - \textstyle\sum_{n < N} h_n, \quad y = \textstyle\sum_{n \le N} p_n s_n

    The units are residual units, or one shared cell repeated. After each but the last a site reads the remainder
    :math:`1 - \sum_{i \le n} h_i`; value 1 goes on. Gathered, rows that halted are no longer computed. A rule that goes on
    beyond :math:`N` (Always) adds states of weight 0: weights are never negative and always sum to 1.

    Shape:
        ``x``: :math:`(R, ...)` floating point, or a tree of such tensors (a state, and an input that each unit hands on: its
        mixture is itself); the answer has the units' shape. ``given``: :math:`(R, M - 1)`, the values of all sites.

    Args:
        units: :math:`M` modules from state to state; one module repeated shares its weights. About 150 at most (recursion).
        halts: :math:`M - 1` modules from the state after a unit to its halting logit (:class:`pliant.scores.HaltingHead`).
            Of a tree they read the first tensor.
        sites: :math:`M - 1` sites of (:class:`pliant.scores.Remainder`, :class:`pliant.rules.Halting`), or one repeated.

    Raises:
        PliantError: where the three lists don't fit, or a halt gives more than one logit for a row.

    >>> import pliant
    >>> class Half(nn.Module):
    ...     def forward(self, x):
    ...         return torch.zeros(len(x))
    >>> class More(nn.Module):
    ...     def forward(self, x):
    ...         return x + 1
    >>> site = pliant.Site(pliant.scores.Remainder(), pliant.rules.Halting())
    >>> loop = Halting([More()] * 4, [Half()] * 3, [site] * 3).eval()
    >>> y, trace = pliant.record(loop)(torch.zeros(1, 1))
    >>> y, [decision.value.item() for decision in trace["sites.0"]]
    (tensor([[1.5000]]), [1.0, 0.0])

    References:
        Survey sections 2.1.1 (2a), 4.1.1 and 5.1.1; Graves, Adaptive Computation Time, 2016; Figurnov et al., CVPR 2017;
        Dehghani et al., Universal Transformers, ICLR 2019.

    Differs from the paper: nothing in the formulas; weights of 0 beyond :math:`N` are ours. A row halts as a whole: what
    SACT does, positions (R, 1, H, W) that halt each for itself, needs an executor over positions; the record is ready.
    """

    def __init__(self, units: Sequence[nn.Module], halts: Sequence[nn.Module], sites: Sequence[Site]) -> None:
        super().__init__()
        if len(units) == 0 or len(halts) != len(units) - 1 or len(sites) != len(units) - 1:
            raise PliantError(
                got=f"{len(units)} units, {len(halts)} halts and {len(sites)} sites",
                expected="M units (at least one), M - 1 halts and M - 1 sites",
                do="give every unit but the last a halt and a site; the last takes what is left",
            )
        self.units = nn.ModuleList(units)
        self.halts = nn.ModuleList(halts)
        self.sites = nn.ModuleList(sites)
        self.visits = [[s is site for s in sites[:n]].count(True) for n, site in enumerate(sites)]

    def plain(self, x: Any) -> Any:
        """All units, mixed by their own halting probabilities."""
        return self._rest(None, 0, [x, None, None])

    def masked(self, x: Any, given: Tensor | None = None) -> Any:
        """Every unit for every row."""
        return self._rest(_go_on_masked, 0, [x, None, given])

    def gathered(self, x: Any, given: Tensor | None = None) -> Any:
        """Only the units that the rows still running want."""
        return self._rest(_go_on_gathered, 0, [x, None, given])

    def _rest(self, go_on: _GoOn | None, n: int, state: list[Any]) -> Any:
        """The states from unit ``n`` on, each times its weight: recursive like Exits, so it nests and exports.

        ``state`` is the state so far, what is left of the budget (None: all), and the plan.
        """
        s, left, given = state
        s = self.units[n](s)
        if n == len(self.halts):
            return s if left is None else _times(left, s)
        logits = self.halts[n](_first(s))
        if logits.ndim != 1:
            raise PliantError(
                got=f"halting logits of shape {tuple(logits.shape)}",
                expected="one for each row",
                do="pool in the halts, and drop the last dimension of a linear layer to one logit",
            )
        before = torch.ones_like(logits) if left is None else left
        weight = torch.minimum(torch.sigmoid(logits), before)
        site: Site = self.sites[n]  # pyright: ignore[reportAssignmentType]

        def rest(chosen: list[Any]) -> Any:
            s, weight, left, given = chosen
            return _plus(_times(weight, s), self._rest(go_on, n + 1, [s, left, given]))

        state = [s, weight, before - weight, given]
        if go_on is None:
            return rest(state)
        carry = Halted(weight, torch.full_like(weight, n == 0))
        plan = None if given is None else given[:, n]
        decision = site(before - weight, given=plan, carry=carry, visit=self.visits[n])
        return go_on(site, decision, rest, state, _times(before, s))


_GoOn = Callable[[Site, Decision, Callable[[list[Any]], Any], list[Any], Any], Any]


def _go_on_masked(site: Site, decision: Decision, rest: Callable[..., Any], state: list[Any], halted: Any) -> Any:
    return rows.mix(decision, rows.run_masked(site, decision, 1, rest, state), halted)


def _go_on_gathered(site: Site, decision: Decision, rest: Callable[..., Any], state: list[Any], halted: Any) -> Any:
    return rows.run_some(site, decision, rest, (state,), rows.replaced, lambda: halted)


def _first(s: Any) -> Tensor:
    return s if isinstance(s, Tensor) else pytree.tree_leaves(s)[0]


def _times(weight: Tensor, s: Any) -> Any:
    return pytree.tree_map(lambda t: t * rows.weigh(weight, t), s)


def _plus(a: Any, b: Any) -> Any:
    return pytree.tree_map(torch.add, a, b)
