"""Gates: small trained heads that score intermediate features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.core.site import Score
from pliant.scores.confidence import Pooled


class LinearGate(Score):
    r"""Pooled linear gate: :math:`s = w \cdot \mathrm{mean}_{hw}(x) + b`, a logit; the natural threshold is 0.

    Shape:
        features :math:`(R, C, ...)`; scores :math:`(R,)`.

    Args:
        channels: :math:`C`.
        bias: initial bias; positive starts open, so that no layer dies early.

    >>> torch.manual_seed(0).seed() and LinearGate(4, bias=2.0)(torch.zeros(3, 4, 5, 5))
    tensor([2., 2., 2.], grad_fn=<SqueezeBackward1>)

    References:
        Survey section 5.1.3.
    """

    def __init__(self, channels: int, *, bias: float = 1.0) -> None:
        super().__init__()
        self.pool = Pooled()
        self.linear = nn.Linear(channels, 1)
        nn.init.normal_(self.linear.weight, std=1e-3)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        return self.linear(self.pool(x)).squeeze(-1)


class MLPGate(Score):
    r"""ConvNet-AIG's gate: pool, linear to ``hidden``, batch norm, ReLU, linear to two logits; :math:`s = z_1 - z_0`.

    The difference of the two logits is all that a choice between two needs: Gumbel noise on both is logistic noise on it.

    Shape:
        features :math:`(R, C, ...)`; scores :math:`(R,)`.

    Args:
        channels: :math:`C`.
        hidden: width of the hidden layer.
        biases: initial biases of the two logits (skip, run); (0.1, 2) opens about 85 % at the start.

    >>> gate = MLPGate(4).eval()
    >>> gate(torch.zeros(2, 4, 3, 3)).round(decimals=1)
    tensor([1.9000, 1.9000], grad_fn=<RoundBackward1>)

    References:
        Survey sections 2.1.1 (2b) and 5.1.3; Veit and Belongie, ConvNet-AIG, ECCV 2018.
    """

    def __init__(self, channels: int, *, hidden: int = 16, biases: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        self.pool = Pooled()
        self.hidden = nn.Linear(channels, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.out = nn.Linear(hidden, 2)
        nn.init.normal_(self.out.weight, std=1e-3)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor(biases))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        z = self.out(self.norm(self.hidden(self.pool(x))).relu())
        return z[:, 1] - z[:, 0]
