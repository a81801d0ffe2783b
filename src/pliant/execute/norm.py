"""Batch norm where not everything runs, or runs several times. The rule: statistics are those of what was executed.

- Active subsets (positions of a map): :func:`executed_norm` takes statistics of the positions that run, in the masked form as in
  the gathered one.
- Rows: a gathered executor's norms see the rows that run. A masked one's see all rows, as while training nobody is skipped.
- Loops and levels: what runs at another visit, or at another bit-width, has other statistics, so it has a norm of its own:
  :class:`NormBank` keeps one for each.
- Channels: a channel that's chosen for some rows is normed by the statistics of all rows (:class:`pliant.execute.Channels`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError


def executed_norm(norm: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Batch norm over rows that run, channels last; while training, of ``mask`` (..., 1) where there is one.

    The masked and the gathered form so train alike: what isn't executed says nothing about the statistics.

    >>> norm, x = nn.BatchNorm1d(1, affine=False), torch.tensor([[1.0], [3.0], [99.0]])
    >>> executed_norm(norm, x, torch.tensor([[1.0], [1.0], [0.0]])).round()[:2].flatten()
    tensor([-1.,  1.])
    """
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        flat = x.reshape(-1, x.shape[-1])
        on = torch.ones_like(flat[:, :1]) if mask is None else mask.detach().reshape(-1, 1).to(x.dtype)
        count = on.sum()
        here = (flat * on).sum(0) / count.clamp_min(1)
        spread = ((flat - here).square() * on).sum(0) / count.clamp_min(1)
        enough = count > 1
        _remember(norm, here.detach(), (spread * count / (count - 1).clamp_min(1)).detach(), enough)
        mean, var = torch.where(enough, here, mean), torch.where(enough, spread, var)
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is None:
        return (x - mean) * scale
    scale = scale * norm.weight
    return torch.addcmul(norm.bias - mean * scale, x, scale)


@torch.no_grad()
def _remember(norm: Any, mean: Tensor, var: Tensor, enough: Tensor) -> None:
    """Update the running statistics as PyTorch does, unless fewer than two positions ran."""
    norm.num_batches_tracked.add_(enough.to(torch.int64))
    pace = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.clamp_min(1)
    for old, new in ((norm.running_mean, mean), (norm.running_var, var)):
        old.copy_(torch.where(enough, old + pace * (new.to(old.dtype) - old), old))


class NormBank(nn.Module):
    """A norm for each visit or level, all starting as ``norm``; :meth:`at` says which one serves.

    >>> bank = NormBank(nn.BatchNorm2d(3), 2)
    >>> bank.at(0) is bank.at(1), bank.at(1).num_features
    (False, 3)
    """

    def __init__(self, norm: nn.Module, count: int) -> None:
        super().__init__()
        if count < 1:
            raise PliantError(
                got=f"{count} norms", expected="at least 1", do="pass how many visits or levels there are"
            )
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(count))

    def at(self, index: int) -> nn.Module:
        """The norm of visit or level ``index``."""
        return self.norms[index]
