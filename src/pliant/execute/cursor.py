"""Cursor: a pointer for each row that moves over a sequence; what it doesn't come to is never fetched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site


class Store:
    """Sequences (N, T, ...) that elements are fetched from. No tensor itself, so choosing rows of a state copies no sequence."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def fetch(self, row: Tensor, index: Tensor) -> Tensor:
        """Of sequence ``row`` (R,) the elements ``index`` (R, n): a copy (R, n, ...) of just these."""
        return self.x[row[:, None], index]


class Reading(NamedTuple):
    """How far each row has read: its memory (the first tensor is what policies see), its sequence, and its pointer.

    ``at`` is the element read last, ``length`` the number of elements; ``carry`` is the scorer's memory of the moves before.
    """

    memory: Any
    row: Tensor
    length: Tensor
    at: Tensor
    store: Store
    carry: Any = None


class Piece(NamedTuple):
    """What a visit finds: ``elements`` (R, span, ...), the first ``there`` (R,) of which exist, and where the first lies, in [0, 1]."""

    elements: Tensor
    there: Tensor
    where: Tensor


class Reader(nn.Module, ABC):
    """What is done with the elements at the pointer, ``span`` of them side by side: they become memory."""

    span: int = 1

    @abstractmethod
    def start(self, x: Tensor) -> Any:
        """The memory before anything is read of sequences ``x`` (R, T, ...): a tree of tensors, rows first."""

    @abstractmethod
    def forward(self, piece: Piece, memory: Any) -> Any:
        """The memory after a visit, which may have found nothing."""

    def lengths(self, x: Tensor) -> Tensor:
        """How many elements each sequence of ``x`` has, (R,) int64; by default all."""
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)

    def visit(self, reading: Reading, to: Tensor) -> Reading:
        """Move the pointers to ``to`` (R,) and read from there."""
        index = to[:, None] + torch.arange(self.span, device=to.device)
        there = (reading.length - to).clamp(0, self.span)
        last = (reading.length - 1).clamp_min(0)
        elements = reading.store.fetch(reading.row, torch.minimum(index, last[:, None]))
        piece = Piece(elements, there, torch.minimum(to, last) / last.clamp_min(1))
        return reading._replace(memory=self(piece, reading.memory), at=to + self.span - 1)


class Open(nn.Module):
    """The first visit of every sequence, at the same share of its way for all.

    Args:
        reader: what reads.
        at: share in [0, 1].
    """

    def __init__(self, reader: Reader, *, at: float = 0.0) -> None:
        super().__init__()
        self.reader, self.at = reader, at

    def extra_repr(self) -> str:
        """The place."""
        return f"at={self.at}"

    def forward(self, x: Tensor) -> Reading:
        """From sequences (R, T, ...) to what has been read after the first visit."""
        rows, length = torch.arange(x.shape[0], device=x.device), self.reader.lengths(x)
        to = _share(length, torch.full_like(length, self.at, dtype=torch.float32))
        return self.reader.visit(Reading(self.reader.start(x), rows, length, to, Store(x)), to)


class Move(nn.Module, ABC):
    """How a decision moves the pointer."""

    shape: tuple[int, ...]

    @abstractmethod
    def forward(self, reading: Reading, value: Tensor) -> Tensor:
        """Where to read next, (R,), at this ``value`` (R, *shape)."""


class Jump(Move):
    r"""Forward by :math:`k` elements from the one read last, where :math:`v_k` is the first value that isn't 0.

    Ones read on at the next element, and zeros jump furthest, by :math:`K`: value 1 spends.

    Args:
        most: :math:`K`.

    >>> x = torch.zeros(3, 9)
    >>> reading = Reading((), torch.arange(3), torch.full((3,), 9), torch.tensor([2, 2, 2]), Store(x))
    >>> Jump(4)(reading, torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]))
    tensor([3, 4, 6])

    References:
        Survey section 4.1.3; Yu, Lee, Le, Learning to Skim Text, ACL 2017.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.shape = (most,)

    def forward(self, reading: Reading, value: Tensor) -> Tensor:
        """Behind the last element read."""
        chosen = ~(value <= 0)
        steps = torch.where(chosen.any(1), chosen.to(torch.uint8).argmax(1), self.shape[0] - 1)
        return reading.at + 1 + steps


class Place(Move):
    r"""Anywhere, backward too: to element :math:`\mathrm{round}(v\,(T - 1))`.

    >>> reading = Reading((), torch.arange(1), torch.tensor([9]), torch.tensor([8]), Store(torch.zeros(1, 9)))
    >>> Place()(reading, torch.tensor([0.5]))
    tensor([4])

    References:
        Survey section 4.2.1 (3); Wu et al., AdaFrame, CVPR 2019.
    """

    shape = ()

    def forward(self, reading: Reading, value: Tensor) -> Tensor:
        """At a share of the way."""
        return _share(reading.length, value)


def _share(length: Tensor, share: Tensor) -> Tensor:
    last = (length - 1).clamp_min(0)
    return torch.minimum((share.detach().nan_to_num().clamp(0, 1) * last).round().to(torch.int64), last)


class Cursor(Executor):
    r"""Decide for each row where to read next, move its pointer there, and read.

    .. math:: a_t = \mathrm{move}(a_{t-1}, v_t), \qquad m_t = \mathrm{read}(x_{a_t}, \dots, x_{a_t + n - 1}, m_{t-1})

    A visit costs the same wherever it is, so the masked and the gathered form are one, as in :class:`Region`; which rows make
    another visit at all is for :class:`Exits` to decide, with cursors as its stages. ``Always``, which is also the plain form,
    reads on without a gap (:class:`Jump`), or at the last element (:class:`Place`).

    Shape:
        a :class:`Reading` of :math:`R` rows, and another one; ``given``: :math:`(R, *\text{shape})`.

    Args:
        site: decides from the first tensor of the memory, with the move's shape.
        move: what a value means.
        reader: reads.

    Raises:
        PliantError: where the site's shape isn't the move's.

    >>> import pliant
    >>> class Sum(Reader):
    ...     def start(self, x):
    ...         return (torch.zeros(len(x)),)
    ...     def forward(self, piece, memory):
    ...         return (memory[0] + piece.elements[:, 0] * piece.there,)
    >>> first, site = Open(Sum()), pliant.Site(nn.Identity(), pliant.rules.Never(), shape=(2,))
    >>> Cursor(site, Jump(2), first.reader)(first(torch.tensor([[1.0, 10, 100]]))).memory
    (tensor([101.]),)

    References:
        Survey sections 4.1.3 and 4.2.1 (3); Yu, Lee, Le, ACL 2017; Wu et al., AdaFrame, CVPR 2019.
    """

    def __init__(self, site: Site, move: Move, reader: Reader) -> None:
        super().__init__()
        if site.shape != move.shape:
            raise PliantError(
                got=f"a site of shape {site.shape} for a {type(move).__name__}", expected=str(move.shape),
                do="make the site with shape=move.shape",
            )  # fmt: skip
        self.site = site
        self.move = move
        self.reader = reader

    def plain(self, x: Reading) -> Reading:
        """Read where ones lead."""
        return self.reader.visit(x, self.move(x, torch.ones(x.at.shape + self.move.shape, device=x.at.device)))

    def masked(self, x: Reading, given: Tensor | Outcome | None = None) -> Reading:
        """The same as gathered: there's nothing that another place would compute."""
        return self.gathered(x, given=given)

    def gathered(self, x: Reading, given: Tensor | Outcome | None = None) -> Reading:
        """Decide, move, read."""
        decision = self.site(x.memory[0], given=given, carry=x.carry)
        return self.reader.visit(x._replace(carry=decision.carry), self.move(x, decision.value))


class Said(NamedTuple):
    """What sites of exits behind cursors read: logits, the first tensor of the memory, and how many elements are unread behind it."""

    logits: Tensor
    memory: Tensor
    left: Tensor


class Say(nn.Module):
    """From a reading and its logits to what its exit's site reads."""

    def forward(self, reading: Reading, logits: Tensor) -> Said:
        """Logits first."""
        return Said(logits, reading.memory[0], (reading.length - 1 - reading.at).clamp_min(0))


class Classify(nn.Module):
    """A linear layer on the first tensor of the memory, for exits behind cursors.

    >>> reading = Reading((torch.zeros(2, 3),), *[torch.arange(2)] * 3, Store(torch.zeros(2, 1)))
    >>> Classify(3, 10)(reading).shape
    torch.Size([2, 10])
    """

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, reading: Reading) -> Tensor:
        """Logits."""
        return self.linear(reading.memory[0])
