"""Recurrent gates: one small memory along the depth, shared by all blocks (SkipNet)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score
from pliant.scores.confidence import Pooled

State = tuple[Tensor, Tensor]
"""Hidden and cell state of a row, each (R, hidden)."""


class GateMemory(nn.Module):
    r"""An LSTM of ``hidden`` units and a logit or several, shared by the gates of a network.

    Written as two linear layers, since PyTorch's FLOP counter sees nothing of ``nn.LSTM``.

    Shape:
        input :math:`(R, \text{hidden})` and a state; logits :math:`(R,)` (or :math:`(R, K)` where there are
        several) and the next state.

    Args:
        hidden: units; 10 in the paper.
        bias: of the logits at the start; positive starts open.
        outputs: :math:`K`, how many logits; None says one for each row.

    Raises:
        PliantError: where ``hidden`` or ``outputs`` is below 1.

    >>> import torch
    >>> logit, state = GateMemory(4)(torch.zeros(2, 4), None)
    >>> logit.shape, state[0].shape
    (torch.Size([2]), torch.Size([2, 4]))

    References:
        Survey section 5.1.3; Wang et al., SkipNet, ECCV 2018.
    """

    def __init__(self, hidden: int = 10, *, bias: float = 1.0, outputs: int | None = None) -> None:
        super().__init__()
        if hidden < 1 or (outputs is not None and outputs < 1):
            raise PliantError(
                got=f"hidden={hidden}, outputs={outputs}", expected="at least 1 of each", do="pass e.g. 10 and 1"
            )
        self.hidden = hidden
        self.seen = nn.Linear(hidden, 4 * hidden)
        self.kept = nn.Linear(hidden, 4 * hidden)
        self.out = nn.Linear(hidden, outputs or 1)
        self.shape = () if outputs is None else (outputs,)
        for layer in (self.seen, self.kept):
            nn.init.uniform_(layer.weight, -(hidden**-0.5), hidden**-0.5)
        nn.init.constant_(self.out.bias, bias)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The logit after input ``x``, and the state to hand on."""
        if state is None:
            zeros = x.new_zeros((x.shape[0], self.hidden))
            state = (zeros, zeros)
        hidden, cell = state
        into, forget, new, out = (self.seen(x) + self.kept(hidden)).chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        logits = self.out(hidden)
        return (logits if self.shape else logits.squeeze(-1)), (hidden, cell)


class RecurrentGate(Score):
    r"""SkipNet's recurrent gate: pool, a projection of its own, one step of the shared memory, one logit.

    .. math:: (s_l, m_l) = \mathrm{LSTM}(P_l\, \mathrm{mean}_{hw}(x_l), m_{l-1})

    The memory :math:`m` is the chain's carry: whatever runs the blocks hands it from site to site, rows first
    (:class:`pliant.execute.Chain`); elsewhere every gate starts from an empty memory.

    Shape:
        features :math:`(R, C, ...)`; scores :math:`(R,)`, or as many as the memory has outputs; carries two tensors :math:`(R, \text{hidden})`.

    Args:
        channels: :math:`C` of this block's input.
        memory: one :class:`GateMemory`, the same object in every gate of the network.

    >>> import torch
    >>> memory = GateMemory()
    >>> first, second = RecurrentGate(4, memory), RecurrentGate(8, memory)
    >>> s, carry = first.step(torch.zeros(2, 4, 5, 5), None)
    >>> second.step(torch.zeros(2, 8, 3, 3), carry)[0].shape
    torch.Size([2])

    References:
        Survey sections 2.1.1 (2b) and 5.1.3; Wang et al., SkipNet, ECCV 2018.

    Differs from the paper: the sigmoid is left to the rule (its 0.5 is a logit of 0), and the gates start open.
    """

    def __init__(self, channels: int, memory: GateMemory) -> None:
        super().__init__()
        self.pool = Pooled()
        self.project = nn.Linear(channels, memory.hidden)
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x`` with an empty memory."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """Scores of ``x`` after what ``carry`` remembers of the blocks before."""
        return self.memory(self.project(self.pool(x)), carry)
