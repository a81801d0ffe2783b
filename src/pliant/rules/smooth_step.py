"""SmoothStep: a weight that is exactly 0 or 1 outside a band, and once differentiable everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule


class SmoothStep(Rule):
    r"""A soft threshold with hard ends.

    .. math:: S(t) = -\tfrac{2}{\gamma^3} t^3 + \tfrac{3}{2\gamma} t + \tfrac12 \ \text{ for } |t| < \gamma / 2, \quad
        0 \text{ below}, \quad 1 \text{ above}; \qquad S(-t) = 1 - S(t)

    What weighs 0 isn't computed, in training either, since its gradient is 0 too. A NaN score is a NaN weight, which spends.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape and is its own soft value.

    Args:
        width: :math:`\gamma > 0`, of the band; a buffer that may be annealed. Narrower is sparser.

    Raises:
        PliantError: where the width isn't positive.

    >>> SmoothStep(2.0)(torch.tensor([-1.0, -0.5, 0.0, 0.5, 9.0])).value
    tensor([0.0000, 0.1562, 0.5000, 0.8438, 1.0000])

    References:
        Survey section 2.1.3 (2b); Hazimeh et al., The Tree Ensemble Layer, ICML 2020.
    """

    width: Tensor

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        if not 0 < width < float("inf"):
            raise PliantError(got=f"width {width}", expected="a positive number", do="pass e.g. 1.0")
        self.register_buffer("width", torch.tensor(float(width)))

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        width = self.width.to(scores.dtype)
        u = (scores / width).clamp(-0.5, 0.5)
        value = (u * (1.5 - 2 * u * u) + 0.5).clamp(
            0, 1
        )  # exactly 0 and 1 at the ends; rounding may pass them just before
        return Outcome(value, soft=value)
