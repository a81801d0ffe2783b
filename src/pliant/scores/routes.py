"""Routers: a gate for each way that leads on from a feature map."""

from __future__ import annotations

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score
from pliant.scores.confidence import Pooled


class RouteGate(Score):
    r"""Scores of :math:`K` ways: :math:`s = W\,\mathrm{mean}_{hw}(\mathrm{relu}(\mathrm{BN}(P * x))) + b` with a 1x1 convolution :math:`P`.

    Shape:
        features :math:`(R, C, H, W)`; scores :math:`(R, K)`.

    Args:
        channels: :math:`C`.
        ways: :math:`K`.
        bias: :math:`b` at the start: 1.5 opens gates of max(0, tanh) to 0.9; 0 for a choice of one.
        shrink: the map is averaged so many times smaller first (the paper's small gate: 4); smaller maps stay as they are.

    Raises:
        PliantError: where there are no ways, or ``shrink`` is below 1.

    >>> import torch
    >>> RouteGate(8, 3).eval()(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 3])

    References:
        Survey sections 2.1.3 (3) and 5.1.3; Li et al., Learning Dynamic Routing for Semantic Segmentation, CVPR 2020.
    """

    def __init__(self, channels: int, ways: int, *, bias: float = 1.5, shrink: int = 1) -> None:
        super().__init__()
        if ways < 1 or shrink < 1:
            raise PliantError(got=f"{ways} ways, shrink={shrink}", expected="at least 1", do="pass positive numbers")
        self.shrink = shrink
        hidden = max(1, channels // 2)
        self.narrow = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.pool = Pooled()
        self.linear = nn.Linear(hidden, ways)
        nn.init.normal_(self.linear.weight, std=1e-2)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        step = min(self.shrink, *x.shape[-2:])
        if step > 1:
            x = nn.functional.avg_pool2d(x, step)
        return self.linear(self.pool(self.narrow(x)))
