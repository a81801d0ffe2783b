"""Gates of recurrent networks: from the input of a step and the state before it to the wish to run the cell."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.site import Score


class Pressure(Score):
    r"""Skip RNN's urge to update, which grows with every step that was held: :math:`p = \min(1, n \Delta)`.

    It reads the last two tensors of the state, :math:`\Delta` and the number :math:`n` of the step after the last update
    (:class:`pliant.execute.Pressed` makes both). That is the paper's :math:`p + \min(\Delta, 1 - p)` in closed form, since
    :math:`\Delta` is constant while the state is held. A probability: its natural threshold is 0.5.

    Shape:
        ``(x, state)`` with :math:`\Delta` and :math:`n` of shape :math:`(R,)`; scores :math:`(R,)`.

    >>> state = torch.tensor([0.3, 0.3]), torch.tensor([1.0, 2.0])
    >>> Pressure()((None, state))
    tensor([0.3000, 0.6000])
    >>> Pressure().until((torch.tensor([0.2]), torch.tensor([1.0])), threshold=0.5)
    2

    References:
        Survey sections 4.1.1 (1) and 5.1.3; Campos et al., Skip RNN, ICLR 2018.
    """

    def forward(self, x: Any) -> Tensor:
        """The urge at this step."""
        *_, increment, count = x[1]
        return (count * increment).clamp(max=1)

    def until(self, state: Any, threshold: float) -> float:
        """How many more steps one row holds its state before its score passes ``threshold``; infinite for never."""
        *_, increment, count = state
        one, seen, rounded = increment.item(), count.item(), _ROUND.get(increment.dtype, _exact)
        if threshold < 0 or math.isnan(one):  # a broken row runs: NaN passes any threshold
            return 0
        if threshold >= 1 or one == 0:
            return math.inf
        held = max(0, int(threshold / one - seen) - 1)  # from here on by the very numbers that forward compares
        while min(1.0, rounded((seen + held) * one)) <= threshold:
            held += 1
        return held


def _exact(value: float) -> float:
    return value


def _single(value: float) -> float:
    """``value`` rounded to float32: a product of a float32 and a small whole number is exact before that."""
    return struct.unpack("f", struct.pack("f", value))[0]


_ROUND = {torch.float32: _single}


class StepGate(Score):
    r"""A linear gate on input and output so far: :math:`s = w \cdot [x_t; h_{t-1}] + b`, a logit.

    The difference of Skim-RNN's two logits, reading less skimming, is all that their softmax needs.

    Shape:
        ``(x, state)`` with :math:`x` :math:`(R, I)` and :math:`h`, the state's first tensor, :math:`(R, H)`; scores :math:`(R,)`.

    Args:
        inputs: :math:`I`.
        hidden: :math:`H`.
        bias: at the start; positive starts by running.

    >>> StepGate(3, 4, bias=0.5)((torch.zeros(2, 3), (torch.zeros(2, 4),)))
    tensor([0.5000, 0.5000], grad_fn=<SqueezeBackward1>)

    References:
        Survey sections 4.1.1 (2) and 5.1.3; Seo et al., Skim-RNN, ICLR 2018.
    """

    def __init__(self, inputs: int, hidden: int, *, bias: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + hidden, 1)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Any) -> Tensor:
        """Scores of input and state."""
        seen, state = x
        return self.linear(torch.cat([seen, state[0]], 1)).squeeze(1)
