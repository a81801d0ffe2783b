"""Threshold: spend where the score is above it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule


class Threshold(Rule):
    r"""Spend where the score is above a threshold: :math:`v = 1[\,\neg (s \le t)\,]`.

    The threshold is a buffer: a dial that can be turned after training and after export. A NaN score spends, so that a
    broken input gets the dense network's answer and never a cheap wrong one.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        threshold: in the units of the scores; ``-inf`` always spends, ``inf`` never (but for NaN).

    Raises:
        PliantError: where the threshold isn't a number.

    >>> Threshold(0.5)(torch.tensor([0.2, 0.5, 0.9, float("nan")])).value
    tensor([0., 0., 1., 1.])

    References:
        Survey section 5.1.1.
    """

    threshold: Tensor

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
            raise PliantError(
                got=f"threshold {threshold!r}", expected="a number", do="pass a float, inf and -inf included"
            )
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    def forward(self, scores: Tensor) -> Outcome:
        """The value of ``scores``."""
        return Outcome((~(scores <= self.threshold)).to(scores.dtype))
