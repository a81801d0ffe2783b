"""Reading maps between their positions, and putting them together anew from each position's neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.functional.sparse_conv import Places


def sample(x: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps at real positions; beyond the border's centres as at them.

    Shape:
        ``x`` :math:`(R, C, H, W)`; ``points`` :math:`(R, N, 2)` as (x, y); returns :math:`(R, N, C)`.

    Args:
        x: maps.
        points: in shares of the sides, 0 left or top, 1 right or bottom.

    Returns:
        One row of channels for each point; differentiable by maps and points.

    >>> sample(torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([[[0.25, 0.5], [0.5, 0.5], [1.0, 0.0]]])).flatten()
    tensor([0., 2., 4.])

    References:
        Survey section 3.1.1; Kirillov et al., PointRend, CVPR 2020.

    Differs from the paper: the released code fades to 0 within half a position of the border.
    """
    grid = (2 * points - 1).unsqueeze(2)
    found = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.squeeze(3).transpose(1, 2)


def sample_at(x: Tensor, at: Places) -> Tensor:
    """Bilinear samples of maps at the centres of chosen cells of another grid over them.

    It's what ``F.interpolate`` to that grid's size shows there, computed there only; rows may choose as many as they like.

    Shape:
        ``x`` :math:`(R, C, H, W)`; returns :math:`(N, C)`.

    Args:
        x: maps.
        at: cells of a grid of ``at.height`` by ``at.width``.

    Returns:
        One row of channels for each cell; differentiable by the maps.

    >>> x, at = torch.randn(2, 3, 4, 4), Places(torch.tensor([5, 100]), 2, 8, 8)
    >>> whole = F.interpolate(x, size=(8, 8), mode="bilinear")
    >>> torch.allclose(sample_at(x, at), torch.stack([whole[0, :, 0, 5], whole[1, :, 4, 4]]), atol=1e-6)
    True

    References:
        Survey section 3.1.1; Kirillov et al., PointRend, CVPR 2020.
    """
    channels, height, width = x.shape[1:]
    flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
    line = at.index // at.width
    row = line // at.height
    y, dy = _between(line - row * at.height, at.height, height)
    z, dz = _between(at.index - line * at.width, at.width, width)
    start = row * (height * width)

    def corner(y: Tensor, z: Tensor) -> Tensor:
        return flat.index_select(0, start + y * width + z)

    below, right = (y + 1).clamp_max(height - 1), (z + 1).clamp_max(width - 1)
    dy, dz = dy[:, None].to(x.dtype), dz[:, None].to(x.dtype)
    above = torch.lerp(corner(y, z), corner(y, right), dz)
    return torch.lerp(above, torch.lerp(corner(below, z), corner(below, right), dz), dy)


def _between(cell: Tensor, cells: int, positions: int) -> tuple[Tensor, Tensor]:
    """The position before the centre of a cell, and how far the centre is on the way to the next one."""
    centre = ((cell + 0.5) * (positions / cells) - 0.5).clamp(0, positions - 1)
    before = centre.floor()
    return before.long(), centre - before


def reassemble(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    r"""Upsample maps, each target position by a kernel of its own over the neighbours of its source position.

    .. math:: y_{c,p} = \sum_{n \in [-k/2, k/2]^2} w_{n,p}\; x_{c, \lfloor p / r \rfloor + n}

    Shape:
        ``x`` :math:`(R, C, H, W)`; ``kernels`` :math:`(R, k^2, rH, rW)`; returns :math:`(R, C, rH, rW)`.

    Args:
        x: maps; zeros beyond the border.
        kernels: one for each target position, the same for all channels.
        side: :math:`k`, odd.

    Returns:
        The upsampled maps.

    >>> kernels = torch.zeros(1, 9, 2, 4)
    >>> kernels[:, 4] = 1  # only the source itself: nearest upsampling
    >>> reassemble(torch.tensor([[[[1.0, 2.0]]]]), kernels, 3).squeeze()
    tensor([[1., 1., 2., 2.],
            [1., 1., 2., 2.]])

    References:
        Survey section 3.1.2 (1); Wang et al., CARAFE: Content-Aware ReAssembly of FEatures, ICCV 2019.
    """
    rows, channels, height, width = x.shape
    ratio = kernels.shape[2] // height
    near = F.unfold(x, side, padding=side // 2).reshape(rows, channels, side * side, height * width)
    # All targets of a source position share its neighbours: (targets, k^2) times (k^2, channels) for each of them.
    weights = F.pixel_unshuffle(kernels, ratio).reshape(rows, side * side, ratio * ratio, height * width)
    y = weights.permute(0, 3, 2, 1).flatten(0, 1) @ near.permute(0, 3, 2, 1).flatten(0, 1)
    y = y.reshape(rows, height, width, ratio, ratio, channels)
    return y.permute(0, 5, 1, 3, 2, 4).reshape(rows, channels, ratio * height, ratio * width)
