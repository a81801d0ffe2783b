"""Planned: a policy decides all sites of a backbone before it starts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site


class Planned(Executor):
    r"""A site looks at the input once and decides everything: :math:`y = \mathrm{chain}(\mathrm{stem}(x), \text{given} = \pi(x))`.

    The plan is an ordinary decision, recorded with its log-probability; the backbone's own sites are given their columns
    of it and ask no scorer. Gathered, each block runs on the rows that planned it.

    Shape:
        ``x``: :math:`(R, ...)`, seen by policy and stem; the plan is :math:`(R, K)`, one column for each planned site;
        ``given``: a plan to take in place of the policy's.

    Args:
        site: decides from the raw input: a :class:`pliant.scores.Policy` with a rule, made with ``shape=(K,)``.
        chain: takes ``(features, given=plan)``: a :class:`Chain` of gated blocks, or :class:`Exits`.
        stem: what runs before the chain; default, nothing.
        head: what runs after it; default, nothing.

    Raises:
        PliantError: where a plan isn't a matrix, or is of weights from a soft rule: blocks are run or not.

    >>> import torch, pliant
    >>> from pliant.execute import Chain, Residual
    >>> def block():
    ...     return Residual(nn.Identity(), pliant.Site(nn.Identity(), pliant.rules.Always()))
    >>> site = pliant.Site(nn.Identity(), pliant.rules.Threshold(0.5), shape=(2,))
    >>> net = Planned(site, Chain([block(), block()])).eval()
    >>> net(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([[4., 4.],
            [2., 0.]])

    References:
        Survey sections 2.1.1 (2c) and 5.1.2; Wu et al., BlockDrop, CVPR 2018.
    """

    plans = True

    def __init__(
        self, site: Site, chain: nn.Module, *, stem: nn.Module | None = None, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.site = site
        self.stem = nn.Identity() if stem is None else stem
        self.chain = chain
        self.head = nn.Identity() if head is None else head

    def plain(self, x: Any) -> Any:
        """The backbone, its own executors in their plain form."""
        return self.head(self.chain(self.stem(x)))

    def masked(self, x: Any, given: Tensor | None = None) -> Any:
        """The same as gathered: how blocks run is theirs to say."""
        return self.gathered(x, given=given)

    def gathered(self, x: Any, given: Tensor | None = None) -> Any:
        """Plan, then run the backbone by the plan."""
        decision = self.site(x, given=given)
        plan = decision.value
        if plan.ndim != 2:
            raise PliantError(
                got=f"a plan of shape {tuple(plan.shape)}",
                expected="(rows, sites)",
                do="score all planned sites (pliant.scores.Policy), and make the site with shape=(sites,)",
            )
        if decision.is_weight:
            raise PliantError(
                got="a plan of weights, from a soft rule",
                expected="values 0 and 1",
                do="use a Threshold, or an estimator around one, as the policy's rule",
            )
        # With the soft plan, the blocks' expected cost moves the policy; its log-probability stands on its own site alone.
        return self.head(
            self.chain(self.stem(x), given=plan if decision.soft is None else Outcome(plan, decision.soft))
        )
