"""Hierarchy: recurrent levels of which each runs only where the one below closed a segment, or its own just ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.execute.steps import compares


class Level(nn.Module):
    r"""A layer-norm LSTM with input from below and, at the start of a segment, from above; it scores the segment's end.

    .. math::
        (f, i, o, g), \tilde z = W [z^b h^b; h; z h^a] + b, \qquad
        c' = (1 - z)\,\sigma(f)\,c + \sigma(i) \tanh(g), \qquad h' = \sigma(o) \tanh(c')

    with the state :math:`h, c` of the step before and whether it ended a segment there, :math:`z`; the state below
    :math:`h^b` and whether it has just ended one, :math:`z^b`; and the state above, :math:`h^a`, of the step before. So
    :math:`z = 1` flushes the memory, which has been handed up. A norm for each gate; none for :math:`\tilde z`.

    Shape:
        :math:`(R, B)`, :math:`(R,)`, :math:`(R, H)` twice, :math:`(R, A)`, :math:`(R,)`; returns :math:`(R, H)` twice and
        :math:`(R, 1)`.

    Args:
        below: :math:`B`.
        hidden: :math:`H`.
        above: :math:`A`; 0 at the top, which has no end: its score has no meaning there.
        bias: of :math:`\tilde z` at the start.

    >>> h, c, end = Level(3, 4, 0)(torch.zeros(2, 3), torch.ones(2), *torch.zeros(2, 2, 4), torch.zeros(2, 0), torch.zeros(2))
    >>> h.shape, c.shape, end.shape
    (torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([2, 1]))

    References:
        Survey section 4.1.1 (3); Chung, Ahn, Bengio, HM-RNN, ICLR 2017.
    """

    def __init__(self, below: int, hidden: int, above: int, *, bias: float = 0.0) -> None:
        super().__init__()
        self.hidden = hidden
        self.linear = nn.Linear(below + hidden + above, 4 * hidden + 1)
        self.gain = nn.Parameter(torch.ones(4, hidden))
        self.shift = nn.Parameter(torch.zeros(4, hidden))
        with torch.no_grad():
            self.shift[0] = 1.0  # the forget gate starts open
        nn.init.constant_(self.linear.bias, 0.0)
        nn.init.constant_(self.linear.bias[-1:], bias)

    def forward(
        self, below: Tensor, closed: Tensor, h: Tensor, c: Tensor, above: Tensor, ended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next output and memory, and the score of ending a segment here."""
        ended, closed = ended.unsqueeze(1), closed.unsqueeze(1)
        sums = self.linear(torch.cat([closed * below, h, ended * above], 1))
        normed = F.layer_norm(sums[:, :-1].unflatten(1, (4, -1)), (self.hidden,))
        gates = torch.addcmul(self.shift, normed, self.gain)
        f, i, o = gates[:, :3].sigmoid().unbind(1)
        c = (1 - ended) * f * c + i * gates[:, 3].tanh()
        return o * c.tanh(), c, sums[:, -1:]


class Hierarchy(Executor):
    r"""Levels one above the other, over a sequence; each level but the top decides at every step it runs whether a segment ends.

    With :math:`z^l_t` the decision of level :math:`l`, 0 where it doesn't run, and :math:`z^0_t = 1`, level :math:`l` at step
    :math:`t` does, by :math:`(z^l_{t-1}, z^{l-1}_t)`:

    .. math:: (0, 0): \text{copy its state, at no cost}; \quad (0, 1): \text{update}; \quad (1, \cdot): \text{flush, and begin anew}

    So a level runs where :math:`r = z^l_{t-1} + z^{l-1}_t - z^l_{t-1} z^{l-1}_t` is 1, and its state is
    :math:`r\,s' + (1 - r)\,s`: through which, while training, a gradient reaches all decisions.

    Shape:
        ``x`` :math:`(R, T, I)`; returns the outputs of all levels side by side at every step, :math:`(R, T, \sum_l H_l)`;
        ``given`` :math:`(R, T, L - 1)`.

    Args:
        levels: bottom first, at least two :class:`Level` that fit each other.
        sites: one for each level but the top, made with ``shape=(1,)``; they read :math:`\tilde z`.

    Raises:
        PliantError: where sites don't fit the levels.

    >>> import pliant
    >>> sites = [Site(nn.Identity(), pliant.rules.Never(), shape=(1,))]
    >>> y = Hierarchy([Level(3, 4, 2), Level(4, 2, 0)], sites).eval()(torch.randn(1, 5, 3))
    >>> y.shape, y[0, :, 4:].any().item()
    (torch.Size([1, 5, 6]), False)

    References:
        Survey section 4.1.1 (3); Chung, Ahn, Bengio, HM-RNN, ICLR 2017.

    Differs from the paper: a level that copies has ended nothing; there, its end is scored anew from the copied state. The
    expected cost takes the decisions of a step as independent, which is exact for up to three levels.
    """

    def __init__(self, levels: Sequence[nn.Module], sites: Sequence[Site]) -> None:
        super().__init__()
        if len(levels) < 2 or len(sites) != len(levels) - 1 or any(site.shape != (1,) for site in sites):
            raise PliantError(
                got=f"{len(levels)} levels and sites of shapes {[site.shape for site in sites]}",
                expected="L levels, at least two, and L - 1 sites of shape (1,)",
                do="give every level but the top a Site(..., shape=(1,))",
            )
        self.levels = nn.ModuleList(levels)
        self.sites = nn.ModuleList(sites)

    def plain(self, x: Tensor) -> Tensor:
        """Every level ends a segment at every step."""
        return self._run(x, None, None)

    def masked(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Every level for every row, at every step."""
        return self._run(x, given, self._masked)

    def gathered(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """A level for the rows that don't copy it."""
        if not torch.compiler.is_compiling() and x.shape[0] == 1 and given is None and tape.tape() is None:
            thresholds = [compares(site, x) for site in self.sites]  # pyright: ignore[reportArgumentType]
            if None not in thresholds:
                return self._alone(x, thresholds)  # pyright: ignore[reportArgumentType]
        return self._run(x, given, self._gathered)

    def _alone(self, x: Tensor, thresholds: list[float]) -> Tensor:
        """One row that nobody records: whether a level runs is a plain ``if``, and the numbers are the same."""
        on, top = (x.new_zeros(1), x.new_ones(1)), len(self.sites)
        h = [x.new_zeros(1, level.hidden) for level in self.levels]  # pyright: ignore[reportArgumentType, reportCallIssue]
        c, ended, outputs, none = list(h), [False] * (top + 1), [], x.new_zeros(1, 0)
        for t in range(x.shape[1]):
            below, closed = x[:, t], True
            for n, level in enumerate(self.levels):
                if closed or ended[n]:
                    above = h[n + 1] if n < top else none
                    h[n], c[n], score = level(below, on[closed], h[n], c[n], above, on[ended[n]])
                    ended[n] = n < top and not self.sites[n].scorer(score).item() <= thresholds[n]  # pyright: ignore[reportCallIssue]
                below, closed = h[n], ended[n]
            outputs.append(torch.cat(h, 1))
        return torch.stack(outputs, 1)

    def _run(self, x: Tensor, given: Tensor | None, upper: _Upper | None) -> Tensor:
        one, top = x.new_ones(x.shape[0]), len(self.sites)
        h = [x.new_zeros(x.shape[0], level.hidden) for level in self.levels]  # pyright: ignore[reportArgumentType, reportCallIssue]
        c, ended, wanted = list(h), [one - 1] * (top + 1), [one - 1] * (top + 1)
        outputs: list[Tensor] = []
        for t in range(x.shape[1]):
            below, closed, chance = x[:, t], one, one
            for n in range(top + 1):
                above = h[n + 1] if n < top else below.new_zeros(x.shape[0], 0)
                plan = None if given is None or n == top else given[:, t, n : n + 1]
                state = (below, closed, h[n], c[n], above, ended[n], plan)
                chance = chance + wanted[n] - chance * wanted[n]
                if upper is None or n == 0:
                    found = self._level(n, t, state, upper is None)
                else:
                    found = upper(n, t, state, chance)
                h[n], c[n], ended[n], soft = found
                below, closed, chance = h[n], ended[n], chance * soft
                wanted[n] = chance
            outputs.append(torch.cat(h, 1))
        return torch.stack(outputs, 1)

    def _level(self, n: int, t: int, state: tuple[Any, ...], dense: bool = False) -> _Found:
        """Level ``n`` for every row of ``state``: output, memory, whether a segment ends, and how likely it is to."""
        below, closed, h, c, above, ended, plan = state
        runs = _runs(state)
        new_h, new_c, score = self.levels[n](below, closed, h, c, above, ended)
        if n == len(self.sites):
            value = soft = torch.zeros_like(runs)
        elif dense:
            value = soft = torch.ones_like(runs)
        else:
            decision: Decision = self.sites[n](score, given=plan, visit=t)
            value, soft = decision.value[:, 0], (decision.value if decision.soft is None else decision.soft)[:, 0]
        return _blend(runs, new_h, h), _blend(runs, new_c, c), runs * value, soft

    def _masked(self, n: int, t: int, state: tuple[Any, ...], chance: Tensor) -> _Found:
        runs = _runs(state)
        with tape.part(self.sites[n - 1], t, "0"):  # copying costs nothing, and is noted all the same
            pass
        with tape.part(self.sites[n - 1], t, "1", reached=~(runs <= 0), wanted=chance):
            return self._level(n, t, state)

    def _gathered(self, n: int, t: int, state: tuple[Any, ...], chance: Tensor) -> _Found:
        below: Site = self.sites[n - 1]  # pyright: ignore[reportAssignmentType]
        chosen = ~(_runs(state) <= 0)
        here = Decision(chosen, visit=t)

        def level(*s: Any) -> _Found:
            return self._level(n, t, s)

        if torch.compiler.is_exporting():  # the shorter program: copies aren't selected, but written over
            return rows.run_some(below, here, level, state, rows.replaced, lambda: _copy(*state))
        runs = (lambda s: _copy(*s), lambda s: level(*s))
        found = rows.run_each(below, here, (~chosen, chosen), runs, state, wanted=(1 - chance, chance))
        if tape.tape() is not None and n < len(self.sites) and not chosen.any():
            nobody, plan = chosen.nonzero().squeeze(1), state[-1]
            with tape.part(below, t, "1", index=nobody):  # visits are counted: nobody's is one too
                self.sites[n](chance.new_zeros(0, 1), given=None if plan is None else plan[:0], visit=t)
        return found


_Found = tuple[Tensor, Tensor, Tensor, Tensor]
_Upper = Callable[[int, int, tuple[Any, ...], Tensor], _Found]


def _runs(state: tuple[Any, ...]) -> Tensor:
    """Whether, or how much, a level runs: where the one below closed a segment, or its own ended."""
    closed, ended = state[1], state[5]
    return closed + ended - closed * ended


def _blend(share: Tensor, on: Tensor, off: Tensor) -> Tensor:
    return torch.lerp(off, on, share.unsqueeze(1))


def _copy(below: Tensor, closed: Tensor, h: Tensor, c: Tensor, *_: Any) -> _Found:
    zero = torch.zeros_like(closed)
    return h, c, zero, zero
