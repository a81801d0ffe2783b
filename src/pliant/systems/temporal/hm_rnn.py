"""Hierarchical multiscale RNN: levels that find segments, and run once a segment of the level below."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.estimators import HardSigmoid, StraightThrough
from pliant.execute.hierarchy import Hierarchy, Level
from pliant.rules.threshold import Threshold


class LevelMixture(nn.Module):
    r"""Logits from the outputs of all levels, each weighed by a gate on all of them.

    .. math:: g_l = \sigma(w_l \cdot [h^1; \dots; h^L]), \qquad y = W \mathrm{ReLU}\Big(\sum_l g_l W_l h^l\Big) + b

    Shape:
        outputs side by side :math:`(R, T, \sum_l H_l)`; logits :math:`(R, C, T)`.

    Args:
        levels: :math:`H_l` of each level.
        width: of the sum.
        num_classes: :math:`C`.

    >>> LevelMixture((4, 2), 8, 3)(torch.zeros(2, 5, 6)).shape
    torch.Size([2, 3, 5])
    """

    def __init__(self, levels: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.widths = levels
        self.gates = nn.Linear(sum(levels), len(levels), bias=False)
        self.mix = nn.ModuleList(nn.Linear(hidden, width, bias=False) for hidden in levels)
        self.out = nn.Linear(width, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits of every step."""
        gates = self.gates(h).sigmoid().unsqueeze(-1).unbind(-2)
        parts = [g * mix(one) for g, mix, one in zip(gates, self.mix, h.split(self.widths, -1), strict=True)]
        return self.out(torch.stack(parts).sum(0).relu()).transpose(1, 2)


def hm_rnn(
    num_classes: int = 50,
    words: int | None = None,
    *,
    hidden: tuple[int, ...] = (128, 128, 128),
    embedding: int = 64,
    bias: float = 0.0,
) -> nn.Module:
    r"""A character language model whose levels learn where segments end, and copy their state, for free, in between.

    .. math:: z = 1[\mathrm{hardsigmoid}(a \tilde z) > 0.5], \qquad \mathrm{hardsigmoid}(x) = \max(0, \min(1, (x + 1) / 2))

    Backward straight through the hard sigmoid, whose slope is annealed by ``Ramp()``, :math:`a = \min(5, 1 + 0.04 \cdot
    \text{epoch})`, at ``*.slope``. The task's loss alone, no term for sparsity: see the evidence for what that gives.

    Shape:
        symbols :math:`(R, T)`, integers; logits of the next one at every step :math:`(R, \text{num\_classes}, T)`.

    Args:
        num_classes: classes of a step; of a language model, the size of its alphabet.
        words: symbols that are read; default, as many.
        hidden: units of each level, bottom first.
        embedding: width of a symbol's vector.
        bias: of the boundary logits at the start; negative starts with long segments.

    Returns:
        The network; each site is visited once a step.

    Raises:
        PliantError: for fewer than two levels.

    >>> hm_rnn(9, hidden=(4, 4), embedding=3)(torch.ones(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 9, 5])

    References:
        Survey sections 4.1.1 (3) and 5.2.2 (1); Chung, Ahn, Bengio, HM-RNN, ICLR 2017.

    Differs from the paper: a level that copies has ended nothing, where the paper scores its end anew from the copied state;
    the layer norm of its best runs is always there; forget gates start open.
    """
    if len(hidden) < 2:
        raise PliantError(got=f"{len(hidden)} levels", expected="at least two", do="pass hidden=(128, 128, 128)")
    widths = (embedding, *hidden, 0)
    levels = [Level(*widths[n : n + 3], bias=bias) for n in range(len(hidden))]
    sites = [
        Site(nn.Identity(), StraightThrough(Threshold(0.0), surrogate=HardSigmoid()), shape=(1,)) for _ in hidden[1:]
    ]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        embed=nn.Embedding(words or num_classes, embedding),
        loop=Hierarchy(levels, sites),
        head=LevelMixture(tuple(hidden), hidden[-1], num_classes),
    )
    return nn.Sequential(parts)
