"""Cells of recurrent executors: from the input of a step and a state to the next state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""What a recurrent network remembers, rows first; the first tensor is its output."""


class Cell(nn.Module, ABC):
    """One step: ``forward(x, state)`` is the next state, ``start(rows)`` the first one."""

    @abstractmethod
    def start(self, rows: int) -> State:
        """The state before the first input."""

    @abstractmethod
    def forward(self, x: Any, state: State) -> State:
        """The state after input ``x``."""

    def memory(self, state: State) -> Tensor:
        """What a gate reads of a state; its output, unless the cell keeps more behind it."""
        return state[0]

    def wait(self, state: State, steps: int = 1) -> State:
        """The state after ``steps`` steps at which the cell wasn't run: by default what it was. It must cost no FLOPs."""
        return state


class LSTMStep(Cell):
    r"""An LSTM cell with a learned first state; the state is :math:`(h, c)` and gates read :math:`c`.

    Shape:
        ``x`` :math:`(R, I)`; each tensor of the state :math:`(R, H)`.

    Args:
        inputs: :math:`I`.
        hidden: :math:`H`.

    >>> cell = LSTMStep(3, 4)
    >>> [s.shape for s in cell(torch.zeros(2, 3), cell.start(2))]
    [torch.Size([2, 4]), torch.Size([2, 4])]
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(inputs, hidden)
        self.first = nn.Parameter(torch.zeros(2, hidden))
        with torch.no_grad():  # a forget gate that starts open remembers from the first update on
            self.cell.bias_ih[hidden : 2 * hidden] = 1.0
            self.cell.bias_hh[hidden : 2 * hidden] = 0.0

    def start(self, rows: int) -> State:
        """Learned, the same for every row."""
        h, c = self.first.unbind(0)
        return h.repeat(rows, 1), c.repeat(rows, 1)

    def forward(self, x: Tensor, state: State) -> State:
        """Hidden and cell state after ``x``."""
        return self.cell(x, (state[0], state[1]))

    def memory(self, state: State) -> Tensor:
        """The cell state."""
        return state[1]


class GRUStep(Cell):
    r"""A GRU cell with a learned first state; the state is :math:`(h,)`.

    Shape:
        ``x`` :math:`(R, I)`; the state's tensor :math:`(R, H)`.

    Args:
        inputs: :math:`I`.
        hidden: :math:`H`.

    >>> cell = GRUStep(3, 4)
    >>> [s.shape for s in cell(torch.zeros(2, 3), cell.start(2))]
    [torch.Size([2, 4])]
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(inputs, hidden)
        self.first = nn.Parameter(torch.zeros(hidden))

    def start(self, rows: int) -> State:
        """Learned, the same for every row."""
        return (self.first.repeat(rows, 1),)

    def forward(self, x: Tensor, state: State) -> State:
        """The hidden state after ``x``."""
        return (self.cell(x, state[0]),)


class Encoded(Cell):
    """A cell behind an encoder, such as a CNN for frames or an embedding for words: a step not run isn't encoded either.

    Args:
        encoder: from the input of a step to that of the cell.
        cell: the cell.

    >>> cell = Encoded(nn.Embedding(9, 3), GRUStep(3, 4))
    >>> cell(torch.tensor([5, 7]), cell.start(2))[0].shape
    torch.Size([2, 4])
    """

    def __init__(self, encoder: nn.Module, cell: Cell) -> None:
        super().__init__()
        self.encoder = encoder
        self.cell = cell

    def start(self, rows: int) -> State:
        """The cell's."""
        return self.cell.start(rows)

    def forward(self, x: Any, state: State) -> State:
        """The state after the encoded input."""
        return self.cell(self.encoder(x), state)

    def memory(self, state: State) -> Tensor:
        """The cell's."""
        return self.cell.memory(state)

    def wait(self, state: State, steps: int = 1) -> State:
        """The cell's."""
        return self.cell.wait(state, steps)


class Pressed(Cell):
    r"""A cell that says after every update by how much the urge to update again grows with each step.

    .. math:: \Delta = \sigma(w \cdot m + b)

    with :math:`m` the cell's memory. The state is the cell's, then :math:`\Delta`, then the number of the step after the last
    update, counted from 1. :class:`pliant.scores.Pressure` reads both. At the start :math:`\Delta = 1`: the first input is read.

    Shape:
        as the cell's; the two further tensors of the state are :math:`(R,)`.

    Args:
        cell: any.
        hidden: width of the cell's memory.
        bias: :math:`b` at the start; 1 reads nearly every step.

    >>> cell = Pressed(GRUStep(3, 4), 4, bias=0.0)
    >>> [s.tolist() for s in cell.wait(cell.start(1))[1:]]
    [[1.0], [2.0]]

    References:
        Survey section 4.1.1 (1); Campos et al., Skip RNN, ICLR 2018.
    """

    def __init__(self, cell: Cell, hidden: int, *, bias: float = 1.0) -> None:
        super().__init__()
        self.cell = cell
        self.increment = nn.Linear(hidden, 1)
        nn.init.constant_(self.increment.bias, bias)

    def start(self, rows: int) -> State:
        """The cell's, about to update."""
        inner = self.cell.start(rows)
        one = inner[0].new_ones(rows)
        return (*inner, one, one)

    def forward(self, x: Any, state: State) -> State:
        """An update: the count starts anew."""
        inner = self.cell(x, state[:-2])
        increment = self.increment(self.cell.memory(inner)).squeeze(1).sigmoid()
        return (*inner, increment, torch.ones_like(increment))

    def memory(self, state: State) -> Tensor:
        """The cell's."""
        return self.cell.memory(state[:-2])

    def wait(self, state: State, steps: int = 1) -> State:
        """The same, ``steps`` later."""
        return (*state[:-1], state[-1] + steps)


class SmallLSTM(nn.Module):
    r"""A small LSTM that sees the whole state of a large one and writes only its first :math:`d'` dimensions.

    .. math:: (g, i, f, o) = W [x; h] + b, \qquad c_{1:d'} = \sigma(f)\,c_{1:d'} + \sigma(i) \tanh(g), \qquad
              h_{1:d'} = \sigma(o) \tanh(c_{1:d'})

    The other dimensions of :math:`h` and :math:`c` stay as they are.

    Shape:
        ``x`` :math:`(R, I)`; each tensor of the state :math:`(R, H)`.

    Args:
        inputs: :math:`I`.
        hidden: :math:`H`.
        small: :math:`d'`, 1 to :math:`H`.

    >>> state = torch.zeros(1, 4), torch.zeros(1, 4)
    >>> [(s != 0)[0].tolist() for s in SmallLSTM(3, 4, small=1)(torch.ones(1, 3), state)]
    [[True, False, False, False], [True, False, False, False]]

    References:
        Survey section 4.1.1 (2); Seo et al., Skim-RNN, ICLR 2018.
    """

    def __init__(self, inputs: int, hidden: int, *, small: int) -> None:
        super().__init__()
        self.small = small
        self.gates = nn.Linear(inputs + hidden, 4 * small)

    def forward(self, x: Tensor, state: State) -> State:
        """The state with its first dimensions written."""
        h, c = state
        gates, small = self.gates(torch.cat([x, h], 1)), self.small
        i, f, o = gates[:, small:].sigmoid().chunk(3, 1)
        head = f * c[:, :small] + i * gates[:, :small].tanh()
        return torch.cat([o * head.tanh(), h[:, small:]], 1), torch.cat([head, c[:, small:]], 1)
