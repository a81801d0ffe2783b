"""The tape: thread-local, write-only, open only while somebody records; and the scope of the rows in flight."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pliant.core.decision import Decision
from pliant.core.errors import PliantError


class Meter(Protocol):
    """Whoever wants to know which part is running (the cost counter)."""

    def enter(self, owner: nn.Module, visit: int, choice: str, of: int) -> None:
        """A part begins, which is ``of`` units of work for each row."""
        ...

    def leave(self) -> None:
        """The part that began last ends."""
        ...

    def extend(self, owner: nn.Module, visits: int) -> None:
        """A loop of ``owner`` runs ``visits`` times, of which two ran here: each costs as much more as the second did."""
        ...


Ran = tuple[nn.Module, int, str, Tensor | None, Tensor | None, Tensor | None]
"""That a part ran: its owner, visit and choice, on which rows of the original batch, units of it for each, and wanted ones."""


class Tape:
    """What one recorded call wrote down, in the order it happened."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.decisions: list[tuple[nn.Module, Decision]] = []
        self.exits: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self.left: dict[int, Tensor] = {}  # by the executor's id: at which of its exits each row in flight left
        self.ran: list[Ran] = []
        self.counts: dict[int, int] = {}
        self.meter = meter
        self.grad = torch.is_grad_enabled()

    def visits(self, site: nn.Module) -> int:
        """How many decisions of ``site`` are on the tape."""
        return self.counts.get(id(site), 0)

    def decided(self, site: nn.Module, decision: Decision) -> None:
        """Note what ``site`` decided."""
        if self.grad:
            _refuse_lost_gradient(site)
        self.decisions.append((site, decision))
        self.counts[id(site)] = decision.visit + 1


class _State(threading.local):
    tape: Tape | None = None
    rows: Tensor | None = None
    reached: Tensor | None = None


_state = _State()


def tape() -> Tape | None:
    """The open tape of this thread, if any."""
    return _state.tape


def here() -> _State:
    """Tape, rows and reached of this thread in one look, for who needs them all."""
    return _state


def rows() -> Tensor | None:
    """Original batch index of every row in flight; None means all rows in their order."""
    return _state.rows


def reached() -> Tensor | None:
    """Which rows in flight would really come here, when everything is computed; None means all."""
    return _state.reached


def meter() -> Meter | None:
    """Whoever counts this thread's parts, if anybody does."""
    return None if _state.tape is None else _state.tape.meter


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


def part(
    owner: nn.Module, visit: int, choice: str, *,
    index: Tensor | None = None, reached: Tensor | None = None,
    units: Tensor | None = None, wanted: Tensor | None = None, of: int = 1,
) -> AbstractContextManager[None]:  # fmt: skip
    """Inside, the part ``choice`` of ``owner`` runs, on the rows ``index`` of those in flight (None: on all).

    An alternative made of several parts has one choice for each: "1/conv1", "1/conv2". ``reached`` narrows who would
    really come here (masked form). A part that can run by halves (on some channels, pixels, tokens) is ``of`` units of equal
    cost for each row; ``units`` is how many of them each row runs here, int64 (None: all), and ``wanted`` how many the
    decision asks for, by its soft value where there is one: what an expected cost differentiates.
    """
    # Without a tape nobody reads what is written, so most calls pay nothing; and a masked executor can be traced inside
    # torch.cond, which allows no side effect. An index counts always: it renumbers the rows in flight.
    if index is None:
        open_tape = _state.tape
        if open_tape is None:
            return _NOTHING
        if reached is None and open_tape.meter is None:
            open_tape.ran.append((owner, visit, choice, _state.rows, units, wanted))
            return _NOTHING
    return _Part((owner, visit, choice), index, reached, (units, wanted), of)


_NOTHING: AbstractContextManager[None] = nullcontext()

SIZE = "size"
"""The choice of a part that runs nothing: its units say how many choices stay, a size that all that runs later has."""


class _Part:
    """Notes that a part runs, and renumbers the rows in flight until it ends."""

    def __init__(
        self,
        key: tuple[nn.Module, int, str],
        index: Tensor | None,
        reached: Tensor | None,
        units: tuple[Tensor | None, Tensor | None],
        of: int,
    ) -> None:
        self.key, self.index, self.reached, self.units, self.of = key, index, reached, units, of

    def __enter__(self) -> None:
        open_tape = _state.tape
        self.before = (_state.rows, _state.reached)
        if self.index is not None:
            _state.rows = self.index if _state.rows is None else _state.rows.index_select(0, self.index)
            if _state.reached is not None:
                _state.reached = _state.reached.index_select(0, self.index)
        # Rows in flight with an index of their own may hold a dummy, which counts without a tape too.
        if self.reached is not None:
            _state.reached = self.reached if _state.reached is None else self.reached & _state.reached
        self.meter = None if open_tape is None else open_tape.meter
        if open_tape is not None:
            open_tape.ran.append((*self.key, _state.rows, *self.units))
        if self.meter is not None:
            self.meter.enter(*self.key, self.of)

    def __exit__(self, *_: object) -> None:
        _state.rows, _state.reached = self.before
        if self.meter is not None:
            self.meter.leave()


def _refuse_lost_gradient(module: nn.Module) -> None:
    """Reentrant checkpointing runs the forward without gradients: a loss read from the trace would lose its own."""
    if module.training and not torch.is_grad_enabled():
        raise PliantError(
            got="a decision made without gradients inside a recording that wants them",
            expected="gradients on for the whole recorded call",
            do="use checkpoint(..., use_reentrant=False), or record under torch.no_grad()",
        )


def write_exit(owner: nn.Module, logits: Any) -> None:
    """Note the logits of an exit that ran, if anybody records."""
    open_tape = _state.tape
    if open_tape is not None:
        if open_tape.grad:
            _refuse_lost_gradient(owner)
        open_tape.exits.append((logits, _state.rows, _state.reached))


def write_left(owner: nn.Module, left: Tensor) -> None:
    """Note at which exit of ``owner`` each row left, if anybody records: of an exported program, where it's free."""
    if _state.tape is not None:
        _state.tape.left[id(owner)] = left
