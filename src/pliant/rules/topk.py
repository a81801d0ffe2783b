"""TopK: spend on the k best of each row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule


class TopK(Rule):
    r"""Spend on exactly :math:`k` of each row's choices: those with the highest scores.

    .. math:: v_i = 1[\mathrm{rank}(s_i) \le k], \qquad k = \lfloor \text{share} \cdot n + 1/2 \rfloor \text{ where a share is given}

    Ranked within a row, never across rows, so a row's decision doesn't hang on its batch. Among equals the lower index
    wins; NaN comes before every number. The cost is the same for every row, which a threshold can't promise.

    Shape:
        scores :math:`(R, ..., n)`; the value has the same shape, with exactly :math:`k` ones over the last ``dims``.

    Args:
        k: how many spend, at least 0; a row with fewer choices is refused.
        share: in place of ``k``: which part of them, in [0, 1].
        dims: how many of the last dimensions are ranked together: 1 for channels or experts, 2 or 3 for maps (R, 1, H, W).

    Raises:
        PliantError: not exactly one of ``k`` and ``share``, values outside their range, or scores with too few dimensions.

    >>> TopK(2)(torch.tensor([[0.1, 0.7, 0.7, 0.7], [3.0, 2.0, 1.0, float("nan")]])).value
    tensor([[0., 1., 1., 0.],
            [1., 0., 0., 1.]])
    >>> TopK(share=0.5, dims=3)(torch.arange(4.0).reshape(1, 1, 2, 2)).value
    tensor([[[[0., 0.],
              [1., 1.]]]])

    References:
        Survey sections 2.1.2, 2.2.2 and 3.1; Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.

    Differs from the paper: no noise is added to the scores, and ties are broken by index.
    """

    def __init__(self, k: int | None = None, *, share: float | None = None, dims: int = 1) -> None:
        super().__init__()
        if (k is None) == (share is None):
            raise PliantError(got=f"k={k} and share={share}", expected="exactly one of them", do="pass k= or share=")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PliantError(
                got=f"k={k!r}", expected="a whole number, at least 0", do="pass share= for a part of them"
            )
        if share is not None and not 0 <= share <= 1:
            raise PliantError(got=f"share={share}", expected="within [0, 1]", do="pass the part that shall spend")
        if dims < 1:
            raise PliantError(got=f"dims={dims}", expected="at least 1", do="name how many last dimensions are ranked")
        self.k, self.share, self.dims = k, share, dims

    def extra_repr(self) -> str:
        """What is ranked."""
        return (f"k={self.k}" if self.share is None else f"share={self.share}") + f", dims={self.dims}"

    def count(self, choices: int) -> int:
        """How many of ``choices`` spend."""
        return math.floor(self.share * choices + 0.5) if self.k is None and self.share is not None else self.k or 0

    def forward(self, scores: Tensor) -> Outcome:
        """Ones at the k best of each row."""
        if scores.ndim <= self.dims:
            raise PliantError(
                got=f"scores of shape {tuple(scores.shape)}",
                expected=f"rows and at least {self.dims} dimension(s) behind them",
                do="rank within a row: TopK needs several choices for each row (use Threshold for one)",
            )
        choices = math.prod(scores.shape[-self.dims :])
        k = self.count(choices)
        if k > choices:
            raise PliantError(
                got=f"k={k} of {choices} choices", expected=f"at most {choices}", do="lower k, or pass share="
            )
        flat = scores.detach().flatten(-self.dims)
        best = flat.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return Outcome(torch.zeros_like(flat).scatter(-1, best, 1.0).reshape(scores.shape))


class Ranked(TopK):
    r"""TopK on scores that a loss of their own teaches, as in :func:`pliant.losses.saliency_ranking`: choosing passes no gradient.

    >>> Ranked(1)(torch.tensor([[0.1, 0.7]])).value, Ranked.value_based
    (tensor([[0., 1.]]), True)

    References:
        Survey section 4.2.2 (2); Korbar, Tran, Torresani, SCSampler, ICCV 2019.
    """

    value_based = True
