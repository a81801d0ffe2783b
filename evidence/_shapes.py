"""Made images of wavy shapes to segment, and how well a mask's boundary is met."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Maps(NamedTuple):
    """Images (R, 1, H, W) and the class of every pixel (R, H, W)."""

    x: Tensor
    y: Tensor


class Parts(NamedTuple):
    """As a data set has them, but with maps for labels."""

    train: Maps
    test: Maps


def shapes(rows: int, side: int, seed: int, *, noise: float = 0.3) -> Maps:
    """One blob with 3 to 7 waves on each image, brighter than the ground by 1, under noise; targets 0 and 1 (R, H, W)."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, 1, generator=g)

    line = (torch.arange(side) + 0.5) / side
    y, x = line[None, :, None] - draw(0.35, 0.65), line[None, None, :] - draw(0.35, 0.65)
    waves = torch.randint(3, 8, (rows, 1, 1), generator=g)
    edge = draw(0.18, 0.3) * (1 + draw(0.1, 0.35) * torch.cos(waves * torch.atan2(y, x) + draw(0, 2 * math.pi)))
    inside = ((x**2 + y**2).sqrt() < edge).long()
    return Maps((inside + noise * torch.randn(rows, side, side, generator=g))[:, None], inside)


def boundary_iou(predicted: Tensor, wanted: Tensor, width: int = 1) -> float:
    """Mean over images of the intersection over union of both masks' pixels within ``width`` of their own boundaries."""

    def band(mask: Tensor) -> Tensor:
        m = mask.float()[:, None]
        inner = -F.max_pool2d(F.pad(-m, (width,) * 4, value=0.0), 2 * width + 1, 1)
        return (m - inner > 0)[:, 0]

    a, b = band(predicted), band(wanted)
    both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
    return float((both / either.clamp_min(1)).mean())
