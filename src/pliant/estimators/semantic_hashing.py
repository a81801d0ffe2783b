"""Improved semantic hashing: noise, and half of the rows soft."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.site import Outcome
from pliant.estimators.base import Estimator, straight_through, wide


def saturating_sigmoid(x: Tensor) -> Tensor:
    r"""Sigmoid that reaches 0 and 1: :math:`\max(0, \min(1, 1.2\,\sigma(x) - 0.1))`.

    >>> saturating_sigmoid(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])

    References:
        Kaiser and Bengio, Discrete Autoencoders for Sequence Models, 2018.
    """
    return (1.2 * torch.sigmoid(x) - 0.1).clamp(0, 1)


class SemHash(Estimator):
    r"""Improved semantic hashing while training; the rule itself otherwise.

    With :math:`l = s - t` and :math:`\epsilon \sim N(0, 1)`, each row by a fair coin, the same for all decisions of the row:

    .. math:: \alpha = \max(0, \min(1, 1.2\,\sigma(l + \epsilon) - 0.1)), \qquad \beta = 1[l + \epsilon > 0]

    forward :math:`\alpha` or :math:`\beta`, backward always :math:`\partial\alpha / \partial l`. Nothing is annealed; the noise
    pushes logits away from the threshold. ``soft`` is :math:`P(\beta = 1) = \Phi(l)`, the normal distribution function.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape, and is a weight in [0, 1] while training.

    Args:
        rule: a threshold rule on logits.

    Raises:
        PliantError: where ``rule`` isn't a threshold.

    >>> import pliant
    >>> semhash = SemHash(pliant.rules.Threshold(0.0))
    >>> semhash.eval()(torch.tensor([0.3, -0.3])).value
    tensor([1., 0.])

    References:
        Survey section 5.2.2 (2); Kaiser and Bengio, 2018; Chen et al., GaterNet, CVPR 2019.
    """

    def forward(self, scores: Tensor) -> Outcome:
        """Noisy while training."""
        logit = self.logit(scores)
        soft = torch.special.ndtr(logit).to(scores.dtype)
        if not self.training:
            return Outcome(self.rule(scores).value, soft=soft)
        noisy = logit + torch.randn_like(logit)
        alpha = saturating_sigmoid(noisy)
        beta = straight_through((~(noisy <= 0)).to(logit.dtype), alpha)
        coin = torch.rand((len(logit), *[1] * (logit.ndim - 1)), dtype=wide(logit), device=logit.device) < 0.5
        value = torch.where(coin, beta, alpha.nan_to_num(1.0))
        return Outcome(value.to(scores.dtype), soft=soft, weight=True)
