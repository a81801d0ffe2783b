"""Geometric transforms of images: where each cell of an output grid is read from, and the differentiable reading.

Coordinates are grid_sample's with ``align_corners=False``: x to the right, y down, the image's borders at -1 and 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cells(height: int, width: int, like: Tensor) -> Tensor:
    r"""Centres of :math:`h \times w` cells, (x, y) row by row.

    Shape:
        Returns :math:`(hw, 2)`.

    Args:
        height: :math:`h`.
        width: :math:`w`.
        like: gives device and dtype.

    Returns:
        The centres, the borders of the outer cells at -1 and 1.

    >>> cells(1, 2, torch.zeros(()))
    tensor([[-0.5000,  0.0000],
            [ 0.5000,  0.0000]])
    """
    x = (2 * torch.arange(width, device=like.device, dtype=like.dtype) + 1) / width - 1
    y = (2 * torch.arange(height, device=like.device, dtype=like.dtype) + 1) / height - 1
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)


def affine(places: Tensor, theta: Tensor) -> Tensor:
    r"""Where cells are read from: :math:`\theta\,(x, y, 1)^\top`.

    Shape:
        ``places`` :math:`(P, 2)`, ``theta`` :math:`(R, 2, 3)`; returns :math:`(R, P, 2)`.

    Args:
        places: of the output grid.
        theta: from output to input coordinates.

    Returns:
        Places in the input.

    >>> affine(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.5, 0.0, 0.25], [0.0, 0.5, 0.0]]]))
    tensor([[[0.7500, 0.0000]]])

    References:
        Survey section 3.2.1; Jaderberg et al., Spatial Transformer Networks, NIPS 2015.
    """
    return _with_ones(places) @ theta.mT


def projective(places: Tensor, matrix: Tensor) -> Tensor:
    r"""Where cells are read from: :math:`(u, v, w) = H\,(x, y, 1)^\top`, at :math:`(u / w, v / w)`.

    Shape:
        ``places`` :math:`(P, 2)`, ``matrix`` :math:`(R, 3, 3)`; returns :math:`(R, P, 2)`.

    Args:
        places: of the output grid.
        matrix: :math:`H`; where :math:`w` is 0 a place is infinite or NaN.

    Returns:
        Places in the input.

    >>> projective(torch.tensor([[1.0, 0.0]]), torch.diag(torch.tensor([1.0, 1.0, 2.0]))[None])
    tensor([[[0.5000, 0.0000]]])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """
    seen = _with_ones(places) @ matrix.mT
    return seen[..., :2] / seen[..., 2:]


def spline_basis(knots: Tensor) -> Tensor:
    r"""What turns the values at ``knots`` into the coefficients of a thin plate spline through them, solved once.

    The :math:`K` first rows of the coefficients weigh :math:`U(\lVert p - k \rVert)` with :math:`U(r) = r^2 \log r^2`, the last
    three are those of 1, x and y.

    Shape:
        ``knots`` :math:`(K, 2)`, at least three of them not on a line; returns :math:`(K + 3, K)`.

    Args:
        knots: where the spline's values will be given.

    Returns:
        The basis.

    >>> square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    >>> spline(torch.tensor([[0.0, 0.5]]), square, spline_basis(square) @ square[None]).round(decimals=4).abs()
    tensor([[[0.0000, 0.5000]]])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015; Bookstein, Principal Warps, 1989.
    """
    wide = knots.double()
    polynomial = _with_ones(wide).roll(1, 1)
    corner = wide.new_zeros(3, 3)
    system = torch.cat([torch.cat([_bumps(wide, wide), polynomial], 1), torch.cat([polynomial.mT, corner], 1)])
    return torch.linalg.inv(system)[:, : len(knots)].to(knots.dtype)


def spline(places: Tensor, knots: Tensor, coefficients: Tensor) -> Tensor:
    r"""Thin plate spline: :math:`f(p) = a_0 + a_x x + a_y y + \sum_k w_k U(\lVert p - k \rVert)`.

    Shape:
        ``places`` :math:`(P, 2)`, ``knots`` :math:`(K, 2)`, ``coefficients`` :math:`(R, K + 3, 2)`; returns :math:`(R, P, 2)`.

    Args:
        places: of the output grid.
        knots: those that the coefficients were solved for.
        coefficients: :func:`spline_basis` times the values at the knots.

    Returns:
        Places in the input.

    >>> knots = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.0, 1.0]])
    >>> spline(knots, knots, spline_basis(knots) @ (knots + 1)[None]).round(decimals=4)[0, 2]
    tensor([1., 2.])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """
    features = torch.cat([_bumps(places, knots), _with_ones(places).roll(1, 1)], 1)
    return features @ coefficients


def read(x: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    r"""Bilinear samples of ``x`` at ``places``, 0 beyond the border; differentiable by both.

    Shape:
        ``x`` :math:`(R, C, H, W)`, ``places`` :math:`(R, hw, 2)`; returns :math:`(R, C, h, w)`.

    Args:
        x: images or features.
        places: in the coordinates of this file, cells row by row.
        height: :math:`h`.
        width: :math:`w`.

    Returns:
        The samples; NaN where a place is NaN.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> read(x, cells(2, 2, x)[None], 2, 2).squeeze()
    tensor([[0., 1.],
            [2., 3.]])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """
    grid = places.to(x.dtype).unflatten(1, (height, width))
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _with_ones(places: Tensor) -> Tensor:
    return torch.cat([places, torch.ones_like(places[:, :1])], 1)


def _bumps(places: Tensor, knots: Tensor) -> Tensor:
    """The spline's kernel between all places and knots."""
    squared = (places[:, None] - knots[None]).square().sum(-1)
    return torch.xlogy(squared, squared)
