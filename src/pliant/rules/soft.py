"""Soft rules: weights without a discrete choice."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.site import Outcome, Rule


class Sigmoid(Rule):
    r"""A weight in (0, 1): :math:`v = \sigma(s)`. Never exactly 0, so nothing is skipped: for training and for study.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    >>> Sigmoid()(torch.zeros(2)).value
    tensor([0.5000, 0.5000])

    References:
        Survey section 5.1.3.
    """

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        value = torch.sigmoid(scores)
        return Outcome(value, soft=value)
