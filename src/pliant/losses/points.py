"""Losses of points: what a head says at real positions of a map, against a map of classes."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pliant.core.trace import Trace


class Pointwise(NamedTuple):
    """What a segmentation net that is trained on points answers: coarse logits (R, K, H, W), and logits at points.

    ``points`` (R, N, 2) are (x, y) in shares of the sides, ``logits`` (R, N, K).
    """

    coarse: Tensor
    points: Tensor
    logits: Tensor


class PointLoss:
    r"""Cross-entropy of coarse logits, upsampled to the target's size, plus that of the points' logits.

    .. math:: L = \mathrm{CE}(\mathrm{up}(z_0), t) + \mathrm{CE}(z_p, t_p)

    Shape:
        target: classes :math:`(R, H, W)`, int64; a point's is that of the cell that it lies in.

    >>> import torch
    >>> y = Pointwise(torch.zeros(1, 2, 1, 1), torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.0, 99.0]]]))
    >>> PointLoss()(y, Trace({}, (), (), 1), torch.tensor([[[0, 1], [0, 0]]]), 0.0)
    tensor(0.6931)

    References:
        Survey section 3.1.1; Kirillov et al., PointRend: Image Segmentation as Rendering, CVPR 2020.
    """

    def __call__(self, y: Pointwise, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The sum, no unit."""
        height, width = target.shape[1:]
        coarse = F.interpolate(y.coarse, size=(height, width), mode="bilinear", align_corners=False)
        sides = y.points.new_tensor([width, height])
        cell = (y.points * sides).long().clamp_min(0).minimum(sides.long() - 1)
        classes = target.flatten(1).gather(1, cell[..., 1] * width + cell[..., 0])
        return F.cross_entropy(coarse, target) + F.cross_entropy(y.logits.flatten(0, 1), classes.flatten())
