"""Gates of recurrent networks: from the input of a step and the state before it to the wish to run the cell."""

from __future__ import annotations

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
    >>> Pressure().ahead(state, 4)[0]
    tensor([0.3000, 0.6000, 0.9000, 1.0000])

    References:
        Survey sections 4.1.1 (1) and 5.1.3; Campos et al., Skip RNN, ICLR 2018.
    """

    def forward(self, x: Any) -> Tensor:
        """The urge at this step."""
        *_, increment, count = x[1]
        return (count * increment).clamp(max=1)

    def ahead(self, state: Any, steps: int) -> Tensor:
        """The urge at this and the following steps if none of them updates, (R, steps)."""
        *_, increment, count = state
        later = torch.arange(steps, dtype=count.dtype, device=count.device)
        return ((count.unsqueeze(1) + later) * increment.unsqueeze(1)).clamp(max=1)


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
