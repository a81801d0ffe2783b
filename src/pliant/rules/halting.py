"""Halting: go on while more than eps of the halting budget is left."""

from __future__ import annotations

from pliant.core.errors import PliantError
from pliant.rules.threshold import Threshold


class Halting(Threshold):
    r"""ACT's rule: go on while the remainder is above :math:`\varepsilon`, so that :math:`N = \min\{n : \sum_{i \le n} h_i \ge 1 - \varepsilon\}`.

    The score is the remainder :math:`1 - \sum_{i \le n} h_i` (:class:`pliant.scores.Remainder`); :math:`\varepsilon` is a
    threshold like any other, a buffer and a dial: raising it never adds a step.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        eps: :math:`\varepsilon`, at least 0 and below 1; above 0 so that one unit can be enough.

    Raises:
        PliantError: where ``eps`` is outside [0, 1).

    >>> import torch
    >>> Halting()(torch.tensor([0.5, 0.02, 0.01, 0.0])).value
    tensor([1., 1., 0., 0.])

    References:
        Survey section 5.1.1; Graves, Adaptive Computation Time for Recurrent Neural Networks, 2016.
    """

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__(eps)
        if not 0 <= eps < 1:
            raise PliantError(got=f"eps={eps}", expected="at least 0 and below 1", do="pass e.g. 0.01")
