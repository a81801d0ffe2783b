"""Convolutions at chosen positions of maps: which positions they need, gather, matrix product, put back.

Chosen positions are packed as rows (N, C), one behind the other over the whole batch. So a 1x1 convolution is one matrix
product, and a wider one gathers the neighbours of each position first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN's matrix product; on processors that aren't Intel's more than twice as fast as the one behind F.linear.
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Places(NamedTuple):
    """Chosen positions of ``batch`` maps: the indices, in growing order, of those out of batch * height * width."""

    index: Tensor
    batch: int
    height: int
    width: int


def places(mask: Tensor) -> Places:
    """Where ``mask`` (R, 1, H, W) isn't 0.

    >>> places(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]], [[[1.0, 0.0], [0.0, 1.0]]]])).index
    tensor([1, 4, 7])
    """
    index = mask.flatten().nonzero().squeeze(1)
    if torch.compiler.is_exporting():
        torch._check(index.shape[0] <= mask.numel())
        torch._check(index.shape[0] < 2**31)
    return Places(index, mask.shape[0], mask.shape[2], mask.shape[3])


def dilate(share: Tensor, kernel: int, size: tuple[int, int], *, stride: int = 1, dilation: int = 1) -> Tensor:
    r"""How likely each input position is read by an output position that is on, if those are drawn by themselves.

    .. math:: d_i = 1 - \prod_{o:\, |i - s\,o| \le k\,(K - 1) / 2} (1 - p_o)

    with kernel side :math:`K`, stride :math:`s` and dilation :math:`k`. Of a mask of 0 and 1 it's the dilated mask, exactly.

    Shape:
        ``share`` :math:`(R, 1, H', W')`; returns :math:`(R, 1, H, W)`.

    Args:
        share: probability that an output position is on, or a mask.
        kernel: side, odd; its padding is that which keeps the size.
        size: :math:`(H, W)` of the input, in positions.
        stride: of the convolution.
        dilation: of its kernel.

    Returns:
        Probabilities; differentiable.

    >>> dilate(torch.tensor([[[[0.0, 0.0, 0.5, 0.5]]]]), 3, (1, 4)).squeeze()
    tensor([0.0000, 0.5000, 0.7500, 0.7500])
    >>> dilate(torch.tensor([[[[0.0, 1.0]]]]), 3, (1, 4), stride=2).squeeze()
    tensor([0., 1., 1., 1.])

    References:
        Survey section 3.1.1 (1); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.
    """
    off = 1 - share
    if stride > 1:
        spread = off.new_ones((*off.shape[:2], *size))
        spread[..., ::stride, ::stride] = off
        off = spread
    reach = dilation * (kernel - 1) // 2
    if reach:
        off = F.pad(off, (reach,) * 4, value=1.0)
        for dim in (2, 3):  # a window's product is the product of its rows' products
            length = size[dim - 2]
            parts = [off.narrow(dim, step * dilation, length) for step in range(kernel)]
            off = parts[0]
            for part in parts[1:]:
                off = off * part
    return 1 - off


def take(x: Tensor, at: Places) -> Tensor:
    """The chosen positions of maps (R, C, H, W) as rows (N, C).

    >>> take(torch.arange(8.0).reshape(1, 2, 2, 2), Places(torch.tensor([1, 3]), 1, 2, 2))
    tensor([[1., 5.],
            [3., 7.]])
    """
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, at.index)


def add(x: Tensor, at: Places, rows: Tensor) -> Tensor:
    """Maps (R, C, H, W) with rows (N, C) added at the chosen positions, channels last; ``x`` isn't changed.

    >>> add(torch.ones(1, 1, 1, 3), Places(torch.tensor([2]), 1, 1, 3), torch.tensor([[4.0]])).squeeze()
    tensor([1., 1., 5.])
    """
    flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return flat.index_add(0, at.index, rows).reshape(-1, at.height, at.width, x.shape[1]).permute(0, 3, 1, 2)


def pad_map(x: Tensor, margin: int) -> Tensor:
    """Maps (R, C, H, W) as (R, H + 2m, W + 2m, C) in a border of zeros: what :func:`convolve` reads."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, margin, margin, margin, margin))


def pad_rows(rows: Tensor, at: Places, margin: int) -> Tensor:
    """The same for rows at chosen positions; the others are zeros, which nobody needs to read."""
    height, width = at.height + 2 * margin, at.width + 2 * margin
    into = rows.new_zeros((at.batch * height * width, rows.shape[1]))
    index = _corner(at, height, width, 1) + margin * (width + 1)
    return into.index_copy(0, index, rows).reshape(-1, height, width, rows.shape[1])


def _corner(at: Places, height: int, width: int, stride: int) -> Tensor:
    """Index, in maps of ``height`` by ``width``, of the first position that each chosen one reads."""
    line = at.index // at.width  # over the maps of the whole batch
    column = at.index - line * at.width
    row = line // at.height
    return (row * height + (line - row * at.height) * stride) * width + column * stride


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (N, I) times a weight (O, I), and a bias: ``F.linear``, by the fastest of the products that do the same.

    >>> linear(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([1.0]))
    tensor([[4.],
            [4.]])
    """
    whole = _whole(rows.shape[0]) if _fits(rows, weight) else 0
    if _product is None or whole == 0:
        return F.linear(rows, weight, bias)
    first = _product(rows[:whole], weight, bias, "none", [], "")
    return first if whole == rows.shape[0] else torch.cat([first, F.linear(rows[whole:], weight, bias)])


def _fits(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product can serve and is worth it: no gradient, float32 on a processor, enough work."""
    return (
        not torch.compiler.is_compiling() and type(rows) is Tensor and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32 and weight.numel() >= 4096 and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    )  # fmt: skip


def _whole(count: int) -> int:
    """The most of ``count`` rows whose number isn't new: oneDNN compiles a kernel for each one, half a millisecond long.

    Sixteen sizes in each doubling; what is left over is few.
    """
    return 0 if count < 256 else count - count % max(64, 2 ** (count.bit_length() - 5))


def convolve(
    padded: Tensor, at: Places, weight: Tensor, bias: Tensor | None = None, *,
    stride: int = 1, dilation: int = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    r"""A convolution's outputs at chosen positions only.

    .. math:: y_n = \sum_{ij} W_{ij}\, x_{s\,p_n + k\,(i, j)} + b

    Gathers the neighbours of each position, then one matrix product; in groups, one convolution of a long line.

    Shape:
        ``padded`` :math:`(R, H + 2m, W + 2m, I)`; ``weight`` :math:`(O, I / g, K, K)`; returns :math:`(N, O)`.

    Args:
        padded: of :func:`pad_map` or :func:`pad_rows`, with a margin of half the kernel, that of the dense convolution.
        at: the output positions to compute.
        weight: of ``nn.Conv2d``.
        bias: likewise.
        stride: likewise, in positions of the input.
        dilation: likewise.
        groups: likewise.

    Returns:
        One row for each position of ``at``; as many FLOPs as the dense convolution spends on them.

    >>> x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    >>> at = places(torch.rand(2, 1, 5, 5) > 0.5)
    >>> torch.allclose(convolve(pad_map(x, 1), at, weight), take(F.conv2d(x, weight, padding=1), at), atol=1e-5)
    True

    References:
        Survey section 3.1.1 (1); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020; Ren et al., SBNet, CVPR 2018.

    Differs from the paper: no kernel of our own; gathering and matrix products are PyTorch's.
    """
    kernel = weight.shape[-1]
    height, width, channels = padded.shape[1:]
    steps = dilation * torch.arange(kernel, device=padded.device)
    reach = (steps[:, None] * width + steps).flatten()
    source, corner = padded.reshape(-1, channels), _corner(at, height, width, stride)

    def some(corner: Tensor) -> Tensor:
        near = source.index_select(0, (corner[:, None] + reach).flatten())  # (N * K * K, I)
        if groups == 1:
            return linear(near.reshape(-1, kernel * kernel * channels), weight.permute(0, 2, 3, 1).flatten(1), bias)
        return _grouped(near, weight, bias, groups, corner.shape[0])

    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return some(corner)
    few = max(1, _CHUNK // (kernel * kernel * channels))
    parts = [some(part) for part in corner.split(few)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_CHUNK = 2**21  # gathered numbers at a time: many more would be new memory in every call, fewer cost more calls


def _grouped(near: Tensor, weight: Tensor, bias: Tensor | None, groups: int, count: int) -> Tensor:
    """The product in groups: a convolution of all neighbourhoods in one line, in steps of its own length."""
    window = weight.shape[-1] ** 2
    if torch.compiler.is_exporting():  # a convolution refuses a line that may be empty
        near = torch.cat([near, near.new_zeros((window, near.shape[1]))])
    elif count == 0:
        return near.new_zeros((0, weight.shape[0]))
    kernel = weight.reshape(*weight.shape[:2], 1, -1)

    def row(near: Tensor) -> Tensor:
        line = near.reshape(1, 1, -1, near.shape[1]).permute(0, 3, 1, 2)
        return F.conv2d(line, kernel, bias, stride=(1, window), groups=groups).squeeze((0, 2)).t()

    if torch.compiler.is_exporting() or torch.is_grad_enabled():
        return row(near).narrow(0, 0, count)
    sizes, left = [], count
    while left:  # few sizes again: a multiple as above, then powers of two
        sizes.append(_whole(left) or 2 ** (left.bit_length() - 1))
        left -= sizes[-1]
    parts = [row(part) for part in near.split([size * window for size in sizes])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
