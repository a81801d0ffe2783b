"""Random crops and flips of whole batches of images, reproducible by their generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.core.errors import PliantError


class Transform(Protocol):
    """A random change of a batch: all its randomness comes from the generator."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The changed batch, of the same shape."""
        ...


@dataclass(frozen=True)
class RandomCrop:
    r"""Pad each image on all sides, then cut a window of the old size at a random place, another for each row.

    y[n, c, i, j] = padded(x)[n, c, i + a_n, j + b_n] with a_n, b_n uniform on 0..2 * pad

    Shape: (N, C, H, W) -> (N, C, H, W).

    Args:
        pad: pixels added on each side.
        fill: value of the added pixels; 0 is the mean colour of normalised images.

    Raises:
        PliantError: pad below 0, or the batch is not (N, C, H, W).

    >>> RandomCrop(1)(torch.ones(1, 1, 2, 2), torch.Generator().manual_seed(0)).shape
    torch.Size([1, 1, 2, 2])

    References: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2 (pad 4 on CIFAR-10).
    """

    pad: int
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise PliantError(got=f"pad={self.pad}", expected="0 or more pixels", do="pass for example pad=4")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop the batch."""
        n, _, height, width = _image_shape(x)
        padded = F.pad(x, (self.pad,) * 4, value=self.fill)
        offset = torch.randint(2 * self.pad + 1, (2, n, 1), generator=generator, device=generator.device).to(x.device)
        rows = (offset[0] + torch.arange(height, device=x.device))[:, :, None]
        columns = (offset[1] + torch.arange(width, device=x.device))[:, None, :]
        image = torch.arange(n, device=x.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class RandomFlip:
    r"""Mirror each image left to right with probability p, row by row.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Args:
        p: probability, 0 to 1.

    Raises:
        PliantError: p outside 0 to 1, or the batch is not (N, C, H, W).

    >>> RandomFlip(p=1.0)(torch.tensor([[[[1.0, 2.0]]]]), torch.Generator())
    tensor([[[[2., 1.]]]])
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise PliantError(got=f"p={self.p}", expected="a probability from 0 to 1", do="pass for example p=0.5")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Flip rows of the batch."""
        n = _image_shape(x)[0]
        flip = torch.rand(n, generator=generator, device=generator.device).to(x.device) < self.p
        return torch.where(flip[:, None, None, None], x.flip(-1), x)


def augment(x: Tensor, generator: torch.Generator, transforms: Sequence[Transform]) -> Tensor:
    r"""Apply the transforms one after the other.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Args:
        x: a batch of images.
        generator: source of all randomness; may be on the CPU while x is on another device.
        transforms: for example (RandomCrop(4), RandomFlip()).

    Returns:
        The changed batch; x itself is left as it was.

    >>> x = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> same = [augment(x, torch.Generator().manual_seed(3), (RandomCrop(1), RandomFlip())) for _ in range(2)]
    >>> torch.equal(*same)
    True
    """
    for transform in transforms:
        x = transform(x, generator)
    return x


def _image_shape(x: Tensor) -> torch.Size:
    """Shape of a batch of images, or an error."""
    if x.ndim != 4:
        raise PliantError(
            got=f"a batch of shape {tuple(x.shape)}", expected="(N, C, H, W)", do="pass a batch of images"
        )
    return x.shape
