"""Gaussian: draw a place around the one that the policy means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.site import Outcome, Rule
from pliant.estimators.base import positive, wide


class Gaussian(Rule):
    r"""A place in :math:`[0, 1]` per score, drawn around its mean while training; the mean otherwise.

    .. math:: \mu = \sigma(s), \qquad a \sim N(\mu, \text{std}^2), \qquad v = \min(1, \max(0, a))

    The value has no gradient while training: a policy loss weighs ``log_prob``, the log-density of :math:`a`, the draw before it
    is clamped (the clamp is the environment's, so the score function stays unbiased).

    Shape:
        scores :math:`(R, ...)`; value and ``log_prob`` have the same shape.

    Args:
        std: of the draws, in shares of the range; a buffer that may be annealed.

    Raises:
        PliantError: where std isn't positive.

    >>> _ = torch.manual_seed(0)
    >>> policy = Gaussian(std=0.1)
    >>> policy(torch.zeros(10_000)).value.std().round(decimals=2), policy.eval()(torch.zeros(1)).value
    (tensor(0.1000), tensor([0.5000]))

    References:
        Survey sections 3.2.2 and 5.2.2 (3); Mnih et al., NeurIPS 2014; Wang et al., Glance and Focus, NeurIPS 2020.

    Differs from the paper: released code takes the density at the clamped place, which is no density of what was drawn.
    """

    spends = False
    std: Tensor

    def __init__(self, *, std: float = 0.1) -> None:
        super().__init__()
        self.register_buffer("std", positive(std, "std"))

    def forward(self, scores: Tensor) -> Outcome:
        """Drawn while training, the mean otherwise."""
        mean = torch.sigmoid(scores)
        if not self.training:
            return Outcome(mean, weight=True)
        centre, std = mean.to(wide(scores)), self.std.to(wide(scores))
        drawn = (centre + std * torch.randn_like(centre)).detach()
        log_prob = -((drawn - centre) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
        return Outcome(drawn.clamp(0, 1).to(scores.dtype), log_prob=log_prob, weight=True)
