"""Where to look next: a small recurrent policy on the features of the look before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.site import Score


class PlacePolicy(Score):
    r"""Features, a memory of the looks before, and one logit for each number of the place.

    .. math:: m_t = \mathrm{GRU}(\mathrm{relu}(W\,\mathrm{relu}(P * x_t) + b), m_{t-1}), \qquad s_t = A\, m_t + a

    The memory is the scorer's carry. :class:`pliant.estimators.Gaussian` makes a place of the logits.

    Shape:
        features :math:`(R, C, n, n)`; scores :math:`(R, P)`; carries :math:`(R, \text{hidden})`.

    Args:
        channels: :math:`C`.
        side: :math:`n`.
        hidden: units of the memory; 256 or 1024 in the paper.
        narrow: channels that the 1x1 convolution :math:`P` keeps.
        places: :math:`P`.

    >>> policy = PlacePolicy(8, 4, hidden=16)
    >>> scores, memory = policy.step(torch.zeros(3, 8, 4, 4), None)
    >>> scores.shape, memory.shape
    (torch.Size([3, 2]), torch.Size([3, 16]))

    References:
        Survey sections 3.2.2 and 5.1.2; Wang et al., Glance and Focus, NeurIPS 2020.
    """

    def __init__(self, channels: int, side: int, *, hidden: int = 256, narrow: int = 32, places: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, narrow, 1), nn.ReLU(), nn.Flatten(), nn.Linear(narrow * side * side, hidden), nn.ReLU()
        )
        self.memory = nn.GRUCell(hidden, hidden)
        self.linear = nn.Linear(hidden, places)
        nn.init.normal_(self.linear.weight, std=1e-2)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x`` at a first look."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """Scores of ``x`` after the looks that ``carry`` remembers."""
        seen = self.features(x)
        memory = self.memory(seen, torch.zeros_like(seen) if carry is None else carry)
        return self.linear(memory), memory
