"""Share: spend on the same part of every row's choices, those with the highest scores; the part is a dial."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule


class Share(Rule):
    r"""Spend on a share of each row's choices, the same for all rows: those whose scores rank highest.

    .. math:: v_i = 1[\mathrm{rank}(s_i) \le k], \qquad k = \max(1, \lfloor (1 - t)\, n + 1/2 \rfloor)

    The dial is the ``threshold`` :math:`t`, the part that saves: where :class:`Threshold` stands at a score, this one stands at a
    quantile of each row's own scores. So a tuned budget, a saved operating point and an exported graph turn it like any other:
    ``-inf`` spends on all, ``inf`` on one. Among equals the lower index wins; NaN comes before every number.

    Shape:
        scores :math:`(R, n)`; the value has the same shape, with exactly :math:`k` ones in every row. With dimensions in
        between, :math:`(R, T, n)` say, each of a row's tokens ranks its own.

    Args:
        share: the part that spends, in [0, 1].

    Raises:
        PliantError: where the share is outside [0, 1].

    >>> rule = Share(0.5)
    >>> rule(torch.tensor([[0.1, 0.7, 0.7, 0.7], [3.0, 2.0, 1.0, float("nan")]])).value
    tensor([[0., 1., 1., 0.],
            [1., 0., 0., 1.]])
    >>> rule.count(9), rule.threshold
    (5, tensor(0.5000))

    References:
        Survey sections 3.1 and 4.1; Rao et al., DynamicViT, NeurIPS 2021.

    Differs from :class:`TopK`: the share is a buffer, so it can be turned after training and after export.
    """

    threshold: Tensor
    by_rank = True
    """The threshold is a quantile already: tuning sets it, instead of a quantile of the scores."""

    def __init__(self, share: float) -> None:
        super().__init__()
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise PliantError(
                got=f"share={share!r}", expected="a number in [0, 1]", do="pass the part that shall spend"
            )
        self.register_buffer("threshold", torch.tensor(1.0 - share))

    def count(self, choices: int) -> int:
        """How many of ``choices`` spend, read off the dial: tensors are cut to it, so it has to be known."""
        k = self._count(choices)
        if not torch.compiler.is_exporting():
            return int(k)
        found: Any = k.item()  # a symbol of the graph
        torch._check(found >= 1)
        torch._check(found <= choices)
        return found

    def _count(self, choices: int) -> Tensor:
        if not torch.compiler.is_exporting() and math.isnan(self.threshold):
            raise PliantError(got="a share that is NaN", expected="a number", do="tune the model again")
        return ((1 - self.threshold.float()).clamp(0, 1) * choices + 0.5).floor().clamp_min(1).to(torch.int64)

    def forward(self, scores: Tensor) -> Outcome:
        """Ones at the highest of each row."""
        if scores.ndim < 2:
            raise PliantError(
                got=f"scores of shape {tuple(scores.shape)}", expected="(rows, ..., choices)",
                do="rank within a row: Share needs several choices for each row (use Threshold for one)",
            )  # fmt: skip
        flat = scores.detach().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        order = flat.argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(scores.shape[-1], device=scores.device) < self._count(scores.shape[-1])
        return Outcome(torch.zeros_like(flat).scatter(-1, order, first.to(flat.dtype).expand_as(flat)))
