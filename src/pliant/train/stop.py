"""When a phase may end before its last epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pliant.core.errors import PliantError

Stop = Callable[[Sequence[Mapping[str, Any]]], bool]
"""From the history of a phase so far, an entry per epoch, to whether it is over."""


@dataclass(frozen=True)
class Plateau:
    r"""Over when the best value of the last :math:`p` epochs isn't better by :math:`\delta` than the best before them.

    Args:
        of: a term of the loss, "held_out" (what the phase's ``metric`` gave), or "loss" for the sum of all terms.
        patience: :math:`p`, at least 1.
        least: :math:`\delta`, in the units of the value, at least 0.
        better: "lower" or "higher".

    Raises:
        PliantError: for values out of range, or an entry that the history doesn't have.

    >>> stop = Plateau(patience=2)
    >>> [stop([{"task": v} for v in values]) for values in ((3.0, 2.0, 1.0), (3.0, 1.0, 2.0, 1.5))]
    [False, True]

    References:
        Survey section 5.2.2 (3): alternate "until the loss stops falling" (Fu et al., RA-CNN, CVPR 2017).
    """

    of: str = "loss"
    patience: int = 3
    least: float = 0.0
    better: Literal["lower", "higher"] = "lower"

    def __post_init__(self) -> None:
        if self.patience < 1 or not 0 <= self.least < math.inf or self.better not in ("lower", "higher"):
            raise PliantError(
                got=f"patience={self.patience}, least={self.least}, better={self.better!r}",
                expected="patience of at least 1, least of at least 0, and 'lower' or 'higher'",
                do="mend the stop rule",
            )

    def __call__(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether it is over."""
        values = [self._value(entry) for entry in history]
        if len(values) <= self.patience:
            return False
        sign = 1 if self.better == "lower" else -1
        before = min(sign * v for v in values[: -self.patience])
        return min(sign * v for v in values[-self.patience :]) >= before - self.least

    def _value(self, entry: Mapping[str, Any]) -> float:
        if self.of == "loss":
            return sum(v for k, v in entry.items() if k not in ("phase", "epoch", "lr", "seconds", "held_out"))
        if self.of not in entry:
            raise PliantError(
                got=f"a stop rule on {self.of!r}",
                expected="one of " + ", ".join(["loss", *entry]),
                do="name a term of the loss, or give the phase a metric and say 'held_out'",
            )
        return entry[self.of]
