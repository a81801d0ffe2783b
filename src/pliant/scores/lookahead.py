"""Lookahead: go on as long as what's still to be gained doesn't keep falling behind what once was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.core.site import Score


class Lookahead(Score):
    r"""Minus the number of visits whose expected gain was a margin below the highest so far: :math:`s_t = -|\{j \le t : V_j < \max_{i \le j} V_i - \mu\}|`.

    With the threshold :math:`1/2 - p` a row stops at the :math:`p`-th such visit: :math:`p` is the patience.

    Shape:
        ``x``: a tuple whose second tensor is :math:`V_t`, :math:`(R,)`; scores :math:`(R,)`; the carry is a pair of such.

    Args:
        margin: :math:`\mu`, in units of the gain.

    >>> score, carry = Lookahead(0.5), None
    >>> for gain in (1.0, 0.6, 0.4, 0.2):
    ...     s, carry = score.step((None, torch.tensor([gain])), carry)
    ...     print(s)
    tensor([-0.])
    tensor([-0.])
    tensor([-1.])
    tensor([-2.])

    References:
        Survey section 4.2.1 (3); Wu et al., AdaFrame, CVPR 2019.
    """

    margin: Tensor

    def __init__(self, margin: float = 0.7) -> None:
        super().__init__()
        self.register_buffer("margin", torch.tensor(float(margin)))

    def forward(self, x: Any) -> Tensor:
        """Scores at a first visit."""
        return self.step(x, None)[0]

    def step(self, x: Any, carry: Any) -> tuple[Tensor, Any]:
        """Scores after the visits that ``carry`` remembers: the highest gain, and how often it was missed."""
        gain = x[1]
        best, missed = (gain, torch.zeros_like(gain)) if carry is None else carry
        best = torch.maximum(best, gain)
        missed = missed + (gain < best - self.margin).to(gain.dtype)
        return -missed, (best, missed)
