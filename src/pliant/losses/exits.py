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


def weights_of(weights: Weights, progress: float, trace: Trace) -> list[float]:
    """The weight of each recorded exit at this point of training."""
    given = weights(progress) if callable(weights) else weights
    found = [1.0] * len(trace.exits) if given is None else list(given)
    if not trace.exits or len(found) != len(trace.exits):
        raise PliantError(
            got=f"{len(found)} weights for {len(trace.exits)} recorded exits",
            expected="one for each, and at least one exit",
            do="record a model with exits and give a weight to each",
        )
    return found


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
        weights = weights_of(self.weights, progress, trace)
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


def constant(exits: int, weight: float = 1.0) -> list[float]:
    """The same weight for every exit (MSDNet, RANet).

    >>> constant(3)
    [1.0, 1.0, 1.0]

    References:
        Survey section 5.2.1 (1); Huang et al., Multi-Scale Dense Networks, ICLR 2018.
    """
    return [weight] * exits


def by_depth(exits: int) -> list[float]:
    r"""Weights proportional to depth that sum to 1, :math:`w_j = j / \sum_i i` (PABEE).

    >>> by_depth(4)
    [0.1, 0.2, 0.3, 0.4]

    References:
        Survey section 5.2.1 (1); Zhou et al., BERT Loses Patience, NeurIPS 2020.
    """
    total = exits * (exits + 1) // 2
    return [j / total for j in range(1, exits + 1)]


def by_cost(flops: Sequence[float]) -> list[float]:
    r"""Weights proportional to what it costs to answer at an exit, the last exit's being 1: :math:`w_k = c_k / c_K`.

    Args:
        flops: cost up to and including each exit, e.g. ``tune.collect(model, loader).flops``.

    Returns:
        One weight per exit.

    Raises:
        PliantError: where a cost isn't positive, or there are none.

    >>> by_cost([10, 20, 40])
    [0.25, 0.5, 1.0]

    References:
        Survey section 5.2.1 (1).
    """
    costs = [float(c) for c in flops]
    if not costs or min(costs) <= 0:
        raise PliantError(got=f"costs {costs}", expected="a positive cost for every exit", do="pass FLOPs per exit")
    return [c / costs[-1] for c in costs]
