"""Thresholds with a guarantee: with probability 1 - delta, the risk on new data is at most epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.tune.held_out import HeldOut

Loss = Callable[[HeldOut, Tensor], Tensor]
"""From held-out rows and the exit at which each leaves, (N,), to each row's loss in [0, 1]."""


def lost(held: HeldOut, exits: Tensor) -> Tensor:
    """1 where the last exit is right and the one that answers is wrong: its mean is at least the loss of accuracy."""
    right = held.correct
    return (right[-1] & ~right.gather(0, exits[None]).squeeze(0)).double()


def p_value(risk: float, rows: int, epsilon: float) -> float:
    r"""The Hoeffding-Bentkus p-value of "the true risk is above epsilon", for losses in [0, 1].

    .. math:: \min\{e^{-n\, h(\min(\hat R, \epsilon), \epsilon)},\; e\, P(\mathrm{Bin}(n, \epsilon) \le \lceil n \hat R \rceil)\}

    Args:
        risk: mean loss of the rows.
        rows: how many.
        epsilon: the bound, in (0, 1).

    >>> round(p_value(0.0, 100, 0.05), 4), p_value(0.2, 100, 0.05)
    (0.0059, 1.0)

    References:
        Angelopoulos et al., Learn then Test, Annals of Applied Statistics 2025 (arXiv 2110.01052).
    """
    r = min(risk, epsilon)
    h = (r * math.log(r / epsilon) if r > 0 else 0.0) + (1 - r) * math.log((1 - r) / (1 - epsilon))
    k = torch.arange(math.ceil(rows * risk - 1e-9) + 1, dtype=torch.float64).clamp(max=rows)
    n = torch.tensor(float(rows), dtype=torch.float64)
    terms = (
        (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
        + k * math.log(epsilon) + (n - k) * math.log(1 - epsilon)
    )  # fmt: skip
    return min(1.0, math.exp(-rows * h), math.e * float(terms.logsumexp(0).exp()))


def grid_of_doubt(points: int = 120) -> list[float]:
    """Doubts from 1e-6 to 1, evenly in their logarithm; fixed before any data is seen, as the guarantee asks."""
    return [10 ** (-6 + 6 * k / (points - 1)) for k in range(points)]


def controlled(
    held: HeldOut, epsilon: float, *, delta: float = 0.05, loss: Loss = lost, grid: Sequence[float] | None = None
) -> Tensor:
    r"""One threshold for all exits, as high as the risk allows: :math:`P(R(\theta) \le \epsilon) \ge 1 - \delta`.

    Learn then Test with a fixed sequence: from the dense network on, each higher threshold is tested at level :math:`\delta`,
    and the first that fails ends it. Nothing is assumed of the model or the data but that held-out rows and later ones are drawn
    alike. The guarantee is lost if the grid, the scores or their temperatures were chosen by the same rows.

    Shape:
        Returns :math:`(E - 1,)` thresholds, all the same; -inf where not even the first of the grid passes.

    Args:
        held: what the exits say.
        epsilon: allowed risk, in (0, 1), in units of the loss.
        delta: allowed probability of exceeding it, in (0, 1).
        loss: of each row, in [0, 1], 0 for the dense network; :func:`lost` bounds the loss of accuracy.
        grid: growing thresholds, fixed beforehand; default, doubts in (0, 1].

    Raises:
        PliantError: for numbers out of range, or losses outside [0, 1].

    References:
        Survey section 5.1.1; Angelopoulos et al., Learn then Test; Schuster et al., Confident Adaptive Language Modeling,
        NeurIPS 2022, which stops its exits so.
    """
    levels = grid_of_doubt() if grid is None else list(grid)
    if not (0 < epsilon < 1 and 0 < delta < 1 and levels and levels == sorted(levels)):
        raise PliantError(
            got=f"epsilon={epsilon}, delta={delta}, a grid of {len(levels)} thresholds",
            expected="both in (0, 1), and growing thresholds",
            do="pass e.g. epsilon=0.01, delta=0.05",
        )
    passed = float("-inf")
    for level in levels:
        each = loss(held, held.leaves(torch.full((len(held.sites),), level)))
        if not ((each >= 0) & (each <= 1)).all():
            raise PliantError(got="losses outside [0, 1]", expected="numbers in [0, 1]", do="scale the loss")
        if p_value(each.double().mean().item(), len(each), epsilon) > delta:
            break
        passed = level
    return torch.full((len(held.sites),), passed)
