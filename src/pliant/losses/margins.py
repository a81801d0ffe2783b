"""Returns of looks one after the other, each with what the look itself has gained."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.losses.rewards import MarginGain, to_go
from pliant.losses.visits import sampled


class MarginReturns(MarginGain):
    r"""AdaFrame's utility of a look: what it has added to the best margin so far, and what's to come, discounted.

    .. math:: r_t = \max(0, m_t - \max(0, \max_{k < t} m_k)), \qquad R_t = \sum_{i \ge 0} \gamma^i r_{t + i}

    with :math:`m_t` of :class:`MarginGain`; before any look the margin is 0. The visit after look :math:`t` gets :math:`R_t`: the
    look's own gain is nothing that the visit could change, but a critic that expects it knows which look was worth most.

    Shape:
        Returns :math:`(V, R)`, for :math:`V + 1` exits.

    Args:
        discount: :math:`\gamma` in [0, 1].

    Raises:
        PliantError: where the discount is outside [0, 1], or as :class:`MarginGain` does.

    >>> from pliant.core.decision import Decision
    >>> from pliant.core.trace import Exit
    >>> d = Decision(torch.zeros(1), log_prob=torch.zeros(1))
    >>> exits = (Exit(torch.tensor([[1.0, 0.0]])), Exit(torch.tensor([[2.0, 0.0]])))
    >>> MarginReturns(0.5)(torch.zeros(1, 2), Trace({"a": (d,)}, exits, (), 1), torch.tensor([0]))
    tensor([[0.6119]])

    References:
        Survey section 4.2.1 (3); Wu et al., AdaFrame, CVPR 2019.

    Differs from the paper: the margin counts as 0 before any look, so what a look gains below 0 is nothing.
    """

    def __init__(self, discount: float = 0.9) -> None:
        super().__init__()
        if not 0 <= discount <= 1:
            raise PliantError(got=f"discount {discount}", expected="within [0, 1]", do="pass e.g. 0.9")
        self.discount = discount

    def __call__(self, y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        """The return of each visit and row."""
        self.check(trace, len(sampled(trace)))
        margins = [self.margin(e, target, trace.batch)[0].clamp_min(0) for e in trace.exits]
        best = torch.stack([torch.zeros_like(margins[0]), *margins]).cummax(0).values
        return to_go(best.diff(dim=0), self.discount)[:-1]
