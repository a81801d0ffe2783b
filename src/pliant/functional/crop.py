"""Differentiable crops: a soft mask of a box, a zoom into it, and how well two boxes agree.

A box is (x0, y0, x1, y1) in shares of the image's sides: (0, 0, 1, 1) is the whole image, x to the right, y down.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def square(centre: Tensor, half: Tensor) -> Tensor:
    r"""Square boxes from centres and half sides, :math:`(t_x - t_l,\ t_y - t_l,\ t_x + t_l,\ t_y + t_l)`.

    Shape:
        ``centre`` :math:`(R, 2)` as (x, y), ``half`` :math:`(R, 1)`; boxes :math:`(R, 4)`.

    Args:
        centre: in shares of the sides.
        half: half a side, in such shares.

    Returns:
        Boxes; they may reach over the border.

    >>> square(torch.tensor([[0.5, 0.25]]), torch.tensor([[0.25]]))
    tensor([[0.2500, 0.0000, 0.7500, 0.5000]])

    References:
        Survey section 5.2.1 (3); Fu et al., Look Closer to See Better, CVPR 2017.
    """
    return torch.cat([centre - half, centre + half], 1)


def box_mask(boxes: Tensor, height: int, width: int, *, sharpness: float = 10.0) -> Tensor:
    r"""Soft boxcar mask, :math:`[h(x - x_0) - h(x - x_1)]\,[h(y - y_0) - h(y - y_1)]` with :math:`h(v) = 1 / (1 + e^{-kv})`.

    1 inside, 0 outside, and differentiable by the box within some :math:`1/k` pixels of its edges.

    Shape:
        ``boxes`` :math:`(R, 4)`; masks :math:`(R, 1, H, W)`.

    Args:
        boxes: in shares of the sides.
        height: :math:`H`, in pixels.
        width: :math:`W`, in pixels.
        sharpness: :math:`k`, per pixel.

    Returns:
        Masks in [0, 1], at the pixels' centres.

    >>> box_mask(torch.tensor([[0.0, 0.5, 0.5, 1.0]]), 2, 4).squeeze().round(decimals=1)
    tensor([[0., 0., 0., 0.],
            [1., 1., 0., 0.]])

    References:
        Survey section 5.2.1 (3); Fu et al., Look Closer to See Better, CVPR 2017.
    """
    sides = boxes.new_tensor([width, height, width, height])
    x0, y0, x1, y1 = (boxes * sides)[..., None].unbind(1)

    def inside(count: int, low: Tensor, high: Tensor) -> Tensor:
        centres = torch.arange(count, device=boxes.device) + 0.5
        return torch.sigmoid(sharpness * (centres - low)) - torch.sigmoid(sharpness * (centres - high))

    return (inside(height, y0, y1)[:, :, None] * inside(width, x0, x1)[:, None, :])[:, None]


def zoom(x: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    r"""What is in each row's box, on a grid of its own: bilinear samples at the centres of :math:`h \times w` cells of the box.

    Differentiable by image and box. A box of the whole image at its own size gives the image. It samples and doesn't
    average: a box of many more pixels than cells is aliased, so pool ``x`` first. Beyond the border is 0.

    Shape:
        ``x`` :math:`(R, C, H, W)`, ``boxes`` :math:`(R, 4)`; crops :math:`(R, C, h, w)`.

    Args:
        x: images or features.
        boxes: in shares of the sides.
        height: :math:`h`, in cells.
        width: :math:`w`, in cells.

    Returns:
        The crops.

    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> zoom(x, torch.tensor([[0.5, 0.0, 1.0, 0.5]]), 2, 2).squeeze()
    tensor([[2., 3.],
            [6., 7.]])

    References:
        Survey section 5.2.1 (3); Jaderberg et al., Spatial Transformer Networks, NIPS 2015.
    """
    x0, y0, x1, y1 = boxes[..., None].unbind(1)

    def places(count: int, low: Tensor, high: Tensor) -> Tensor:
        centres = (torch.arange(count, device=boxes.device) + 0.5) / count
        return 2 * (low + (high - low) * centres) - 1  # grid_sample's coordinates: borders at -1 and 1

    across = places(width, x0, x1)[:, None, :].expand(-1, height, -1)
    down = places(height, y0, y1)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([across, down], -1).to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    r"""Intersection over union, row by row, :math:`|A \cap B| / |A \cup B|`.

    Shape:
        ``boxes`` and ``others`` :math:`(R, 4)`; :math:`(R,)` in [0, 1].

    Args:
        boxes: with x0 < x1 and y0 < y1, in any one unit.
        others: likewise.

    Returns:
        1 where both are the same, 0 where they don't meet.

    >>> overlap(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([[1.0, 0.0, 3.0, 1.0]])).round(decimals=3)
    tensor([0.3330])

    References:
        Survey section 2.3.1.
    """
    low, high = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    both = (high - low).clamp_min(0).prod(1)
    first, second = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    return both / (first + second - both)
