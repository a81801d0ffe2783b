"""Halting: how much of the halting budget a unit's state wants to use up, and the score made of what is left."""

from __future__ import annotations

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score
from pliant.scores.confidence import Pooled


class Remainder(Score):
    r"""The part of the halting budget that is left after a unit, :math:`r_n = 1 - \sum_{i \le n} h_i`, as it comes.

    The executor keeps the account, since the weights of its answer need it whoever decides; the score only reads it.

    Shape:
        remainders :math:`(R,)`, or :math:`(R, 1, H, W)` where each position halts for itself; scores the same.

    >>> import torch
    >>> Remainder()(torch.tensor([1.0, 0.25]))
    tensor([1.0000, 0.2500])

    References:
        Survey section 5.1.1; Graves, Adaptive Computation Time for Recurrent Neural Networks, 2016.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The remainders themselves."""
        return x


class HaltingHead(nn.Module):
    r"""Logit of a unit's halting probability, :math:`h_n = \sigma(w \cdot \mathrm{mean}_{hw}(s_n) + b)`, from its state.

    Not a score: it says how much to stop. Give it to :class:`pliant.execute.Halting`.

    Shape:
        state :math:`(R, C, ...)`; logits :math:`(R,)`.

    Args:
        channels: :math:`C`.
        bias: :math:`b` at the start; -3 (SACT) lets all units run, 1 (ACT on tokens) only a few.
        norm: of the mean, e.g. ``nn.BatchNorm1d(channels)`` (SACT); default, nothing.

    >>> import torch
    >>> HaltingHead(4)(torch.zeros(2, 4, 3, 3))
    tensor([-3., -3.], grad_fn=<SqueezeBackward1>)

    References:
        Survey section 5.1.1; Figurnov et al., Spatially Adaptive Computation Time for Residual Networks, CVPR 2017.
    """

    def __init__(self, channels: int, *, bias: float = -3.0, norm: nn.Module | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise PliantError(got=f"channels={channels}", expected="at least 1", do="pass the width of the state")
        self.pool = Pooled()
        self.norm = nn.Identity() if norm is None else norm
        self.linear = nn.Linear(channels, 1)
        nn.init.normal_(self.linear.weight, std=1e-2)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of state ``x``."""
        return self.linear(self.norm(self.pool(x))).squeeze(-1)
