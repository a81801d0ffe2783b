"""What every estimator is: a rule around a threshold rule, or a choice of one among k."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Rule
from pliant.rules.threshold import Threshold


class Estimator(Rule):
    """Lets a gradient pass the discrete value of ``rule``; knows nothing of executors.

    A NaN score spends. Its soft value and log-probability are NaN, so a loss that reads them says so.
    """

    rule: Any

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        if not isinstance(rule, Threshold):
            raise PliantError(
                got=f"a {type(rule).__name__} rule",
                expected="a Threshold on logits",
                do="wrap pliant.rules.Threshold(0.0)",
            )
        self.rule = rule

    def logit(self, scores: Tensor) -> Tensor:
        """How far ``scores`` are above the threshold, in float32 at least."""
        return (scores - self.rule.threshold).to(wide(scores))


def wide(like: Tensor) -> torch.dtype:
    """The dtype of ``like``, float32 at least: noise drawn in half precision would be infinite or coarse."""
    return torch.promote_types(like.dtype, torch.float32)


def exponential(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Logarithms of exponential draws, always finite; Gumbel noise is minus one, logistic noise a difference of two."""
    draws = torch.empty(shape, dtype=wide(like), device=like.device).exponential_()
    return draws.clamp_min(torch.finfo(draws.dtype).tiny).log()


def uniform(like: Tensor) -> Tensor:
    """Draws from [0, 1), one for each of ``like``."""
    return torch.rand(like.shape, dtype=wide(like), device=like.device)


def straight_through(hard: Tensor, surrogate: Tensor) -> Tensor:
    """``hard`` forward, the gradient of ``surrogate`` backward; where that is infinite or NaN, ``hard`` alone."""
    return hard + (surrogate - surrogate.detach()).nan_to_num()


def positive(value: float, name: str) -> Tensor:
    """``value`` as a buffer's tensor; it has to be positive and finite."""
    if not 0 < value < math.inf:
        raise PliantError(got=f"{name} {value}", expected="a positive number", do="pass e.g. 1.0")
    return torch.tensor(float(value))


def share(value: float, name: str, low: float = 0.0) -> Tensor:
    """``value`` as a buffer's tensor; it has to be within [``low``, 1]."""
    if not low <= value <= 1:
        raise PliantError(got=f"{name} {value}", expected=f"within [{low:g}, 1]", do="pass a share")
    return torch.tensor(float(value))


def largest(scores: Tensor) -> Tensor:
    r"""One-hot of the largest of the last dimension; the first of equals, but the last NaN where there is one.

    With alternatives in order of cost, a broken row so gets the costliest of those whose score is broken.

    Shape:
        scores :math:`(R, ..., K)`; the result has the same shape.

    >>> largest(torch.tensor([[0.1, 0.7, 0.7], [float("nan"), 9.0, float("nan")]]))
    tensor([[0., 1., 0.],
            [0., 0., 1.]])
    """
    if scores.ndim < 2:
        raise PliantError(
            got=f"scores of shape {tuple(scores.shape)} for a choice among several",
            expected="rows first, alternatives last",
            do="let the scorer give (R, ..., K)",
        )
    nan = scores.isnan()
    count = scores.shape[-1]
    last = count - 1 - nan.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    index = torch.where(nan.any(-1, keepdim=True), last, scores.argmax(-1, keepdim=True))
    return torch.zeros_like(scores).scatter(-1, index, 1.0)
