"""Fake quantisation: values on a grid of few levels, computed in floating point, with a straight-through gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor, bits: int, *, rows: bool = False) -> Tensor:
    r"""Round to :math:`2^b` levels between the least and the largest value: :math:`q = \min + s \cdot \mathrm{round}((x - \min) / s)`.

    The gradient passes as if nothing had been rounded.

    Shape:
        ``x``: any; likewise returned.

    Args:
        x: weights, or activations.
        bits: :math:`b`, at least 1.
        rows: whether each row has a range of its own, so that it doesn't hang on its batch.

    Returns:
        Values on the grid, in the dtype of ``x``.

    >>> quantize(torch.tensor([0.0, 0.4, 0.6, 1.0]), 1)
    tensor([0., 0., 1., 1.])

    References:
        Survey section 2.1.1 (2b); Shen et al., Fractional Skipping, AAAI 2020.
    """
    flat = x.detach().flatten(1) if rows else x.detach().reshape(1, -1)
    shape = (-1 if rows else 1, *[1] * (x.ndim - 1))
    low, high = (
        (t.reshape(x.shape[0] if rows else 1, *shape[1:]) for t in flat.aminmax(dim=1)) if flat.numel() else (0, 1)
    )
    step = (high - low) / (2**bits - 1)
    step = torch.where(step == 0, torch.ones_like(step), step) if isinstance(step, Tensor) else step
    grid = low + step * ((x.detach() - low) / step).round()
    return x + (grid - x).detach()
