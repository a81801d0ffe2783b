"""Which visits of a trace were choices, and their numbers row by row: what losses of policies read."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pliant.core.decision import Decision
from pliant.core.trace import Trace

Visits = list[tuple[str, Decision]]
"""Decisions with their sites' paths, in the order in which they were made."""


def _ordered(trace: Trace, sites: str) -> Visits:
    """Of a loop's sites first all first visits, then all second ones."""
    found = [(site, d) for site in trace if fnmatchcase(site, sites) for d in trace[site]]
    return sorted(found, key=lambda pair: pair[1].visit)


def scored(trace: Trace, sites: str = "*") -> Visits:
    """The visits at which something was chosen, drawn or not. What was forced or given has no scores and is no choice.

    >>> forced, chosen = Decision(torch.ones(1)), Decision(torch.ones(1), scores=torch.zeros(1))
    >>> [site for site, _ in scored(Trace({"a": (forced,), "b": (chosen,)}, (), (), 1))]
    ['b']
    """
    return [(site, d) for site, d in _ordered(trace, sites) if d.scores is not None]


def sampled(trace: Trace, sites: str = "*") -> Visits:
    """The visits whose value was drawn, with a log-probability.

    >>> drawn = Decision(torch.ones(1), scores=torch.zeros(1), log_prob=torch.tensor([-0.7]))
    >>> len(sampled(Trace({"a": (drawn,)}, (), (), 1)))
    1
    """
    return [(site, d) for site, d in _ordered(trace, sites) if d.log_prob is not None]


def per_row(values: Tensor, decision: Decision, batch: int) -> Tensor:
    """``values`` of a visit over the batch, summed over trailing dimensions; exactly 0 where a row never came.

    >>> per_row(torch.tensor([[1.0, 2.0]]), Decision(torch.ones(1, 2), rows=torch.tensor([1])), 3)
    tensor([0., 3., 0.])
    """
    if values.ndim > 1:
        values = values.flatten(1).sum(1)
    if decision.reached is not None:
        values = torch.where(decision.reached, values, 0.0)  # chosen, not multiplied: NaN times 0 is NaN
    return values if decision.rows is None else values.new_zeros(batch).index_add(0, decision.rows, values)


def came(decision: Decision, batch: int) -> Tensor:
    """Which rows of the batch really came to a visit.

    >>> came(Decision(torch.ones(2), rows=torch.tensor([2, 0])), 3)
    tensor([ True, False,  True])
    """
    ones = torch.ones(decision.value.shape[0], device=decision.value.device)
    return per_row(ones, decision, batch) > 0
