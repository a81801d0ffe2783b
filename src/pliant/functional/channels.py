"""Convolution of chosen channels: each row reads some of the input's and writes some of the output's."""

from __future__ import annotations

from typing import NamedTuple

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


class Alike(NamedTuple):
    """The rows of a batch in sets that chose the same, and where each row then is (R,); None where they are in order."""

    rows: list[Tensor]
    back: Tensor | None


class Picked(NamedTuple):
    """Channels of all rows side by side, set after set and row after row: of each its row and its channel (P,).

    For each set of rows that chose the same: which rows, and which channels they have.
    """

    row: Tensor
    channel: Tensor
    sets: Alike
    channels: list[Tensor]


def alike(chosen: Tensor) -> Alike:
    """Sets of rows of ``chosen`` (R, ...) that are equal.

    >>> alike(torch.tensor([[1, 0], [0, 1], [1, 0]])).rows
    [tensor([1]), tensor([0, 2])]
    """
    count = chosen.shape[0]
    kinds, kind = chosen.unique(dim=0, return_inverse=True) if count > 1 else (chosen, None)
    if kind is None or kinds.shape[0] == count:
        return Alike(list(torch.arange(count, device=chosen.device).split(1)), None)
    order = kind.argsort(stable=True)
    return Alike(list(order.split(kind.bincount().tolist())), None if kinds.shape[0] == 1 else order.argsort())


def pick(mask: Tensor, sets: Alike | None = None) -> Picked:
    """Where ``mask`` (R, C) is true, which is the same in all rows of a set; default, whoever is alike.

    >>> pick(torch.tensor([[False, True], [True, True], [False, True]])).channel
    tensor([1, 1, 0, 1])
    """
    sets = alike(mask) if sets is None else sets
    channels = [mask[rows[0]].nonzero().squeeze(1) for rows in sets.rows]
    row = torch.cat([r.repeat_interleave(len(c)) for r, c in zip(sets.rows, channels, strict=True)])
    channel = torch.cat([c.repeat(len(r)) for r, c in zip(sets.rows, channels, strict=True)])
    return Picked(row, channel, sets, channels)


def pack(x: Tensor, picked: Picked) -> Tensor:
    """The picked channels of maps (R, C, H, W) side by side, as those of one row: (1, P, H, W)."""
    return x[picked.row, picked.channel][None]


def unpack(x: Tensor, picked: Picked, shape: tuple[int, int]) -> Tensor:
    """Maps (R, C, H, W) of picked channels (1, P, H, W), 0 in the others; ``shape`` is R and C."""
    return x.new_zeros((*shape, *x.shape[2:])).index_put((picked.row, picked.channel), x[0])


def conv_picked(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reads: Picked | None = None, writes: Picked | None = None,
    geometry: Geometry = Geometry(),
) -> Tensor:  # fmt: skip
    r"""Convolve from the channels that a row reads to those that it writes, picked ones side by side.

    .. math:: y_{ro} = b_o + \sum_{i \in \text{reads}_r} W_{oi} * x_{ri}, \qquad o \in \text{writes}_r

    Rows that chose the same run together, by one part of the kernel. What lies between two such convolutions sees maps of one
    row with :math:`P` channels, so what treats channels alone runs on just those that were picked.

    Shape:
        ``x`` :math:`(R, I, H, W)`, or where ``reads`` is given :math:`(1, P, H, W)`; ``weight`` :math:`(O, I, k, l)`; returns
        :math:`(R, O, H', W')`, or where ``writes`` is given :math:`(1, P', H', W')`.

    Args:
        x: maps.
        weight: one kernel for all rows.
        bias: of every output channel.
        reads: which channels of the input each row has; default, all.
        writes: which channels of the output each row wants; default, all. At least one of both is given, both of the same sets.
        geometry: how the kernel moves, in one group.

    Returns:
        The maps; for each row :math:`2 k l H' W'` FLOPs for each pair of a channel read and one written.

    >>> x, kernel = torch.ones(2, 1, 1, 1), torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
    >>> conv_picked(x, kernel, writes=pick(torch.tensor([[False, True], [True, True]]))).flatten()
    tensor([10.,  1., 10.])

    References:
        Survey section 2.1.2 (3); Gao et al., Dynamic Channel Pruning, ICLR 2019.
    """
    some = reads or writes
    assert some is not None
    sets, parts = some.sets, list[Tensor]()
    at = 0
    for k, rows in enumerate(sets.rows):
        maps, kernel, shift = x, weight, bias
        if writes is not None:
            kernel = kernel.index_select(0, writes.channels[k])
            shift = None if shift is None else shift.index_select(0, writes.channels[k])
        if reads is not None:
            taken = reads.channels[k]
            kernel = kernel.index_select(1, taken)
            maps = x.narrow(1, at, len(rows) * len(taken)).reshape(len(rows), len(taken), *x.shape[2:])
            at += len(rows) * len(taken)
        elif len(rows) < x.shape[0]:
            maps = x.index_select(0, rows) if len(rows) > 1 else x[int(rows) : int(rows) + 1]
        parts.append(_conv_some(maps, kernel, shift, geometry))
    if writes is not None:
        return parts[0].flatten(0, 1)[None] if len(parts) == 1 else torch.cat([y.flatten(0, 1) for y in parts])[None]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if sets.back is None else y.index_select(0, sets.back)


def _conv_some(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution that may have nothing to read, or nothing to write."""
    if weight.numel():
        return _conv_one(x, weight, geometry, bias)
    y = x.new_zeros((x.shape[0], weight.shape[0], *output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]), geometry)))
    return y if bias is None else y + bias[:, None, None]


def _conv_one(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """One row's convolution. PyTorch sends a small one to a kernel that is half as fast as oneDNN's."""
    fast = (
        x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE
        and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
    )  # fmt: skip
    if not fast:
        return F.conv2d(x, weight, bias, *geometry)
    stride, padding, dilation = (pair(g) for g in geometry[:3])
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, geometry.groups)
