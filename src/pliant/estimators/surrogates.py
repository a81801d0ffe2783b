"""Surrogates: functions whose gradient stands in for that of the step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.estimators.base import positive


class Surrogate(nn.Module, ABC):
    """A function of the logit, differentiated in place of the step; and the probability of spending that goes with it."""

    @abstractmethod
    def forward(self, logit: Tensor) -> Tensor:
        """What is differentiated."""

    def probability(self, logit: Tensor) -> Tensor:
        """Of spending; the sigmoid, unless the surrogate is a probability itself."""
        return torch.sigmoid(logit)

    def log_probability(self, logit: Tensor, hard: Tensor) -> Tensor:
        """Of the value ``hard``; exact in both tails."""
        return F.logsigmoid(torch.where(hard > 0, logit, -logit))


class Sigmoid(Surrogate):
    r""":math:`\sigma(a)`, so :math:`\partial L / \partial a := \sigma'(a)\,\partial L / \partial h`.

    >>> Sigmoid()(torch.zeros(1))
    tensor([0.5000])

    References:
        Survey section 5.2.2 (1); Bengio, Leonard, Courville, 2013 (the variant times the sigmoid's derivative).
    """

    def forward(self, logit: Tensor) -> Tensor:
        """The sigmoid."""
        return torch.sigmoid(logit)


class Copy(Surrogate):
    r""":math:`a` itself: the gradient is copied, :math:`\partial L / \partial a := \partial L / \partial h`.

    >>> Copy()(torch.tensor([-3.0, 0.5]))
    tensor([-3.0000,  0.5000])

    References:
        Survey section 5.2.2 (1); Bengio, Leonard, Courville, 2013 (as if the step were the identity; at least as good there).
    """

    def forward(self, logit: Tensor) -> Tensor:
        """The logit."""
        return logit


class Clipped(Surrogate):
    r""":math:`\max(-1, \min(1, a))`: the gradient is copied where :math:`|a| \le 1` and 0 elsewhere.

    >>> Clipped()(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])

    References:
        Survey section 5.2.2 (1).
    """

    def forward(self, logit: Tensor) -> Tensor:
        """The logit within [-1, 1]."""
        return logit.clamp(-1, 1)


class HardSigmoid(Surrogate):
    r""":math:`\max(0, \min(1, (\alpha a + 1) / 2))`: gradient :math:`\alpha / 2` where :math:`|a| < 1 / \alpha`.

    Args:
        slope: :math:`\alpha > 0`, a buffer that may be annealed, as in hierarchical multiscale RNNs: see ``Ramp``.

    Raises:
        PliantError: where the slope isn't positive.

    >>> HardSigmoid(5.0)(torch.tensor([-1.0, -0.1, 0.1, 1.0]))
    tensor([0.0000, 0.2500, 0.7500, 1.0000])

    References:
        Survey section 5.2.2 (1); Chung, Ahn, Bengio, ICLR 2017.
    """

    slope: Tensor

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("slope", positive(slope, "slope"))

    def forward(self, logit: Tensor) -> Tensor:
        """The hard sigmoid."""
        return ((self.slope * logit + 1) / 2).clamp(0, 1)

    def probability(self, logit: Tensor) -> Tensor:
        """The hard sigmoid is a probability."""
        return self(logit)

    def log_probability(self, logit: Tensor, hard: Tensor) -> Tensor:
        """Of the value ``hard``."""
        probability = self(logit)
        return torch.where(hard > 0, probability, 1 - probability).log()


class Rounding(Surrogate):
    r""":math:`a + 1/2`, of a score that is a probability itself with its threshold at one half: the gradient of rounding is copied.

    >>> Rounding().probability(torch.tensor([-0.5, 0.2]))
    tensor([0.0000, 0.7000])

    References:
        Survey section 5.2.2 (1); Campos et al., Skip RNN, ICLR 2018.
    """

    def forward(self, logit: Tensor) -> Tensor:
        """The probability that was scored."""
        return logit + 0.5

    def probability(self, logit: Tensor) -> Tensor:
        """The same, within [0, 1] where the threshold isn't one half."""
        return self(logit).clamp(0, 1)

    def log_probability(self, logit: Tensor, hard: Tensor) -> Tensor:
        """Of the value ``hard``."""
        probability = self.probability(logit)
        return torch.where(hard > 0, probability, 1 - probability).log()
