"""Convolutions whose kernel differs from row to row: mixed from a few experts, or generated."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of kernels that are mixed and used before the next ones: about what a core's cache holds. Measured on 3x3 kernels,
# 8 experts, 32 rows of 128 channels at 8x8: 2.6x a static convolution's time in chunks, 9.8x all at once, 4.0x row by row.
CHUNK = 1_250_000
FEWEST = 4  # rows of a chunk: fewer keep a grouped convolution no busier than a loop
SMALL = 4  # positions of a map up to which running all experts takes less time than mixing their kernels


class Geometry(NamedTuple):
    """How a kernel moves: as the arguments of ``F.conv2d``, each one number for both directions or a pair."""

    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1


def pair(number: int | tuple[int, int]) -> tuple[int, int]:
    """A number for both directions.

    >>> pair(2), pair((1, 3))
    ((2, 2), (1, 3))
    """
    return (number, number) if isinstance(number, int) else number


def output_size(size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> tuple[int, int]:
    """Height and width that a convolution makes of a map of ``size``.

    >>> output_size((8, 8), (3, 3), Geometry(stride=2, padding=1))
    (4, 4)
    """
    stride, padding, dilation = (pair(g) for g in geometry[:3])
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return height, width


def mix_kernels(weights: Tensor, experts: Tensor) -> Tensor:
    r"""One kernel for each row: :math:`W_r = \sum_e w_{re} W_e`, as one matrix product.

    Shape:
        ``weights`` :math:`(R, E)`, ``experts`` :math:`(E, ...)`; returns :math:`(R, ...)`.

    Args:
        weights: of the experts, for each row.
        experts: kernels, or biases.

    Returns:
        The mixtures.

    >>> mix_kernels(torch.tensor([[1.0, 0.5]]), torch.tensor([[2.0], [4.0]]))
    tensor([[4.]])

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """
    return (weights @ experts.flatten(1)).reshape(-1, *experts.shape[1:])


def conv_each(x: Tensor, kernels: Tensor, bias: Tensor | None = None, *, geometry: Geometry = Geometry()) -> Tensor:
    r"""Convolve each row with a kernel of its own: :math:`y_r = W_r * x_r + b_r`, as one convolution in :math:`R g` groups.

    Shape:
        ``x`` :math:`(R, C, H, W)`, ``kernels`` :math:`(R, O, C / g, k, l)`, ``bias`` :math:`(R, O)`; returns
        :math:`(R, O, H', W')`.

    Args:
        x: maps.
        kernels: one for each row.
        bias: likewise; None adds nothing.
        geometry: how the kernels move, with :math:`g` groups.

    Returns:
        The convolved maps; as many FLOPs as a static convolution.

    >>> x = torch.ones(2, 1, 2, 2)
    >>> conv_each(x, torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1, 1)).amax((1, 2, 3))
    tensor([2., 3.])

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """
    rows, outputs = kernels.shape[:2]
    if (
        torch.compiler.is_exporting() or rows == 0
    ):  # as many groups as rows would fix the rows, and 0 groups are refused
        y = _by_product(x, kernels, geometry)
    else:
        folded = geometry._replace(groups=rows * geometry.groups)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), None, *folded)
        y = y.reshape(rows, outputs, *y.shape[2:])
    return y if bias is None else y + bias[..., None, None]


def _by_product(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The same as one batched matrix product of the kernels and every position's neighbours."""
    stride, padding, dilation, groups = geometry
    size = output_size(tuple(x.shape[2:]), tuple(kernels.shape[3:]), geometry)
    near = F.unfold(x, tuple(kernels.shape[3:]), dilation, padding, stride)
    y = kernels.unflatten(1, (groups, -1)).flatten(3) @ near.unflatten(1, (groups, -1))
    return y.flatten(1, 2).unflatten(2, size)


def mix_then_conv(
    x: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None = None, *, geometry: Geometry = Geometry()
) -> Tensor:
    r"""Mix the experts' kernels, then convolve once: :math:`y_r = (\sum_e w_{re} W_e) * x_r + \sum_e w_{re} b_e`.

    In chunks of rows whose kernels fit a cache: written out for the whole batch they cost more time than the convolution.

    Shape:
        ``x`` :math:`(R, C, H, W)`, ``weights`` :math:`(R, E)`, ``experts`` :math:`(E, O, C / g, k, l)`, ``bias``
        :math:`(E, O)`; returns :math:`(R, O, H', W')`.

    Args:
        x: maps.
        weights: of the experts, for each row.
        experts: kernels.
        bias: of each expert; None adds nothing.
        geometry: how the kernels move.

    Returns:
        The convolved maps, for the FLOPs of one convolution and :math:`2 E |W|` for each row.

    >>> x, experts = torch.randn(3, 4, 5, 5), torch.randn(2, 6, 4, 3, 3)
    >>> first = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    >>> torch.allclose(mix_then_conv(x, first, experts), F.conv2d(x, experts[0]), atol=1e-5)
    True

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """

    def some(x: Tensor, weights: Tensor) -> Tensor:
        biases = None if bias is None else mix_kernels(weights, bias)
        return conv_each(x, mix_kernels(weights, experts), biases, geometry=geometry)

    if torch.compiler.is_exporting():
        return some(x, weights)
    few = max(FEWEST, CHUNK // max(1, experts[0].numel()))
    if x.shape[0] <= few:
        return some(x, weights)
    return torch.cat([some(a, w) for a, w in zip(x.split(few), weights.split(few), strict=True)])


def conv_then_mix(
    x: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None = None, *, geometry: Geometry = Geometry()
) -> Tensor:
    r"""Convolve with every expert, then mix: :math:`y_r = \sum_e w_{re} (W_e * x_r + b_e)`.

    The same numbers for :math:`E` convolutions: where a map is as small as a pixel or a few, mixing kernels takes longer.

    Shape:
        As of :func:`mix_then_conv`.

    Args:
        x: maps.
        weights: of the experts, for each row.
        experts: kernels.
        bias: of each expert; None adds nothing.
        geometry: how the kernels move.

    Returns:
        The convolved maps.

    >>> x, weights, experts = torch.randn(3, 4, 5, 5), torch.rand(3, 2), torch.randn(2, 6, 4, 3, 3)
    >>> torch.allclose(conv_then_mix(x, weights, experts), mix_then_conv(x, weights, experts), atol=1e-4)
    True

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """
    groups, number, outputs = geometry.groups, experts.shape[0], experts.shape[1]
    side_by_side = experts.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)  # the experts of a group together
    y = F.conv2d(x, side_by_side, None, *geometry)
    size = y.shape[2:]
    y = weights[:, None, None] @ y.reshape(x.shape[0], groups, number, outputs // groups * size[0] * size[1])
    y = y.reshape(x.shape[0], outputs, *size)
    return y if bias is None else y + mix_kernels(weights, bias)[..., None, None]


def mixed_conv2d(
    x: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None = None, *, geometry: Geometry = Geometry()
) -> Tensor:
    """:func:`mix_then_conv`, or where the output has few positions :func:`conv_then_mix`: what takes less time.

    The choice hangs on the map and never on the rows, so that a row's FLOPs don't hang on its batch.

    Shape:
        As of :func:`mix_then_conv`.

    Args:
        x: maps.
        weights: of the experts, for each row.
        experts: kernels.
        bias: of each expert; None adds nothing.
        geometry: how the kernels move.

    Returns:
        The convolved maps.

    >>> mixed_conv2d(torch.ones(1, 2, 1, 1), torch.ones(1, 3), torch.ones(3, 1, 2, 1, 1)).item()
    6.0

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """
    height, width = output_size(tuple(x.shape[2:]), tuple(experts.shape[3:]), geometry)
    way = conv_then_mix if height * width <= SMALL else mix_then_conv
    return way(x, weights, experts, bias, geometry=geometry)


def filter_each(x: Tensor, filters: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Filter every position with taps of its own: :math:`y_{rcp} = \sum_k f_{rckp}\, x_{rc,\,p + p_k}`, zeros beyond the border.

    Shape:
        ``x`` :math:`(R, C, H, W)`, ``filters`` :math:`(R, C, K, H, W)` or :math:`(R, 1, K, H, W)` for all channels alike,
        with :math:`K = k l` taps row by row; returns :math:`(R, C, H, W)`.

    Args:
        x: maps.
        filters: the taps of each row and position.
        size: :math:`(k, l)`, odd.

    Returns:
        The filtered maps. Their multiply-adds are elementwise, which PyTorch's counter counts as 0.

    >>> x = torch.arange(4.0).reshape(1, 1, 1, 4)
    >>> shift = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 1, 3, 1, 1).expand(1, 1, 3, 1, 4)
    >>> filter_each(x, shift, (1, 3)).flatten()
    tensor([0., 0., 1., 2.])

    References:
        Survey section 2.2.2 (1); De Brabandere et al., Dynamic Filter Networks, NeurIPS 2016.
    """
    near = F.unfold(x, size, padding=(size[0] // 2, size[1] // 2))
    near = near.unflatten(1, (x.shape[1], size[0] * size[1])).unflatten(3, tuple(x.shape[2:]))
    return (near * filters).sum(2)
