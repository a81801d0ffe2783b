"""Frames kept as they're stored: bytes become numbers only where somebody looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError


class Decode(nn.Module):
    r"""From bytes to numbers, :math:`(x / 255 - \mathrm{mean}) / \mathrm{std}` for each channel.

    In front of an encoder, so that clips stay bytes in memory and a frame that isn't visited is never decoded.

    Shape:
        uint8 :math:`(N, C, H, W)`; float32 of the same shape.

    Args:
        mean: for each channel, in units of the full range.
        std: the same way.

    Raises:
        PliantError: where the input isn't made of bytes.

    >>> Decode([0.5], [0.5])(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten()
    tensor([-1.,  1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The decoded frames."""
        if x.dtype != torch.uint8:
            raise PliantError(got=f"frames of {x.dtype}", expected="torch.uint8", do="decode once: pass bytes")
        return (x.to(self.mean.dtype) / 255 - self.mean) / self.std
