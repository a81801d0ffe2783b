"""Levels: forms of one block in the order of their cost, of which each row runs one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute import rows
from pliant.execute.skip import closed, opened
from pliant.functional.levels import level, level_weights


class Levels(Executor):
    r"""Forms of a block in the order of their cost; a row goes on from each to the next where the value is 1.

    .. math:: y = \sum_{k=0}^{K} w_k(v)\, f_k(x), \qquad w_k(v) = (1 - v_{k+1}) \prod_{j \le k} v_j

    So a decision is :math:`K` values, of which those behind the first 0 don't matter: all ones is the costliest form, no
    one the cheapest, and a higher threshold never costs more. Independent draws of the steps are one draw of a level.
    Gathered, the rows are sorted by their level and each form runs once, on its own. For alternatives that aren't ordered,
    or of which several may run at once, see :class:`pliant.execute.Routes`.

    Shape:
        ``x``: :math:`(R, ...)`; all forms return the same shape. ``given``: :math:`(R, K)`.

    Args:
        forms: cheapest first, at least two; None passes ``x`` itself.
        site: decides from ``x``, made with ``shape=(K,)``.

    Raises:
        PliantError: where there are fewer than two forms, or the site doesn't decide all steps between them.

    >>> import pliant
    >>> site = Site(nn.Identity(), pliant.rules.Threshold(0.5), shape=(2,))
    >>> block = Levels([None, nn.ReLU(), nn.Tanh()], site).eval()
    >>> block(torch.tensor([[0.0, -9.0], [-9.0, 9.0], [9.0, -9.0], [9.0, 9.0]])).round()
    tensor([[ 0., -9.],
            [-9.,  9.],
            [ 9.,  0.],
            [ 1.,  1.]])

    References:
        Survey section 2.1.1 (2b); Shen et al., Fractional Skipping, AAAI 2020.

    Differs from the paper: its gate is a softmax over the forms whose largest wins; here the same choice is told as the
    steps that lead to it, so that one dial turns it like every other site.
    """

    def __init__(self, forms: Sequence[nn.Module | None], site: Site) -> None:
        super().__init__()
        if len(forms) < 2 or site.shape != (len(forms) - 1,):
            raise PliantError(
                got=f"{len(forms)} forms and a site of shape {site.shape}", expected="K + 1 forms and shape (K,), K at least 1",
                do="give the site a value for each step from one form to the next: Site(..., shape=(K,))",
            )  # fmt: skip
        self.forms = nn.ModuleList(nn.Identity() if form is None else form for form in forms)
        self.site = site

    def plain(self, x: Any) -> Any:
        """The costliest form alone."""
        features, carry = opened(x)
        return closed(x, self.forms[-1](features), carry)

    def masked(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """Every form for every row, summed by weight."""
        features, carry = opened(x)
        decision, weights, wanted = self._decide(features, given, carry)
        blend, y = rows.weighted(decision), None
        for k, form in enumerate(self.forms):
            weight = weights[:, k]
            with tape.part(self.site, decision.visit, str(k), reached=~(weight <= 0), wanted=wanted[:, k]):
                out = form(features)
            weight = rows.weigh(weight, out)
            if blend:
                y = weight * out if y is None else y + weight * out
            else:
                y = out if y is None else torch.where(weight > 0, out, y)
        return closed(x, y, decision.carry)

    def gathered(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """Each form for the rows that stop there; all of them where the values are weights."""
        features, carry = opened(x)
        decision, weights, wanted = self._decide(features, given, carry)
        if decision.is_weight:
            return self.masked(x, given=Outcome(decision.value, decision.soft, weight=True))
        chosen = [level(decision.value.detach()) == k for k in range(len(self.forms))]
        y = rows.run_each(self.site, decision, chosen, list(self.forms), features, wanted=list(wanted.unbind(1)))
        if decision.value.requires_grad:  # all are 1, but the gate learns what its own level was worth
            y = y * rows.weigh((weights * torch.stack(chosen, 1)).sum(1), y)
        return closed(x, y, decision.carry)

    def _decide(self, x: Tensor, given: Any, carry: Any) -> tuple[Decision, Tensor, Tensor]:
        """The decision, the weight of each form, and how much of each it wants by its soft value."""
        decision = self.site(x, given=given, carry=carry, shape=self.site.shape)
        weights = level_weights(decision.value)
        return decision, weights, weights if decision.soft is None else level_weights(decision.soft)
