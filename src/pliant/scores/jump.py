"""Jumps: whether to read on at all, and how far on, by one softmax over both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.site import Score

NEVER = -1e4
"""The score of a row whose text has ended: a finite one, since gradients and dials don't like infinities."""


class WhetherToJump(Score):
    r"""The log-odds of any jump against stopping: :math:`s = \log \sum_{k \ge 1} e^{z_k} - z_0`, with :math:`z = W m + b`.

    Then :math:`\sigma(s)` is the probability of not stopping under :math:`\mathrm{softmax}(z)`, and
    :class:`WhereToJump` has the rest of it. Where nothing is left to read, the score is -10,000.

    Shape:
        ``x``: a :class:`pliant.execute.Said` with memory :math:`(R, H)`; scores :math:`(R,)`.

    Args:
        linear: :math:`W` and :math:`b`, from :math:`H` to :math:`K + 1`; shared with :class:`WhereToJump`.

    >>> said = torch.zeros(2, 5), torch.zeros(2, 3), torch.tensor([7, 0])
    >>> linear = nn.Linear(3, 5)
    >>> _ = nn.init.zeros_(linear.bias)
    >>> WhetherToJump(linear)(said).detach()  # four jumps against one stop
    tensor([ 1.3863e+00, -1.0000e+04])

    References:
        Survey section 4.1.3; Yu, Lee, Le, Learning to Skim Text, ACL 2017.

    Differs from the paper: while training nothing; in evaluation ours stops where stopping is likelier than not, the paper where
    it's likelier than each single jump.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Any) -> Tensor:
        """Scores of what's said behind a visit."""
        _, memory, left = x
        z = self.linear(memory)
        return torch.where(left > 0, z[:, 1:].logsumexp(1) - z[:, 0], NEVER)


class WhereToJump(Score):
    r"""The logits of the jumps, :math:`z_1, \dots, z_K` of :math:`z = W m + b`.

    Shape:
        memory :math:`(R, H)`; scores :math:`(R, K)`.

    Args:
        linear: :math:`W` and :math:`b`, from :math:`H` to :math:`K + 1`; shared with :class:`WhetherToJump`.

    >>> WhereToJump(nn.Linear(3, 5))(torch.zeros(2, 3)).shape
    torch.Size([2, 4])

    References:
        Survey section 4.1.3; Yu, Lee, Le, Learning to Skim Text, ACL 2017.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the memory."""
        return self.linear(x)[:, 1:]
