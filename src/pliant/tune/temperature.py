"""Temperature scaling: one scalar per exit, fitted on the rows that reach it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.errors import PliantError


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The :math:`T > 0` that minimises :math:`\mathrm{CE}(z / T, y)`, by golden section on :math:`\log T`.

    Shape:
        logits :math:`(N, C)`, labels :math:`(N,)`.

    Args:
        logits: of one exit, on held-out rows that reach it.
        labels: their classes.

    Returns:
        The temperature, within [0.05, 20]; 1 where fewer than two rows reach the exit.

    Raises:
        PliantError: where the logits aren't numbers.

    >>> z = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> round(fit_temperature(z, torch.tensor([0, 0, 0, 1])), 2)
    1.82

    References:
        Survey section 5.1.1; Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    if len(labels) < 2:
        return 1.0
    if not logits.isfinite().all():
        raise PliantError(
            got="logits that aren't finite", expected="finite logits", do="look for NaN in data or weights"
        )
    z = logits.double()
    low, high, golden = -3.0, 3.0, (5**0.5 - 1) / 2

    def loss(log_t: float) -> float:
        return F.cross_entropy(z / torch.tensor(log_t, dtype=torch.float64).exp(), labels).item()

    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        if loss(a) <= loss(b):
            high = b
        else:
            low = a
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    r"""Expected calibration error with equal-width bins, :math:`\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|`.

    Shape:
        logits :math:`(N, C)`, labels :math:`(N,)`.

    Args:
        logits: of one exit.
        labels: their classes.
        bins: how many.

    Returns:
        In [0, 1].

    >>> calibration_error(torch.tensor([[9.0, -9.0]]), torch.tensor([1])) > 0.99
    True

    References:
        Survey section 5.1.1; Guo et al., ICML 2017.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    right = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index, right - confidence)
    return (gap.abs().sum() / max(len(labels), 1)).item()
