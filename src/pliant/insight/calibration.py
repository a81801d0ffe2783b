"""How far the confidences of every exit can be trusted, on the rows that reach it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.insight.overthinking import auroc

BINS = 15


@dataclass(frozen=True)
class Bin:
    """A bar of a reliability diagram: rows whose confidence is in it, their mean confidence and their accuracy."""

    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """One exit, on the rows that reach it.

    Args:
        rows: how many reach it; with none, all figures are NaN.
        accuracy: share of right answers.
        confidence: mean of the largest probabilities.
        ece: expected calibration error over 15 equal-width bins.
        brier: mean over rows of the squared distance to the one-hot label, in [0, 2].
        nll: mean negative log-likelihood, in nats.
        auroc: of "is this answer wrong", told by the doubt; NaN where all answers are right, or all wrong.
        aurc: area under the risk-coverage curve: mean error of the n surest rows, over all n.
        bins: of the reliability diagram, from confidence 0 to 1.
    """

    rows: int
    accuracy: float
    confidence: float
    ece: float
    brier: float
    nll: float
    auroc: float
    aurc: float
    bins: tuple[Bin, ...]


def calibration(probabilities: Tensor, labels: Tensor) -> Calibration:
    r"""Calibration and failure prediction of one exit.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|, \qquad
        \mathrm{AURC} = \frac1N \sum_{n=1}^N \frac1n \sum_{i \le n} [\hat y_{(i)} \ne y_{(i)}]

    Calibration doesn't by itself make better exits: what decides is the order inside an exit, which AUROC and AURC tell.
    Rows of equal confidence count as in the mean over their orders.

    Shape:
        probabilities :math:`(N, C)`, labels :math:`(N,)`.

    Args:
        probabilities: rows that sum to 1, at the exit's temperature.
        labels: true classes.

    Returns:
        The figures.

    Raises:
        PliantError: where the rows don't fit or aren't probabilities.

    >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.2, 0.8]])
    >>> found = calibration(p, torch.tensor([0, 0, 1, 1]))
    >>> round(found.ece, 3), round(found.brier, 3), found.auroc, found.aurc
    (0.275, 0.225, 1.0, 0.0625)

    References:
        Survey section 5.1.1; Guo et al., On Calibration of Modern Neural Networks, ICML 2017; Geifman et al., ICLR 2019 (AURC).
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or probabilities.shape[1] < 2:
        raise PliantError(
            got=f"probabilities of shape {tuple(probabilities.shape)} for labels of shape {tuple(labels.shape)}",
            expected="(N, C) with C of at least 2, and (N,)",
            do="give one exit's softmax, and the labels of the same rows",
        )
    p = probabilities.detach().double().cpu()
    labels = labels.cpu()
    if not ((p >= 0).all() and ((p.sum(1) - 1).abs() < 1e-3).all()):
        raise PliantError(
            got="rows that aren't probabilities",
            expected="numbers of at least 0 that sum to 1",
            do="apply softmax first",
        )
    if not len(labels):
        nan = math.nan
        return Calibration(0, nan, nan, nan, nan, nan, nan, nan, tuple(Bin(0, nan, nan) for _ in range(BINS)))
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    own = p.gather(1, labels[:, None]).squeeze(1)
    index = (confidence * BINS).long().clamp(max=BINS - 1)
    count, sure, hits = (
        torch.zeros(BINS, dtype=torch.float64).index_add(0, index, v)
        for v in (torch.ones_like(right), confidence, right)
    )
    # Summed, not subtracted, so that doubts near 0 keep their order.
    doubt = p.scatter(1, predicted[:, None], 0.0).sum(1)
    wrong = right == 0
    return Calibration(
        rows=len(labels),
        accuracy=right.mean().item(),
        confidence=confidence.mean().item(),
        ece=((hits - sure).abs().sum() / len(labels)).item(),
        brier=(p.square().sum(1) - 2 * own + 1).mean().item(),
        nll=-own.clamp_min(torch.finfo(torch.float64).tiny).log().mean().item(),
        auroc=auroc(doubt, wrong) if wrong.any() and not wrong.all() else math.nan,
        aurc=_aurc(doubt, wrong.double()),
        bins=tuple(
            Bin(int(n), (s / n).item() if n else math.nan, (h / n).item() if n else math.nan)
            for n, s, h in zip(count, sure, hits, strict=True)
        ),
    )


def _aurc(doubt: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve; rows of equal doubt are equally wrong, each by their mean."""
    _, group = doubt.unique(return_inverse=True)
    size = torch.bincount(group).double()
    mean = torch.zeros_like(size).index_add(0, group, wrong) / size
    ordered = mean[group.sort().values]
    return (ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)).mean().item()


def calibrations(probabilities: Tensor, labels: Tensor, exits: Tensor) -> tuple[Calibration, ...]:
    """Every exit on the rows that reach it.

    Shape:
        probabilities :math:`(E, N, C)`, labels and exits :math:`(N,)`.

    Args:
        probabilities: of all exits, each at its own temperature.
        labels: true classes.
        exits: where each row leaves, from 0; row n reaches exit k where ``exits[n] >= k``.

    >>> p = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.9, 0.1], [0.2, 0.8]]])
    >>> [c.rows for c in calibrations(p, torch.tensor([0, 1]), torch.tensor([0, 1]))]
    [2, 1]
    """
    return tuple(calibration(p[exits >= k], labels[exits >= k]) for k, p in enumerate(probabilities))
