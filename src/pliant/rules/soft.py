"""Soft rules: weights without a discrete choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule


class Sigmoid(Rule):
    r"""A weight in (0, m): :math:`v = m\,\sigma(s)`. Never exactly 0, so nothing is skipped: for training and for study.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape and is its own soft value.

    Args:
        most: :math:`m`; 2 gives a score of 0 the weight 1, which leaves what it weighs as it is.

    Raises:
        PliantError: where ``most`` isn't above 0.

    >>> Sigmoid()(torch.zeros(2)).value
    tensor([0.5000, 0.5000])

    References:
        Survey section 5.1.3.
    """

    def __init__(self, most: float = 1.0) -> None:
        super().__init__()
        if not most > 0:
            raise PliantError(got=f"most={most}", expected="above 0", do="pass 1 for weights in (0, 1)")
        self.most = most

    def extra_repr(self) -> str:
        """The largest weight."""
        return f"most={self.most}"

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        value = torch.sigmoid(scores)
        if self.most != 1:
            value = self.most * value
        return Outcome(value, soft=value, weight=True)


class Softmax(Rule):
    r"""Weights that share 1 among a row's choices: :math:`v_i = e^{s_i / \tau} / \sum_j e^{s_j / \tau}`.

    The temperature is a buffer, to be annealed: at 30 all choices have about the same weight, so all of them are trained.

    Shape:
        scores :math:`(R, n, ...)`, shared along the second dimension; the value has the same shape and is its own soft value.

    Args:
        temperature: :math:`\tau` at the start, above 0.

    Raises:
        PliantError: where the temperature isn't above 0, or the scores are one for each row.

    >>> Softmax(30.0)(torch.tensor([[0.0, 3.0]])).value
    tensor([[0.4750, 0.5250]])

    References:
        Survey sections 2.2.1 (1) and 5; Chen et al., Dynamic Convolution, CVPR 2020 (temperature 30, annealed to 1).
    """

    temperature: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise PliantError(got=f"temperature={temperature}", expected="above 0", do="pass e.g. 30, annealed to 1")
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        if scores.ndim < 2:
            raise PliantError(
                got=f"scores of shape {tuple(scores.shape)}", expected="several choices for each row",
                do="use Sigmoid for one",
            )  # fmt: skip
        value = torch.softmax(scores / self.temperature, 1)
        return Outcome(value, soft=value, weight=True)


class SpatialSoftmax(Rule):
    r"""Weights of positions that share a map's attention: :math:`v_p = \min(\gamma\,\mathrm{softmax}_p(s / \tau), 1)`.

    Shape:
        scores :math:`(R, 1, H, W)`; the value has the same shape and is its own soft value.

    Args:
        share: :math:`\gamma / (H W)`: which part of the positions may weigh 1.
        temperature: :math:`\tau` at the start, above 0; a buffer.

    Raises:
        PliantError: where one of them isn't above 0.

    >>> SpatialSoftmax()(torch.zeros(1, 1, 2, 2)).value.flatten()
    tensor([0.3333, 0.3333, 0.3333, 0.3333])

    References:
        Survey section 2.2.3 (3); Chen et al., Dynamic ReLU, ECCV 2020 (form C).
    """

    temperature: Tensor

    def __init__(self, share: float = 1 / 3, *, temperature: float = 10.0) -> None:
        super().__init__()
        if not (share > 0 and temperature > 0):
            raise PliantError(
                got=f"share={share}, temperature={temperature}", expected="above 0", do="pass both above 0"
            )
        self.share = share
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def extra_repr(self) -> str:
        """The share."""
        return f"share={self.share:.3g}"

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        flat = torch.softmax(scores.flatten(1) / self.temperature, 1)
        value = (self.share * flat.shape[1] * flat).clamp(max=1).reshape(scores.shape)
        return Outcome(value, soft=value, weight=True)


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
