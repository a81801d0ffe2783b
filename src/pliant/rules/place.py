"""Rules for decisions that are numbers, such as a place or a transform: regressed, or drawn blindly."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.site import Outcome, Rule


class Regressed(Rule):
    r"""The score is the value: :math:`v = s`, for what a network regresses. Differentiable, and a weight to whoever reads it.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape and is its own soft value.

    >>> Regressed()(torch.tensor([[1.5, -0.5]])).value
    tensor([[ 1.5000, -0.5000]])

    References:
        Survey section 3.2.1; Jaderberg et al., Spatial Transformer Networks, NIPS 2015.
    """

    spends = False

    def forward(self, scores: Tensor) -> Outcome:
        """The scores."""
        return Outcome(scores, soft=scores, weight=True)


class Uniform(Rule):
    r"""Anywhere: :math:`v \sim U[0, 1]`, whatever the input; the control that a learned place has to beat.

    Shape:
        The value has the decision's shape.

    Args:
        generator: source of randomness, for repeatable draws; it is shared by all sites the rule is bound to.

    >>> Uniform(torch.Generator().manual_seed(0))(torch.zeros(1, 2)).value
    tensor([[0.4963, 0.7682]])

    References:
        Survey section 3.2.2; Wang et al., Glance and Focus, NeurIPS 2020 (places in the first stage of training).
    """

    reads_scores = False
    spends = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def __deepcopy__(self, memo: dict[int, object]) -> Uniform:
        return Uniform(self.generator)  # generators can't be copied, and one stream is what makes draws repeatable

    def forward(self, scores: Tensor) -> Outcome:
        """Draws."""
        value = torch.rand(scores.shape, generator=self.generator, device=scores.device, dtype=scores.dtype)
        return Outcome(value, weight=True)
