"""Steps of recurrent networks that are held or taken by halves: a decision for each row at each step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.execute.cells import Cell, State


class Recurrent(Executor):
    """A cell over a sequence, of which a site decides at every step whether a row runs it.

    The site sees the input of the step and the state before it, ``(x_t, state)``, and is visited once a step. A step that is
    not ``there`` (padding) leaves the state as it was, whatever was decided.

    One row alone that nobody records needs no decisions written down: where the rule does nothing but compare, its score is
    compared here, and the numbers are the same.
    """

    def __init__(self, cell: Cell, site: Site) -> None:
        super().__init__()
        self.cell = cell
        self.site = site

    def plain(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """The cell at every step."""
        state = self.cell.start(x.shape[0])
        for t in range(x.shape[1]):
            state = _only(there, t, self.cell(x[:, t], state), state)
        return state[0]

    def masked(self, x: Tensor, there: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        """Cell and alternative for every row, mixed by the value."""
        state = self.cell.start(x.shape[0])
        for t in range(x.shape[1]):
            decision = self._decide(x, state, given, t)
            on, off = (
                rows.run_masked(self.site, decision, k, run, x[:, t], state)
                for k, run in ((1, self.cell), (0, self._save))
            )
            state = _only(there, t, rows.mix(decision, on, off), state)
        return state[0]

    def gathered(self, x: Tensor, there: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        """The cell for the rows that chose it."""
        if not torch.compiler.is_compiling() and x.shape[0] == 1 and given is None and tape.tape() is None:
            threshold = compares(self.site, x)
            if threshold is not None:
                return self._alone(x, there, threshold)
        state = self.cell.start(x.shape[0])
        for t in range(x.shape[1]):
            decision = self._decide(x, state, given, t)
            state = _only(there, t, self._step(decision, x[:, t], state), state)
        return state[0]

    def _alone(self, x: Tensor, there: Tensor | None, threshold: float) -> Tensor:
        """One row, each of whose scores is compared with the threshold."""
        state, scorer = self.cell.start(1), self.site.scorer
        real = range(x.shape[1]) if there is None else there[0].nonzero().squeeze(1).tolist()
        for t in real:
            step = x[:, t], state
            saves = scorer(step).item() <= threshold  # not so for NaN, which runs
            state = self._save(*step) if saves else self.cell(*step)
        return state[0]

    def _decide(self, x: Tensor, state: State, given: Tensor | None, t: int) -> Decision:
        return self.site((x[:, t], state), given=None if given is None else given[:, t], visit=t)

    @abstractmethod
    def _save(self, x: Tensor, state: State) -> State:
        """The state after a step that saves."""

    @abstractmethod
    def _step(self, decision: Decision, x: Tensor, state: State) -> State:
        """The state after a step, each row by what it chose."""


class Hold(Recurrent):
    r"""Update the state of the rows that want it; the others hold theirs, and their input isn't touched.

    .. math:: s_t = u_t\, S(s_{t-1}, x_t) + (1 - u_t)\, s_{t-1}

    Where the scorer knows when its score will pass a threshold if nothing is run before (it has ``until``), one row alone
    that nobody records goes from update to update: inputs in between aren't read at all.

    Shape:
        ``x`` :math:`(R, T, ...)`; ``there`` :math:`(R, T)` bool; returns the cell's output after the last step; ``given``
        :math:`(R, T)`.

    Args:
        cell: :math:`S`. An encoder belongs into it (:class:`pliant.execute.Encoded`), so that held inputs aren't encoded.
        site: reads ``(x_t, state)``.

    >>> import pliant
    >>> from pliant.execute import GRUStep
    >>> rnn = Hold(GRUStep(3, 4), Site(nn.Identity(), pliant.rules.Never())).eval()
    >>> bool(torch.equal(rnn(torch.ones(2, 5, 3)), rnn.cell.start(2)[0]))
    True

    References:
        Survey section 4.1.1 (1); Campos et al., Skip RNN, ICLR 2018.
    """

    def _alone(self, x: Tensor, there: Tensor | None, threshold: float) -> Tensor:
        """One row; from update to update where the scorer knows them ahead."""
        until: Any = getattr(self.site.scorer, "until", None)
        if until is None or there is not None:
            return super()._alone(x, there, threshold)
        state, t = self.cell.start(1), 0
        while True:
            held = until(state, threshold)
            if held >= x.shape[1] - t:
                return self.cell.wait(state, x.shape[1] - t)[0]
            if held:
                state, t = self.cell.wait(state, held), t + held
            state, t = self.cell(x[:, t], state), t + 1

    def _save(self, x: Tensor, state: State) -> State:
        return self.cell.wait(state)

    def _step(self, decision: Decision, x: Tensor, state: State) -> State:
        return rows.run_some(self.site, decision, self.cell, (x, state), rows.replaced, lambda: self.cell.wait(state))


class Partial(Recurrent):
    r"""Run a large cell or a small one that updates only a part of the state.

    .. math:: s_t = u_t\, f(s_{t-1}, x_t) + (1 - u_t)\, [f'(s_{t-1}, x_t); s_{t-1, d'+1:d}]

    Shape:
        as :class:`Hold`.

    Args:
        cell: :math:`f`.
        small: :math:`f'`, a module from input and state to the whole next state.
        site: reads ``(x_t, state)``.

    >>> import pliant
    >>> from pliant.execute import LSTMStep, SmallLSTM
    >>> site = Site(nn.Identity(), pliant.rules.Never())
    >>> rnn = Partial(LSTMStep(3, 4), SmallLSTM(3, 4, small=1), site).eval()
    >>> (rnn(torch.ones(2, 5, 3))[0] != 0).tolist()
    [True, False, False, False]

    References:
        Survey section 4.1.1 (2); Seo et al., Skim-RNN, ICLR 2018.
    """

    def __init__(self, cell: Cell, small: nn.Module, site: Site) -> None:
        super().__init__(cell, site)
        self.small = small

    def _save(self, x: Tensor, state: State) -> State:
        return self.small(x, state)

    def _step(self, decision: Decision, x: Tensor, state: State) -> State:
        runs = (lambda s: self.small(*s), lambda s: self.cell(*s))
        return rows.run_either(self.site, decision, runs, (x, state))


def compares(site: Site, like: Tensor) -> float | None:
    """The site's threshold, where its rule does nothing but compare scores with it."""
    rule: Any = getattr(site.rule, "rule", site.rule)  # an estimator holds the rule that it's an estimator of
    if not hasattr(rule, "threshold") or (rule is not site.rule and hasattr(site.rule, "threshold")):
        return None  # none to compare with, or a rule that sets it as it sees the scores
    outcome = site.rule(torch.zeros(1, device=like.device))
    if outcome.log_prob is not None or outcome.weight or outcome.soft is outcome.value:  # it draws, or weighs
        return None
    return float(rule.threshold)


def _only(there: Tensor | None, t: int, new: State, old: State) -> Any:
    """``new`` where step ``t`` is there, else ``old``."""
    if there is None:
        return new
    here = there[:, t]
    return tuple(torch.where(rows.weigh(here, n), n, o) for n, o in zip(new, old, strict=True))
