"""Policy: a small network that looks at the input once and scores all sites."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.errors import PliantError
from pliant.core.site import Score
from pliant.scores.confidence import Pooled


class Shrink(nn.Module):
    """Average images down to ``size`` by ``size``, so that a policy's view is cheap; smaller ones stay as they are.

    >>> import torch
    >>> Shrink(8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise PliantError(got=f"size={size}", expected="at least 1", do="pass the side of the policy's view")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """The smaller images."""
        height, width = x.shape[-2:]
        step = (max(height // self.size, 1), max(width // self.size, 1))
        return x if step == (1, 1) else F.avg_pool2d(x, step)


class Policy(Score):
    r"""Scores of all sites in one look: :math:`s = W\, \mathrm{mean}_{hw}(f(x)) + b`, one logit for each of :math:`K` sites.

    The decisions of a site with this score are a plan, known before the backbone starts
    (:class:`pliant.execute.Planned`). Its own FLOPs are counted like any score's.

    Shape:
        images :math:`(R, C, H, W)`, or whatever ``features`` takes; scores :math:`(R, K)`.

    Args:
        features: :math:`f`, a small network to features :math:`(R, F, ...)`, e.g. a ResNet-8 behind :class:`Shrink`.
        width: :math:`F`.
        sites: :math:`K`.
        bias: :math:`b` at the start; positive starts with everything on.

    Raises:
        PliantError: where ``sites`` is below 1.

    >>> import torch
    >>> Policy(nn.Conv2d(3, 8, 3), 8, 5)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 5])

    References:
        Survey sections 2.1.1 (2c) and 5.1.2; Wu et al., BlockDrop, CVPR 2018.
    """

    def __init__(self, features: nn.Module, width: int, sites: int, *, bias: float = 1.0) -> None:
        super().__init__()
        if sites < 1:
            raise PliantError(got=f"{sites} sites", expected="at least 1", do="pass the number of planned sites")
        self.features = features
        self.pool = Pooled()
        self.linear = nn.Linear(width, sites)
        nn.init.normal_(self.linear.weight, std=1e-2)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of all sites."""
        return self.linear(self.pool(self.features(x)))
