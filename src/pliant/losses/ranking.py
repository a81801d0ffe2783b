"""Ranking between stages of one input: later must be surer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Exit, Trace


def saliency_ranking(saliency: Tensor, worth: Tensor, *, margin: float = 0.0) -> Tensor:
    r"""Elements of a row in the order of what they're worth: mean over pairs with :math:`w_i > w_j` of :math:`\max(0, s_j - s_i + m)`.

    Shape:
        both :math:`(R, T)`.

    Args:
        saliency: :math:`s`, what a sampler says; gradients pass it.
        worth: :math:`w`, the true class's score by the network that is sampled for.
        margin: :math:`m`.

    Returns:
        A scalar; 0 where no two elements differ in worth.

    >>> saliency_ranking(torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.4000)

    References:
        Survey section 4.2.2 (2); Korbar, Tran, Torresani, SCSampler, ICCV 2019.
    """
    better = worth[:, :, None] > worth[:, None, :]
    miss = (saliency[:, None, :] - saliency[:, :, None] + margin).relu()
    return torch.where(better, miss, 0.0).sum() / better.sum().clamp_min(1)


class Ranking:
    r"""Pairwise hinge on true-class probabilities, :math:`\sum_{(i, j)} \max(0, p_y^{(i)} - p_y^{(j)} + m)`.

    Stages are whatever the call recorded as exits: exits, glances, scales. Only rows that came to both count.

    Args:
        margin: :math:`m`, by how much stage j shall be surer than stage i.
        pairs: of stages (i, j), from 0; default, each stage and the one behind it.

    Raises:
        PliantError: where a pair names a stage that wasn't recorded, or fewer than two were.

    >>> stages = (Exit(torch.zeros(1, 2)), Exit(torch.tensor([[1.0, 0.0]])))
    >>> trace = Trace({}, stages, (), 1)
    >>> [Ranking()(torch.zeros(1, 2), trace, torch.tensor([y]), 0.0).round(decimals=4) for y in (0, 1)]
    [tensor(0.), tensor(0.2811)]

    References:
        Survey section 5.2.1 (3); Fu et al., Look Closer to See Better, CVPR 2017.

    Differs from the paper: any two stages, not only a scale and the next finer one.
    """

    def __init__(self, margin: float = 0.05, *, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        self.margin = margin
        self.pairs = pairs

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The sum over pairs of the mean over rows, no unit."""
        count = len(trace.exits)
        pairs = list(pairwise(range(count))) if self.pairs is None else list(self.pairs)
        if not pairs or not all(0 <= k < count for pair in pairs for k in pair):
            raise PliantError(
                got=f"pairs {pairs} of {count} recorded stages",
                expected="at least one pair of stages that were recorded",
                do="record a model with as many exits as the pairs name",
            )
        sure = {k: _of_the_true_class(trace.exits[k], target, trace.batch) for pair in pairs for k in pair}
        losses: list[Tensor] = []
        for i, j in pairs:
            (first, here), (second, there) = sure[i], sure[j]
            both = here & there
            if bool(both.any()):
                losses.append((first[both] - second[both] + self.margin).relu().mean())
        return torch.stack(losses).sum() if losses else y.sum() * 0


def _of_the_true_class(stage: Exit, target: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The true class's probability of every row of the batch, and which rows came here."""
    rows = torch.arange(batch, device=target.device) if stage.rows is None else stage.rows
    found = stage.logits.softmax(-1).gather(1, target[rows][:, None]).squeeze(1)
    here = torch.zeros(batch, dtype=torch.bool, device=target.device).index_fill(0, rows, True)
    return found.new_zeros(batch).index_copy(0, rows, found), here
