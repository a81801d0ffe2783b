"""Soft rules: weights without a discrete choice."""

from __future__ import annotations

import math

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


class ReluTanh(Rule):
    r"""A weight that can be exactly zero: :math:`v = \max(0, \tanh(s))`, in [0, 1).

    Differentiable without sampling where :math:`s > 0`. What has weight 0 isn't computed, and 0 is all that it would have
    added. A closed gate has no gradient and can reopen only through other inputs: start open (a bias of 1.5 on the scores,
    :math:`v \approx 0.9`) and keep the weight of the cost small at first. A NaN score spends: its weight is 1.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape and is its own soft value.

    >>> ReluTanh()(torch.tensor([-1.0, 0.0, 1.5, float("nan")])).value
    tensor([0.0000, 0.0000, 0.9051, 1.0000])

    References:
        Survey sections 2.1.3 (3) and 5.1.3; Li et al., Learning Dynamic Routing for Semantic Segmentation, CVPR 2020.
    """

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        # NaN becomes infinity here rather than 1 later, so that no NaN meets a gradient of 0.
        open_ = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        value = torch.tanh(open_).relu()
        return Outcome(value, soft=value)
