"""Levels: how far to go through alternatives in order of cost, as go-on values; and the weight that each level has."""

from __future__ import annotations

import torch
from torch import Tensor


def level_weights(value: Tensor) -> Tensor:
    r"""The weight of each level when every step is taken or not: :math:`w_k = (1 - v_{k+1}) \prod_{j \le k} v_j`.

    For values 0 and 1 that's one-hot at the number of leading ones. For probabilities of independent steps it's the chance
    of stopping at each level. Weights sum to 1, and are differentiable in every value.

    Shape:
        ``value``: :math:`(R, K)`; weights :math:`(R, K + 1)`.

    >>> level_weights(torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.5, 0.0]]))
    tensor([[0.0000, 1.0000, 0.0000, 0.0000],
            [0.5000, 0.2500, 0.2500, 0.0000]])

    References:
        Survey section 2.1.1 (2b).
    """
    reached = torch.cat([torch.ones_like(value[:, :1]), value.cumprod(1)], 1)
    return reached * torch.cat([1 - value, torch.ones_like(value[:, :1])], 1)


def level(value: Tensor) -> Tensor:
    """At which level each row stops: how many ones lead, int64. What isn't 0 goes on, so NaN does.

    >>> level(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]]))
    tensor([1, 0, 3])
    """
    return (value != 0).to(torch.int64).cumprod(1).sum(1)
