"""Skip RNN: a binary gate holds the state, and says after each update how long."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.estimators import Rounding, StraightThrough
from pliant.execute.cells import Cell, Encoded, GRUStep, LSTMStep, Pressed
from pliant.execute.steps import Hold
from pliant.rules.threshold import Threshold
from pliant.scores.steps import Pressure

CELLS: dict[str, type[LSTMStep | GRUStep]] = {"lstm": LSTMStep, "gru": GRUStep}


def skip_rnn(
    num_classes: int = 10,
    in_chans: int = 1,
    *,
    hidden: int = 110,
    cell: str = "lstm",
    bias: float = 1.0,
    encoder: nn.Module | None = None,
) -> nn.Module:
    r"""A recurrent network that decides at every step whether to update its state, and a linear layer on the last state.

    .. math:: u_t = \mathrm{round}(p_t), \quad s_t = u_t\, S(s_{t-1}, x_t) + (1 - u_t)\, s_{t-1}, \quad
              \Delta_t = \sigma(w \cdot s_t + b), \quad
              p_{t+1} = u_t \Delta_t + (1 - u_t) (p_t + \min(\Delta_t, 1 - p_t))

    The gate reads the cell state of an LSTM; the first input is always read; the first state is learned. Train with the task's
    loss plus :math:`\lambda \sum_t u_t`, which is ``GateL1(of=hard)`` with weight :math:`\lambda T`: :math:`\lambda` of 1e-5 to
    1e-4, Adam with learning rate 1e-4, batches of 256, gradients clipped to norm 1.

    Shape:
        sequences :math:`(R, T, \text{in\_chans})`, or :math:`(R, T, ...)` as the encoder takes them; logits
        :math:`(R, \text{num\_classes})`.

    Args:
        num_classes: classes, or numbers to regress.
        in_chans: numbers of a step, as the encoder gives them if there is one.
        hidden: units of the cell.
        cell: "lstm" or "gru".
        bias: :math:`b` at the start; 1 updates at nearly every step.
        encoder: runs before the cell at the steps that update, and only there.

    Returns:
        The network; its site is visited once a step.

    Raises:
        PliantError: where there's no such cell.

    >>> import torch
    >>> skip_rnn(3, 2, hidden=4)(torch.zeros(5, 7, 2)).shape
    torch.Size([5, 3])

    References:
        Survey section 4.1.1 (1), Eq. 12; Campos et al., Skip RNN, ICLR 2018.

    Differs from the paper: one layer; the increment is mixed along with the state, so that its gradient for the gate is the
    difference of the two increments, where the paper differentiates at the mixed state.
    """
    if cell not in CELLS:
        raise PliantError(got=f"cell {cell!r}", expected="one of " + ", ".join(CELLS), do="pass cell='lstm'")
    inner: Cell = CELLS[cell](in_chans, hidden)
    if encoder is not None:
        inner = Encoded(encoder, inner)
    site = Site(Pressure(), StraightThrough(Threshold(0.5), surrogate=Rounding()))
    loop = Hold(Pressed(inner, hidden, bias=bias), site)
    return nn.Sequential(OrderedDict(loop=loop, head=nn.Linear(hidden, num_classes)))
