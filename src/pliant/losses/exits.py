"""Losses of the exits of a recorded call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace

Weights = Sequence[float] | Callable[[float], Sequence[float]] | None
"""One weight per exit, or a function of training progress in [0, 1] that gives them; None is 1 for each."""


class CrossEntropy:
    """Cross-entropy of the prediction itself.

    >>> CrossEntropy()(torch.zeros(2, 4), None, torch.tensor([0, 1]), 0.0)
    tensor(1.3863)
    """

    def __call__(self, y: Tensor, trace: Trace | None, target: Tensor, progress: float) -> Tensor:
        """The mean over rows, in nats."""
        return F.cross_entropy(y, target)


class MultiExit:
    r"""Weighted cumulative loss of all exits, :math:`L = \sum_k w_k\, \mathrm{CE}(f_k(x), y)`.

    Args:
        weights: one per exit, or a function of progress; default 1 for each (MSDNet).

    Raises:
        PliantError: where the number of weights isn't that of the exits, or no exit was recorded.

    >>> from pliant.core.trace import Exit
    >>> trace = Trace({}, (Exit(torch.zeros(2, 4)), Exit(torch.zeros(2, 4))), (), 2)
    >>> MultiExit([1.0, 0.5])(torch.zeros(2, 4), trace, torch.tensor([0, 1]), 0.0)
    tensor(2.0794)

    References:
        Survey section 5.2.1 (1); Huang et al., Multi-Scale Dense Networks, ICLR 2018.
    """

    def __init__(self, weights: Weights = None) -> None:
        self.weights = weights

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The weighted sum over exits of the mean over the rows that reached them, in nats."""
        weights = self.weights(progress) if callable(self.weights) else self.weights
        weights = [1.0] * len(trace.exits) if weights is None else list(weights)
        if not trace.exits or len(weights) != len(trace.exits):
            raise PliantError(
                got=f"{len(weights)} weights for {len(trace.exits)} recorded exits",
                expected="one for each, and at least one exit",
                do="record a model with exits and give a weight to each",
            )
        losses = [
            F.cross_entropy(e.logits, target if e.rows is None else target[e.rows]) * w
            for e, w in zip(trace.exits, weights, strict=True)
            if len(e.logits)
        ]
        return torch.stack(losses).sum()


def ramped(costs: Sequence[float], *, start: float = 0.01) -> Callable[[float], Sequence[float]]:
    r"""Shallow-Deep Networks' weights: :math:`\tau_k = \min(C_k, s + p\,C_k)` with progress :math:`p`; the last exit has 1.

    Args:
        costs: relative cost of each inner exit, in [0, 1].
        start: weight at the start.

    Returns:
        A function of progress that gives the weights of all exits.

    >>> ramped([0.2, 0.6])(0.5)
    [0.11, 0.31, 1.0]

    References:
        Survey section 6; Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019.
    """
    return lambda progress: [*(min(c, start + progress * c) for c in costs), 1.0]
