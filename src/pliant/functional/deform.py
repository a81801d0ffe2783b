"""Deformable convolution: a kernel whose taps read the map where each position asks them to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.functional.dynamic_conv import Geometry, output_size, pair
from pliant.functional.sparse_conv import linear

CHUNK = 2**18  # samples read before they are multiplied, without gradients: about what a core's cache holds
PACKED = 2**21  # likewise where whole pixels are read, rows of a matrix: few products of many rows are faster
WIDE = 64  # channels from which on reading whole pixels, each a row of all its channels, takes less time than maps


def deform_conv2d(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    mask: Tensor | None = None, geometry: Geometry = Geometry(),
) -> Tensor:  # fmt: skip
    r"""Modulated deformable convolution: bilinear samples at moved taps, then one matrix product.

    .. math:: y(p) = \sum_k W(p_k)\, m_k(p)\, x(p + p_k + \Delta_k(p)) + b

    Beyond the border the map is 0, so that a tap up to one pixel outside is interpolated with zeros and keeps a gradient.

    Shape:
        ``x`` :math:`(R, C, H, W)`, ``offsets`` :math:`(R, 2 D K, H', W')` as (y, x) for each of :math:`K` taps of each of
        :math:`D` groups of channels, ``weight`` :math:`(O, C / g, k, l)` with :math:`K = k l`, ``bias`` :math:`(O,)`, ``mask``
        :math:`(R, D K, H', W')`; returns :math:`(R, O, H', W')`. The conventions of ``torchvision.ops.deform_conv2d``.

    Args:
        x: maps.
        offsets: :math:`\Delta`, in pixels of ``x``.
        weight: the kernel.
        bias: None adds nothing.
        mask: :math:`m`; None is 1 everywhere (the first version).
        geometry: how the kernel moves, with :math:`g` groups.

    Returns:
        The convolved maps, for the FLOPs of a static convolution: PyTorch's counter reads sampling as 0.

    >>> x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    >>> y = deform_conv2d(x, torch.zeros(1, 18, 5, 5), weight, geometry=Geometry(padding=1))
    >>> torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-5)
    True

    References:
        Survey section 2.2.1 (2); Dai et al., ICCV 2017; Zhu et al., Deformable ConvNets v2, CVPR 2019.
    """
    taps = weight.shape[2] * weight.shape[3]
    groups = offsets.shape[1] // (2 * taps)
    size = output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]), geometry)
    places = _places(offsets.unflatten(1, (groups, taps, 2)), tuple(weight.shape[2:]), geometry)
    if groups == geometry.groups == 1 and _wide(x, offsets, weight, mask):
        y = _packed(x, places[:, 0], weight, mask)
        return y if bias is None else y + bias[:, None, None]
    # A border of zeros to sides that are powers of two: then whole pixels survive the trip through grid_sample's
    # coordinates, and the slope at an offset of exactly 0 is the one to the right, as torchvision's.
    height, width = (1 << max(0, n - 1).bit_length() for n in x.shape[2:])
    x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
    scale = 2 / places.new_tensor([width, height])
    grid = (places * scale + (scale / 2 - 1)).flatten(2, 3)
    kernel = weight.flatten(1).unflatten(0, (geometry.groups, -1))

    def some(x: Tensor, grid: Tensor, mask: Tensor | None) -> Tensor:
        rows = x.shape[0]
        seen = F.grid_sample(x.unflatten(1, (groups, -1)).flatten(0, 1), grid.flatten(0, 1), align_corners=False)
        seen = seen.reshape(rows, groups, x.shape[1] // groups, taps, *size)
        if mask is not None:
            seen = seen * mask.unflatten(1, (groups, 1, taps))
        return _product(kernel, seen.reshape(rows, geometry.groups, kernel.shape[2], size[0] * size[1]))

    few = max(1, CHUNK // max(1, x.shape[1] * taps * size[0] * size[1]))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[0] <= few:
        y = some(x, grid, mask)
    else:
        masks = [None] * x.shape[0] if mask is None else mask.split(few)
        y = torch.cat([some(*part) for part in zip(x.split(few), grid.split(few), masks, strict=False)])
    y = y.reshape(x.shape[0], weight.shape[0], *size)
    return y if bias is None else y + bias[:, None, None]


def _places(offsets: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Where taps read, (R, D, K, H', W', 2) as (x, y) in pixels, from offsets (R, D, K, 2, H', W') as (y, x)."""
    lines: list[Tensor] = []
    for axis, (stride, padding, dilation) in enumerate(zip(*(pair(g) for g in geometry[:3]), strict=True)):
        output = stride * torch.arange(offsets.shape[4 + axis], device=offsets.device) - padding
        tap = dilation * torch.arange(kernel[axis], device=offsets.device)
        lines.append((tap[:, None] + output).to(offsets.dtype))
    y = lines[0].repeat_interleave(kernel[1], 0)[:, :, None]
    x = lines[1].repeat(kernel[0], 1)[:, None, :]
    return torch.stack([offsets[:, :, :, 1] + x, offsets[:, :, :, 0] + y], -1)


def _wide(x: Tensor, offsets: Tensor, weight: Tensor, mask: Tensor | None) -> bool:
    """Whether pixels have so many channels that they are best read whole: on a processor, in float32, without gradients."""
    return (
        x.shape[1] >= WIDE and x.shape[0] > 0 and type(x) is Tensor and x.device.type == "cpu"
        and all(t is None or t.dtype == torch.float32 for t in (x, offsets, weight, mask))
        and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def _packed(x: Tensor, places: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Each sample as a weighted sum of four pixels, rows of a matrix; then all taps and channels in one 1x1 convolution."""
    channels, height, width = x.shape[1:]
    taps, *size = places.shape[1:4]
    pixels = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, channels), x.new_zeros(1, channels)])
    index, share = _corners(places.movedim(1, 3).contiguous(), height, width)
    if mask is not None:
        share = share * mask.movedim(1, 3).unsqueeze(-1)
    kernel = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1, 1, 1)
    answers: list[Tensor] = []
    few = max(1, PACKED // max(1, channels * taps * size[0] * size[1]))
    for near, part in zip(index.split(few), share.split(few), strict=True):
        seen = F.embedding_bag(near.view(-1, 4), pixels, per_sample_weights=part.view(-1, 4), mode="sum")
        maps = seen.view(-1, *size, taps * channels).permute(0, 3, 1, 2)
        answers.append(torch.ops.aten.mkldnn_convolution(maps, kernel, None, [0, 0], [1, 1], [1, 1], 1))
    return torch.cat(answers).contiguous()


def _corners(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around places (R, ..., 2), counted over all rows, and their shares (R, ..., 4); the last is beyond."""
    sides = places.new_tensor([width, height])
    places = places.clamp(places.new_full((), -2.0), sides + 1)  # as far as need be; NaN stays NaN
    low = places.floor()
    after = (places - low).unsqueeze(-1)
    pixel = low.to(torch.int32).unsqueeze(-1) + torch.arange(2, dtype=torch.int32, device=places.device)
    x, y = pixel.unbind(-2)
    right, down = torch.cat([1 - after, after], -1).unbind(-2)
    here = ((y >= 0) & (y < height)).unsqueeze(-1) & ((x >= 0) & (x < width)).unsqueeze(-2)
    row = torch.arange(places.shape[0], dtype=torch.int32, device=places.device) * (height * width)
    index = row.view(-1, *[1] * (y.ndim)) + y.unsqueeze(-1) * width + x.unsqueeze(-2)
    index = torch.where(here, index, places.shape[0] * height * width)
    return index.flatten(-2), (down.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)


def _product(weight: Tensor, seen: Tensor) -> Tensor:
    """Kernels (g, O / g, I) times samples (R, g, I, P)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or seen.shape[0] == 0:
        return weight @ seen
    # Row by row, since the batched product is another kernel that takes more than twice as long on many processors.
    return torch.stack([torch.stack([linear(w, s.mT) for w, s in zip(weight, row, strict=True)]) for row in seen])
