"""Schedules of an estimator's buffer that a straight line over a phase doesn't express."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from pliant.core.errors import PliantError


class Schedule(ABC):
    """A value over time."""

    @abstractmethod
    def __call__(self, time: float) -> float:
        """The value at ``time``."""

    def apply(self, model: nn.Module, pattern: str, time: float) -> None:
        """Give every buffer of ``model`` whose name matches ``pattern`` the value at ``time``; checkpoints hold buffers."""
        found = [buffer for name, buffer in model.named_buffers() if fnmatchcase(name, pattern)]
        if not found:
            raise PliantError(
                got=f"the pattern {pattern!r}",
                expected="one that matches a buffer of the model",
                do="see model.named_buffers() for the names",
            )
        for buffer in found:
            buffer.fill_(self(time))


@dataclass(frozen=True)
class Ramp(Schedule):
    r"""A line up to a bound: :math:`\min(m, a + r t)`. The defaults are those of slope annealing, with ``time`` in epochs.

    Args:
        start: :math:`a`.
        rate: :math:`r > 0`, per unit of time.
        most: :math:`m`.

    >>> [Ramp()(epoch) for epoch in (0, 50, 200)]
    [1.0, 3.0, 5.0]

    References:
        Survey section 5.2.2 (1); Chung, Ahn, Bengio, ICLR 2017.
    """

    start: float = 1.0
    rate: float = 0.04
    most: float = 5.0

    def __call__(self, time: float) -> float:
        """The value at ``time``."""
        return min(self.most, self.start + self.rate * time)


@dataclass(frozen=True)
class Decay(Schedule):
    r"""An exponential down to a bound: :math:`\max(m, a e^{-r t})`, as temperatures of Gumbel-softmax are annealed.

    Args:
        rate: :math:`r > 0`, per unit of time.
        start: :math:`a`.
        least: :math:`m`.

    >>> [round(Decay(1e-4)(step), 3) for step in (0, 5_000, 50_000)]
    [1.0, 0.607, 0.5]

    References:
        Survey section 5.2.2 (2); Jang, Gu, Poole, ICLR 2017.
    """

    rate: float
    start: float = 1.0
    least: float = 0.5

    def __call__(self, time: float) -> float:
        """The value at ``time``."""
        return max(self.least, self.start * math.exp(-self.rate * time))
