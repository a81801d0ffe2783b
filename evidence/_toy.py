"""A few coins and any loss of them: small enough for the exact gradient, to tell an estimator's bias and variance."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.core.site import Outcome, Rule

torch.set_num_threads(1)

Loss = Callable[[Tensor], Tensor]
"""From values, gates or alternatives last, to one number per row; smooth between 0 and 1."""

Reads = Callable[[Outcome, Loss], Tensor]
"""How a gradient is got from an outcome: one number per row, to differentiate by the scores."""


@dataclass(frozen=True)
class Quality:
    """Of a gradient estimator, against the exact gradient.

    ``exact`` and ``mean``: gradients by the logits. ``bias``: length of their difference as a share of the exact one's length.
    ``noise``: what ``bias`` would be by chance alone, one standard error. ``variance``: of one draw, summed over logits.
    """

    exact: tuple[float, ...]
    mean: tuple[float, ...]
    bias: float
    noise: float
    variance: float
    draws: int


def pairs(h: Tensor) -> Tensor:
    """A loss of gates that is no sum over them: :math:`(\\sum_i w_i h_i - c)^2` plus a product."""
    weights = torch.tensor([1.0, -0.7, 0.4], dtype=h.dtype)[: h.shape[-1]]
    return ((h * weights).sum(-1) - 0.45) ** 2 + 0.5 * h[..., 0] * h[..., -1]


def prices(y: Tensor) -> Tensor:
    """A loss of a choice among three: :math:`(c \\cdot y)^2`."""
    return (y * torch.tensor([0.2, 1.0, -1.4], dtype=y.dtype)).sum(-1) ** 2


def through_value(outcome: Outcome, loss: Loss) -> Tensor:
    """Differentiate the loss by the value."""
    return loss(outcome.value)


def through_log_prob(baseline: float = 0.0) -> Reads:
    """Weigh the log-probability by the loss less ``baseline``."""

    def read(outcome: Outcome, loss: Loss) -> Tensor:
        assert outcome.log_prob is not None
        log_prob = outcome.log_prob if outcome.log_prob.ndim == 1 else outcome.log_prob.sum(-1)
        return log_prob * (loss(outcome.value.detach()) - baseline)

    return read


def mean_loss(logits: Tensor, loss: Loss) -> float:
    """The exact expected loss: the best constant baseline there is without knowing the draw."""
    return float(_expected(logits.double(), loss))


def exact(logits: Tensor, loss: Loss) -> Tensor:
    """The gradient of the expected loss by enumeration, a coin for each logit."""
    logits = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(_expected(logits, loss), logits)
    return gradient


def exact_choice(logits: Tensor, loss: Loss) -> Tensor:
    """The same where one of the logits is chosen."""
    logits = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad((logits.softmax(-1) * loss(torch.eye(len(logits)).double())).sum(), logits)
    return gradient


def _expected(logits: Tensor, loss: Loss) -> Tensor:
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(logits))), dtype=torch.float64)
    p = torch.sigmoid(logits)
    return ((every * p + (1 - every) * (1 - p)).prod(-1) * loss(every)).sum()


def quality(
    estimator: Rule, logits: Tensor, loss: Loss = pairs, *, reads: Reads = through_value, target: Tensor | None = None,
    draws: int = 200_000, seed: int = 0,
) -> Quality:  # fmt: skip
    """Bias and variance of ``estimator``, a draw per row; ``target`` is the exact gradient if not that of coins."""
    wanted = exact(logits, loss) if target is None else target
    torch.manual_seed(seed)
    total, squares, left = torch.zeros_like(wanted), torch.zeros_like(wanted), draws
    estimator = estimator.train()
    while left:
        rows = min(left, 100_000)
        scores = logits.detach().float().expand(rows, -1).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reads(estimator(scores), loss).sum(), scores)
        total += gradient.double().sum(0)
        squares += gradient.double().square().sum(0)
        left -= rows
    mean = total / draws
    variance = (squares / draws - mean**2).sum().item()
    size = wanted.norm().item()
    return Quality(
        tuple(wanted.tolist()), tuple(mean.tolist()), (mean - wanted).norm().item() / size,
        (variance / draws) ** 0.5 / size, variance, draws,
    )  # fmt: skip
