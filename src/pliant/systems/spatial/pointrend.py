"""PointRend: a segmentation net whose coarse answer is refined at its most uncertain points."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.points import Refine
from pliant.functional.resample import sample
from pliant.losses.points import Pointwise
from pliant.rules.topk import TopK
from pliant.scores.spatial import PointUncertainty
from pliant.systems.backbones import conv_norm


class PointHead(nn.Module):
    """An MLP over points that reads the coarse logits again in front of every layer."""

    def __init__(self, channels: int, num_classes: int, *, hidden: int = 256, layers: int = 3) -> None:
        super().__init__()
        widths = [channels] + [hidden] * layers
        self.layers = nn.ModuleList(nn.Linear(a + num_classes, hidden) for a in widths[:-1])
        self.out = nn.Linear(hidden + num_classes, num_classes)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.out.weight, std=1e-3)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, coarse: Tensor) -> Tensor:
        """Logits (..., K) of points with these features (..., C) and coarse logits (..., K)."""
        for layer in self.layers:
            features = layer(torch.cat([features, coarse], -1)).relu()
        return self.out(torch.cat([features, coarse], -1))


class Encoder(nn.Module):
    """Fine features at full size, and coarse logits three strides of 2 below."""

    def __init__(self, num_classes: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(*conv_norm(in_chans, width), nn.ReLU())
        widths = (width, 2 * width, 3 * width, 4 * width)
        plan = itertools.pairwise(widths)
        halves = [nn.Sequential(*conv_norm(a, b, 3, 2), nn.ReLU(), *conv_norm(b, b), nn.ReLU()) for a, b in plan]
        self.coarse = nn.Sequential(*halves, nn.Conv2d(widths[-1], num_classes, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, of images ``x``."""
        fine = self.fine(x)
        return fine, self.coarse(fine)


class OnPoints(nn.Module):
    r"""PointRend as it's trained: no subdivision, but the head at :math:`N` points of each image, most of them uncertain ones.

    Of ``over`` times :math:`N` uniform points the ``uncertain`` share of :math:`N` that the coarse logits, interpolated there,
    are least sure of are kept, and filled up with uniform ones.

    Args:
        model: of :func:`pointrend`; its parameters are what is trained.
        points: :math:`N`.
        over: :math:`k` of the paper.
        uncertain: :math:`\beta` of the paper.

    Returns:
        :class:`pliant.losses.points.Pointwise`, for :class:`pliant.losses.points.PointLoss`.

    Raises:
        PliantError: where a number is out of its range.

    >>> y = OnPoints(pointrend(2, 1, width=4, hidden=8), points=12)(torch.zeros(2, 1, 16, 16))
    >>> y.points.shape, y.logits.shape
    (torch.Size([2, 12, 2]), torch.Size([2, 12, 2]))

    References:
        Survey section 3.1.1; Kirillov et al., PointRend, CVPR 2020, section 3.1.
    """

    model: Any

    def __init__(self, model: nn.Module, *, points: int, over: float = 3.0, uncertain: float = 0.75) -> None:
        super().__init__()
        if points < 1 or over < 1 or not 0 <= uncertain <= 1:
            raise PliantError(
                got=f"points={points}, over={over}, uncertain={uncertain}",
                expected="at least 1 point, over >= 1, uncertain within [0, 1]", do="see the paper: over=3, uncertain=0.75",
            )  # fmt: skip
        self.model = model
        self.points, self.over, self.uncertain = points, over, uncertain

    def forward(self, x: Tensor) -> Pointwise:
        """What the loss needs of images ``x``."""
        fine, coarse = self.model.encoder(x)
        points = self.choose(coarse.detach())
        logits = self.model.refine.head(sample(fine, points), sample(coarse, points))
        return Pointwise(coarse, points, logits)

    def choose(self, coarse: Tensor) -> Tensor:
        """Points (R, N, 2) for these coarse logits."""
        some = torch.rand(coarse.shape[0], round(self.over * self.points), 2, device=coarse.device)
        unsure = PointUncertainty()(sample(coarse, some).transpose(1, 2).unsqueeze(3)).flatten(1)
        best = unsure.topk(round(self.uncertain * self.points), dim=1).indices
        rest = torch.rand(coarse.shape[0], self.points - best.shape[1], 2, device=coarse.device)
        return torch.cat([some.gather(1, best[..., None].expand(-1, -1, 2)), rest], 1)


def pointrend(
    num_classes: int = 2, in_chans: int = 3, *, share: float = 0.03, width: int = 16, hidden: int = 64
) -> nn.Sequential:
    r"""PointRend over a small encoder: logits eight times smaller than the image, doubled three times.

    After each doubling the same number of points, those where the two best classes are nearest, is answered by an MLP on
    fine features. Train ``OnPoints(model, points=N)`` with ``PointLoss()``; :math:`K = 1` isn't meant.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`, sides multiples of 8; logits :math:`(R, K, H, W)`.

    Args:
        num_classes: :math:`K`, the background included.
        in_chans: channels of the images.
        share: points of each step, as a share of the image's pixels; a step with fewer answers all.
        width: channels of the fine features.
        hidden: of the MLP; 256 in the paper.

    Returns:
        Encoder and refinement; the site of step ``t`` is ``refine.sites.t``.

    Raises:
        PliantError: where ``share`` is outside [0, 1].

    >>> pointrend(width=4, hidden=8).eval()(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 2, 16, 16])

    References:
        Survey section 3.1.1; Kirillov et al., PointRend: Image Segmentation as Rendering, CVPR 2020.

    Differs from the paper: the encoder is ours; samples at the border aren't faded to 0.
    """
    shares = [min(1.0, share * 4 ** (2 - step)) for step in range(3)]
    sites = [Site(PointUncertainty(), TopK(share=s, dims=3)) for s in shares]
    head = PointHead(width, num_classes, hidden=hidden)
    return nn.Sequential(OrderedDict(encoder=Encoder(num_classes, in_chans, width), refine=Refine(head, sites)))
