"""Experts: networks side by side of which every token runs a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute import rows
from pliant.functional.dispatch import combine, dispatch


class Experts(Executor):
    r"""A mixture of experts: :math:`y_t = \sum_{e:\,v_{te} \ne 0} v_{te}\, f_e(x_t)`.

    Masked, every expert runs on every token and is multiplied by its gate. Gathered, tokens are sorted by expert, each expert runs once
    on those that chose it, and the answers are scaled and added up in the order of the tokens. A token that no expert took
    has the answer 0, so put a shortcut around. Nothing in an answer hangs on the other rows of a batch.

    Shape:
        ``x``: :math:`(R, T, D)`, or :math:`(R, D)`; experts map :math:`(N, D)` to :math:`(N, D)`. ``given``: gates
        :math:`(R, T, E)` or :math:`(R, E)`.

    Args:
        experts: at least one, all of one cost.
        site: decides all gates from ``x``, made with ``shape=(E,)``.

    Raises:
        PliantError: where the site's shape isn't the number of experts.

    >>> import pliant
    >>> site = Site(nn.Identity(), pliant.rules.TopKSoftmax(1), shape=(2,))
    >>> mixture = Experts([nn.Identity(), nn.ReLU()], site).eval()
    >>> mixture(torch.tensor([[[-1.0, -2.0], [-2.0, -1.0]]]))
    tensor([[[-1., -2.],
             [ 0.,  0.]]])

    References:
        Survey section 2.1.2 (2), Fig. 5 (b); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.

    Differs from the paper: capacity, where a rule has one, is of each row, so that a text's answer doesn't hang on its batch.
    """

    def __init__(self, experts: Sequence[nn.Module], site: Site) -> None:
        super().__init__()
        if site.shape != (len(experts),) or not experts:
            raise PliantError(
                got=f"{len(experts)} experts and a site of shape {site.shape}", expected="shape (E,), E at least 1",
                do="give the site a gate for each expert: Site(..., shape=(E,))",
            )  # fmt: skip
        self.experts = nn.ModuleList(experts)
        self.site = site

    def plain(self, x: Tensor) -> Tensor:
        """The sum of all experts."""
        flat = x.flatten(0, -2)
        total = self.experts[0](flat)
        for expert in list(self.experts)[1:]:
            total = total + expert(flat)
        return total.reshape(*x.shape[:-1], total.shape[-1])

    def masked(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """Every expert for every token, times its gate."""
        decision, gates = self._decide(x, given)
        flat, answers = x.flatten(0, -2), list[Tensor]()
        for e, expert in enumerate(self.experts):
            gate = gates[:, e, None]
            with self._part(decision, e, x, None):
                y = expert(flat)
            answers.append(torch.where(gate == 0, torch.zeros_like(y), y * gate))
        total = torch.stack(answers).sum(0)
        return total.reshape(*x.shape[:-1], total.shape[-1])

    def gathered(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """Each expert for its tokens."""
        decision, gates = self._decide(x, given)
        flat = x.flatten(0, -2)
        if torch.compiler.is_exporting():
            y = self._exported(decision, gates, x)
        else:
            taken = (
                None
                if tape.tape() is None
                else (decision.value != 0).reshape(x.shape[0], _tokens(x), gates.shape[1]).sum(1)
            )
            run = [partial(self._run, decision, e, x, taken) for e in range(len(self.experts))]
            y = combine(flat, dispatch(gates), run)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _decide(self, x: Tensor, given: Any) -> tuple[Decision, Tensor]:
        """The decision, and its gates token by token."""
        decision = self.site(x, given=given, shape=(*x.shape[1:-1], len(self.experts)))
        return decision, decision.value.flatten(0, -2)

    def _run(self, decision: Decision, e: int, x: Tensor, taken: Tensor | None, tokens: Tensor) -> Tensor:
        with self._part(decision, e, x, None if taken is None else taken[:, e]):
            return self.experts[e](tokens)

    def _part(self, decision: Decision, e: int, x: Tensor, units: Tensor | None) -> Any:
        """Expert ``e`` runs, on as many tokens of each row; wanted are those that chose it."""
        soft = decision.value if decision.soft is None else decision.soft
        wanted = (soft != 0).to(soft.dtype) if decision.is_weight else soft  # a gate other than 0 runs the whole expert
        each = wanted[..., e].reshape(x.shape[0], _tokens(x)).sum(1)
        return tape.part(self.site, decision.visit, f"1/{e}", units=units, wanted=each, of=_tokens(x))

    def _exported(self, decision: Decision, gates: Tensor, x: Tensor) -> Tensor:
        """The same without a Python branch."""
        flat, total = x.flatten(0, -2), torch.zeros(())
        for e, expert in enumerate(self.experts):
            index = gates[:, e].nonzero().squeeze(1)
            kept, _ = rows.never_empty(index, flat.shape[0])
            y = expert(flat.index_select(0, kept)).narrow(0, 0, index.shape[0])
            total = total if e else flat.new_zeros(flat.shape[0], y.shape[1])
            total = total.index_add(0, index, y * gates[:, e].index_select(0, index)[:, None])
        return total


def _tokens(x: Tensor) -> int:
    """How many tokens a row has."""
    return math.prod(x.shape[1:-1])
