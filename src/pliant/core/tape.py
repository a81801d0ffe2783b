"""The tape: thread-local, write-only, open only while somebody records; and the scope of the rows in flight."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pliant.core.decision import Decision
from pliant.core.errors import PliantError


class Meter(Protocol):
    """Whoever wants to know which part is running (the cost counter)."""

    def enter(self, owner: nn.Module, visit: int, choice: str) -> None:
        """A part begins."""
        ...

    def leave(self) -> None:
        """The part that began last ends."""
        ...


@dataclass(frozen=True)
class Ran:
    """That a part ran: on which rows of the original batch, and how many units of it for each."""

    owner: nn.Module
    visit: int
    choice: str
    rows: Tensor | None
    units: Tensor | None


class Tape:
    """What one recorded call wrote down, in the order it happened."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.decisions: list[tuple[nn.Module, Decision]] = []
        self.exits: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self.ran: list[Ran] = []
        self.counts: dict[int, int] = {}
        self.meter = meter
        self.grad = torch.is_grad_enabled()

    def visits(self, site: nn.Module) -> int:
        """How many decisions of ``site`` are on the tape."""
        return self.counts.get(id(site), 0)


class _State(threading.local):
    tape: Tape | None = None
    rows: Tensor | None = None
    reached: Tensor | None = None


_state = _State()


def tape() -> Tape | None:
    """The open tape of this thread, if any."""
    return _state.tape


def rows() -> Tensor | None:
    """Original batch index of every row in flight; None means all rows in their order."""
    return _state.rows


def reached() -> Tensor | None:
    """Which rows in flight would really come here, when everything is computed; None means all."""
    return _state.reached


class opened:
    """Open ``tape`` for this thread; the scope of rows starts afresh."""

    def __init__(self, new: Tape) -> None:
        self.new = new

    def __enter__(self) -> Tape:
        self.before = (_state.tape, _state.rows, _state.reached)
        _state.tape, _state.rows, _state.reached = self.new, None, None
        return self.new

    def __exit__(self, *_: object) -> None:
        _state.tape, _state.rows, _state.reached = self.before


class part:
    """Inside, the part ``choice`` of ``owner`` runs, on the rows ``index`` of those in flight (None: on all).

    ``reached`` narrows who would really come here (masked form); ``units`` is how much of the part each row runs.
    """

    def __init__(
        self, owner: nn.Module, visit: int, choice: str, *,
        index: Tensor | None = None, reached: Tensor | None = None, units: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.visit, self.choice = owner, visit, choice
        self.index, self.reached, self.units = index, reached, units

    def __enter__(self) -> None:
        open_tape = _state.tape
        # Who is reached matters only to a tape; without one and without an index nothing is written, so that a masked
        # executor can be traced inside torch.cond, which allows no side effect.
        self.before = (_state.rows, _state.reached)
        self.moved = self.index is not None or (self.reached is not None and open_tape is not None)
        if self.index is not None:
            _state.rows = self.index if _state.rows is None else _state.rows.index_select(0, self.index)
            if _state.reached is not None:
                _state.reached = _state.reached.index_select(0, self.index)
        # Rows in flight with an index of their own may hold a dummy, which counts without a tape too.
        if self.reached is not None and (open_tape is not None or self.index is not None):
            _state.reached = self.reached if _state.reached is None else self.reached & _state.reached
        self.meter = None if open_tape is None else open_tape.meter
        if open_tape is not None:
            open_tape.ran.append(Ran(self.owner, self.visit, self.choice, _state.rows, self.units))
        if self.meter is not None:
            self.meter.enter(self.owner, self.visit, self.choice)

    def __exit__(self, *_: object) -> None:
        if self.moved:
            _state.rows, _state.reached = self.before
        if self.meter is not None:
            self.meter.leave()


def _refuse_lost_gradient(open_tape: Tape, module: nn.Module) -> None:
    """Reentrant checkpointing runs the forward without gradients: a loss read from the trace would lose its own."""
    if open_tape.grad and module.training and not torch.is_grad_enabled():
        raise PliantError(
            got="a decision made without gradients inside a recording that wants them",
            expected="gradients on for the whole recorded call",
            do="use checkpoint(..., use_reentrant=False), or record under torch.no_grad()",
        )


def write_decision(site: nn.Module, decision: Decision) -> None:
    """Note what ``site`` decided, if anybody records."""
    if _state.tape is not None:
        _refuse_lost_gradient(_state.tape, site)
        _state.tape.decisions.append((site, decision))
        _state.tape.counts[id(site)] = _state.tape.visits(site) + 1


def write_exit(owner: nn.Module, logits: Any) -> None:
    """Note the logits of an exit that ran, if anybody records."""
    if _state.tape is not None:
        _refuse_lost_gradient(_state.tape, owner)
        _state.tape.exits.append((logits, _state.rows, _state.reached))
