"""RankStraightThrough: the highest scores of a row forward, a sigmoid around the cut-off backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.estimators.base import straight_through, wide
from pliant.rules.share import Share


class RankStraightThrough(Rule):
    r"""Forward the share's hard value, backward a sigmoid: :math:`v = h + \sigma(s - c) - \mathrm{sg}(\sigma(s - c))`.

    :math:`c` is the cut-off, halfway between the lowest score that spends and the highest that saves. How many spend doesn't
    hang on the scores, so no cost pulls at them: they learn which ones the task needs. In evaluation it's the rule itself.

    Shape:
        scores :math:`(R, ..., n)`; the value has the same shape.

    Args:
        rule: a :class:`~pliant.rules.Share`.

    Raises:
        PliantError: where it's another rule.

    >>> s = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    >>> out = RankStraightThrough(Share(0.34))(s)
    >>> out.value.sum().backward()
    >>> out.value.detach(), s.grad
    (tensor([[1., 0., 0.]]), tensor([[0.2350, 0.2350, 0.1491]]))

    References:
        Survey section 5.2.2 (1); Bengio, Leonard, Courville, 2013.
    """

    by_rank = True
    rule: Any

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        if not isinstance(rule, Share):
            raise PliantError(
                got=f"a {type(rule).__name__} rule", expected="a Share", do="wrap pliant.rules.Share(0.7)"
            )
        self.rule = rule

    def count(self, choices: int) -> int:
        """As the rule says."""
        return self.rule.count(choices)

    def forward(self, scores: Tensor) -> Outcome:
        """Hard value, soft gradient."""
        hard = self.rule(scores).value
        if not self.training or not scores.requires_grad:
            return Outcome(hard)
        known = scores.detach().to(wide(scores)).nan_to_num(neginf=-1e4)  # padding is far below
        lowest = known.masked_fill(hard == 0, math.inf).amin(-1, keepdim=True)
        highest = known.masked_fill(hard != 0, -math.inf).amax(-1, keepdim=True)
        cut = torch.where(lowest.isinf(), highest, torch.where(highest.isinf(), lowest, (lowest + highest) / 2))
        return Outcome(straight_through(hard, (scores - cut).sigmoid().to(scores.dtype)))
