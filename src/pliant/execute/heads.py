"""Heads: small classifiers on feature maps, for exits and backbones alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError


class Linked(nn.Module, ABC):
    """A head that also reads the logits of the exit before it; ``Exits`` hands them on, row by row."""

    @abstractmethod
    def forward(self, x: Any, before: Tensor) -> Tensor:
        """Logits from the stage's features and the last exit's logits."""


class PooledClassifier(nn.Module):
    r"""Average-pool a map to ``size`` x ``size`` and classify it: :math:`f(x) = W\,\mathrm{avg}(x) + b`.

    Shape:
        features :math:`(R, C, H, W)`; logits :math:`(R, K)`.

    Args:
        channels: :math:`C`.
        num_classes: :math:`K`.
        size: cells per side that the map is pooled to; 1 is global pooling. A map of just this size is read as it is.

    Returns:
        Logits.

    Raises:
        Nothing: the pool is adaptive.

    >>> PooledClassifier(8, 10, size=2)(torch.zeros(3, 8, 7, 7)).shape
    torch.Size([3, 10])

    References:
        Survey section 2.1.1 (1); He et al., CVPR 2016, for the global form.
    """

    def __init__(self, channels: int, num_classes: int, *, size: int = 1) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.linear = nn.Linear(channels * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the map ``x``."""
        return self.linear(self.pool(x).flatten(1))


class MixedPoolClassifier(nn.Module):
    r"""A learned mix of max- and average-pooling, then one linear layer: the internal classifier of Shallow-Deep Networks.

    .. math:: f(x) = W\,(a \max(x) + (1 - a)\,\mathrm{avg}(x)) + b

    Both pools use ``size`` x ``size`` windows with stride :math:`\lfloor H / \text{size} \rfloor` that end at the border.

    Shape:
        features :math:`(R, C, H, W)` with :math:`H, W \ge` ``size``; logits :math:`(R, K)`.

    Args:
        channels: :math:`C`.
        num_classes: :math:`K`.
        size: cells per side that the map is shrunk to.

    Returns:
        Logits.

    Raises:
        PliantError: where the map is smaller than ``size``.

    >>> MixedPoolClassifier(8, 10)(torch.zeros(3, 8, 14, 14)).shape
    torch.Size([3, 10])

    References:
        Survey section 6 (1); Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019.

    Differs from the paper: where the side is no multiple of ``size``, windows overlap so that no border is left out and
    every map ends at ``size`` cells (the released code's windows don't, and its linear layer grows instead).
    """

    def __init__(self, channels: int, num_classes: int, *, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.mix = nn.Parameter(torch.rand(1))
        self.linear = nn.Linear(channels * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the map ``x``."""
        sides = x.shape[-2:]
        if min(sides) < self.size:
            raise PliantError(
                got=f"a map of {sides[0]} by {sides[1]}",
                expected=f"at least {self.size} by {self.size}",
                do="build the model for this image size (image_size=)",
            )
        # Fixed windows, not adaptive pools: adaptive max-pooling has no ONNX form.
        stride = [side // self.size for side in sides]
        window = [side - (self.size - 1) * step for side, step in zip(sides, stride, strict=True)]
        mixed = self.mix * F.max_pool2d(x, window, stride) + (1 - self.mix) * F.avg_pool2d(x, window, stride)
        return self.linear(mixed.flatten(1))
