"""Convolution of chosen channels: each row reads some of the input's and writes some of the output's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.functional.dynamic_conv import Geometry, conv_each, output_size, pair

# Kernels of several rows in one convolution: measured at half of 64, 128 and 192 channels, more rows take up to twice as long.
ROWS = 8
LARGE = 2**15  # numbers of a kernel from which on oneDNN is faster for one row
KERNELS = 262_144  # numbers of kernels, unless one row has more: about what a core's cache holds


def conv_channels(
    x: Tensor, weight: Tensor, reads: Tensor, writes: Tensor, scale: Tensor, shift: Tensor, *, geometry: Geometry = Geometry()
) -> Tensor:  # fmt: skip
    r"""Convolve from the channels that are read to those that are written, then scale and shift; the others are 0.

    .. math:: y_{ro} = b_{ro}\,\Big(a_{ro} \sum_{i:\,u_{ri} = 1} W_{oi} * x_{ri} + c_{ro}\Big), \qquad b = \text{writes},\ u = \text{reads}

    Rows that read and write as many channels as each other run together, each by the part of the kernel that it needs; so
    where all do (top-k), the batch is one convolution, or a few whose kernels fit a cache.

    Shape:
        ``x`` :math:`(R, I, H, W)`, ``weight`` :math:`(O, I, k, l)`, ``reads`` :math:`(R, I)` and ``writes`` :math:`(R, O)`,
        bool, ``scale`` and ``shift`` :math:`(R, O)`; returns :math:`(R, O, H', W')`.

    Args:
        x: maps, where channels that aren't read may hold anything.
        weight: one kernel for all rows.
        reads: which channels of each row's input count.
        writes: which channels of each row's output are wanted.
        scale: of every output channel.
        shift: likewise.
        geometry: how the kernel moves, in one group.

    Returns:
        The maps; for each row :math:`2 k l H' W'` FLOPs for each pair of a channel read and one written.

    >>> x, ones = torch.ones(1, 2, 1, 1), torch.ones(1, 2)
    >>> kernel = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1)
    >>> conv_channels(x, kernel, torch.tensor([[True, False]]), torch.tensor([[False, True]]), ones, ones).flatten()
    tensor([  0., 101.])

    References:
        Survey section 2.1.2 (3); Gao et al., Dynamic Channel Pruning, ICLR 2019.
    """
    size = output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]), geometry)
    y = x.new_zeros((x.shape[0] * weight.shape[0], *size))
    for (inputs, outputs), rows in _alike(reads, writes).items():
        count = min(ROWS, max(1, KERNELS // max(1, inputs * outputs * weight[0, 0].numel())))
        for some in rows.split(count) if outputs else ():
            taken, left = _places(reads, some, inputs), _places(writes, some, outputs)
            at = (some[:, None] * weight.shape[0] + left).flatten()
            part = _conv(x, weight, some, taken, left, geometry).flatten(0, 1)
            a, c = (t.flatten().index_select(0, at)[:, None, None] for t in (scale, shift))
            y.index_copy_(0, at, torch.addcmul(c, part, a))
    return y.unflatten(0, (x.shape[0], weight.shape[0]))


def _alike(reads: Tensor, writes: Tensor) -> dict[tuple[int, int], Tensor]:
    """The rows that read and write the same numbers of channels, for each such pair of numbers."""
    if reads.shape[0] == 1:
        return {(int(reads.sum()), int(writes.sum())): torch.zeros(1, dtype=torch.int64, device=reads.device)}
    found: dict[tuple[int, int], list[int]] = {}
    for row, kind in enumerate(zip(reads.sum(1).tolist(), writes.sum(1).tolist(), strict=True)):
        found.setdefault(kind, []).append(row)
    return {kind: torch.tensor(rows, device=reads.device) for kind, rows in found.items()}


def _places(mask: Tensor, rows: Tensor, count: int) -> Tensor:
    """Where ``mask`` is true in these rows, each of which has ``count`` such places: (N, count)."""
    mask = mask if rows.shape[0] == mask.shape[0] else mask.index_select(0, rows)
    return mask.nonzero()[:, 1].reshape(rows.shape[0], count)


def _conv(x: Tensor, weight: Tensor, rows: Tensor, taken: Tensor, left: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of the channels ``taken`` into those ``left`` of each of these rows, by their parts of the kernel."""
    number, inputs = taken.shape
    if inputs == 0:  # nothing read: the sum is empty
        size = output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]), geometry)
        return x.new_zeros((number, left.shape[1], *size))
    if number == 1:  # one cut after the other takes half the time of picking pairs
        maps = (x if x.shape[0] == 1 else x.index_select(0, rows)).index_select(1, taken[0])
        kernel = weight.index_select(0, left[0]).index_select(1, taken[0])
        return _conv_one(maps, kernel, geometry)
    places = (rows[:, None] * x.shape[1] + taken).flatten()
    maps = x.flatten(0, 1).index_select(0, places).unflatten(0, (number, inputs))
    pairs = left[:, :, None] * weight.shape[1] + taken[:, None]
    kernels = weight.flatten(0, 1).index_select(0, pairs.flatten()).unflatten(0, tuple(pairs.shape))
    return conv_each(maps, kernels, geometry=geometry)


def _conv_one(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """One row's convolution. PyTorch sends a small one to a kernel that is half as fast as oneDNN's."""
    fast = (
        x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE
        and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
    )  # fmt: skip
    if not fast:
        return F.conv2d(x, weight, None, *geometry)
    stride, padding, dilation = (pair(g) for g in geometry[:3])
    return torch.ops.aten.mkldnn_convolution(x, weight, None, padding, stride, dilation, geometry.groups)
