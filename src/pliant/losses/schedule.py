"""Weights of terms that change while training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace

Schedule = Callable[[float], float]
"""A function of training progress in [0, 1]."""


def rising(over: float) -> Schedule:
    r"""From 0 to 1 in the first share ``over`` of training, then 1: :math:`\min(1, p / o)`.

    >>> [rising(0.2)(p) for p in (0.0, 0.1, 0.5)]
    [0.0, 0.5, 1.0]
    """
    _check(over)
    return lambda progress: min(1.0, progress / over)


def falling(to: float, *, over: float) -> Schedule:
    r"""From 1 to ``to`` in the first share ``over`` of training, then ``to``: a target that is lowered bit by bit.

    >>> [falling(0.5, over=0.5)(p) for p in (0.0, 0.25, 1.0)]
    [1.0, 0.75, 0.5]
    """
    _check(over)
    return lambda progress: 1 + (to - 1) * min(1.0, progress / over)


def _check(over: float) -> None:
    if not 0 < over <= 1:
        raise PliantError(got=f"over={over}", expected="a share of training in (0, 1]", do="pass e.g. over=0.2")


class Scheduled:
    """A term times a weight that depends on progress.

    Args:
        term: any term of a loss.
        schedule: from progress to the weight, e.g. :func:`rising`.

    >>> from pliant.losses.exits import CrossEntropy
    >>> import torch
    >>> Scheduled(CrossEntropy(), rising(0.5))(torch.zeros(2, 4), None, torch.tensor([0, 1]), 0.25)
    tensor(0.6931)
    """

    def __init__(self, term: Callable[..., Tensor], schedule: Schedule) -> None:
        self.term, self.schedule = term, schedule

    def __call__(self, y: Tensor, trace: Trace | None, target: Tensor, progress: float) -> Tensor:
        """The weighted term."""
        return self.schedule(progress) * self.term(y, trace, target, progress)
