"""Straight-through: a hard value forward, a surrogate's gradient backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.site import Outcome
from pliant.estimators.base import Estimator


class StraightThrough(Estimator):
    r"""Forward the rule's hard value, backward the gradient of a sigmoid: :math:`v = h + \sigma(s - t) - \mathrm{sg}(\sigma(s - t))`.

    Args:
        rule: a threshold rule on logits.

    >>> import pliant
    >>> s = torch.tensor([1.0, -1.0], requires_grad=True)
    >>> out = StraightThrough(pliant.rules.Threshold(0.0))(s)
    >>> out.value.sum().backward()
    >>> out.value.detach(), s.grad
    (tensor([1., 0.]), tensor([0.1966, 0.1966]))

    References:
        Survey section 5.2.2 (1); Bengio, Leonard, Courville, 2013.
    """

    def forward(self, scores: Tensor) -> Outcome:
        """Hard value, soft gradient."""
        soft = torch.sigmoid(scores - self.rule.threshold)
        hard = self.rule(scores).value
        # A NaN score spends: its value stays 1.
        return Outcome(hard + (soft - soft.detach()).nan_to_num() if self.training else hard, soft=soft)
