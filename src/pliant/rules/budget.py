"""AtMost: no row spends more than so many FLOPs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.bind import sites
from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.core.trace import priced
from pliant.rules.threshold import Threshold


class AtMost(Rule):
    r"""A hard limit: every row's executed FLOPs are at most ``flops``, whatever its input.

    Bound to sites of a model, it prices them and, in the order in which they run, leaves each to the rule that it
    wraps as long as the costliest path through the open sites still fits:

    .. math:: v_l = a_l\, r_l(s_l), \qquad a_l = 1[\, \max_{v_{j}:\, a_{j} = 1,\, j \le l} c(v) \le \text{flops}\,]

    What doesn't fit saves, and its scorer isn't run. For exits that is the deepest stage that the budget pays for; between
    gates a row that saved early can't spend it later, the price of a limit that needs no account from site to site (a
    site that a loop visits several times is open or shut for all visits). The costs are those of inputs shaped like
    ``like``, in the gathered form; larger ones cost more. Soft weights aren't limited: a block and its alternative may
    both run. A NaN score spends only where the site is open.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        flops: the limit for one row, gates and scores included.
        like: an example input, or a tuple of a call's inputs, of any number of rows.
        rule: decides where the budget allows; default, the rule that was at the site before.

    Raises:
        PliantError: where ``flops`` isn't a number; bound without ``like``, or where a plan decides; where the cheapest path
            costs more (the message names the range); where it's called without having been bound.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> x = torch.zeros(2, 3, 32, 32)
    >>> dense = pliant.bind(model, {"*": pliant.rules.Always()})
    >>> budget = 0.7 * float(pliant.record(dense)(x)[1].flops[0])
    >>> _, trace = pliant.record(pliant.bind(dense, {"*": AtMost(budget, like=x)}))(x)
    >>> bool((trace.flops <= budget).all()), {site: trace.dense(site).tolist() for site in trace}
    (True, {'sites.0': [0.0, 0.0]})

    References:
        Survey sections 2.1.1 and 5.1 (anytime and budgeted prediction); Huang et al., MSDNet, ICLR 2018.
    """

    def __init__(self, flops: float, *, like: Any = None, rule: Rule | None = None) -> None:
        super().__init__()
        if isinstance(flops, bool) or not isinstance(flops, (int, float)) or math.isnan(flops):
            raise PliantError(got=f"flops={flops!r}", expected="a number", do="pass the FLOPs that one row may cost")
        self.flops = float(flops)
        self.like = like
        self.rule: Rule = Threshold(0.0) if rule is None else rule
        self.keeps = rule is None
        self.path = ""
        self.fits: bool | None = None

    def extra_repr(self) -> str:
        """The limit, and whether the site is open."""
        return f"flops={self.flops:g}, fits={self.fits}"

    def replaces(self, rule: Rule) -> None:
        """Wrap the rule that was here, unless another one was given."""
        if self.keeps:
            self.rule = rule.rule if isinstance(rule, AtMost) else rule
        self.reads_scores = self.rule.reads_scores
        self.fits = None

    def count(self, choices: int) -> int | None:
        """What the wrapped rule says, where the site is open."""
        return self.rule.count(choices) if self.fits else 0

    def attach(self, path: str) -> None:
        """Remember the site's path, and tell the wrapped rule."""
        self.path = path
        self.rule.attach(path)

    def settle(self, model: nn.Module) -> None:
        """Price the model and see which of the sites with this limit fit."""
        if self.like is None and self.fits is None:
            raise PliantError(
                got="a budget without an example input",
                expected="like=x, since FLOPs depend on the input's shape",
                do="bind pliant.rules.AtMost(flops, like=x)",
                site=self.path,
            )
        if self.fits is not None:  # another site of the same limit has settled all of them
            return
        if any(getattr(module, "plans", False) for module in model.modules()):
            raise PliantError(
                got="a budget for a model whose sites follow a plan",
                expected="sites that decide for themselves",
                do="limit the plan (pliant.rules.TopK), or bind the budget to the planned chain alone",
                site=self.path,
            )
        rules = {path: site.rule for path, site in sites(model).items()}
        same = {path: rule for path, rule in rules.items() if isinstance(rule, AtMost) and rule.flops == self.flops}
        for rule in same.values():
            rule.reads_scores = rule.rule.reads_scores
        call = self.like if isinstance(self.like, tuple) else (self.like,)
        fitting = priced(model, *call).within(self.flops, list(same))
        for path, rule in same.items():
            rule.fits, rule.like = path in fitting, None
            rule.reads_scores = rule.reads_scores and rule.fits

    def forward(self, scores: Tensor) -> Outcome:
        """The wrapped rule's outcome where it fits, zeros elsewhere."""
        if self.fits is None:
            raise PliantError(
                got="a budget that was never priced",
                expected="one bound to a model",
                do='use pliant.bind(model, {"*": pliant.rules.AtMost(flops, like=x)})',
                site=self.path or None,
            )
        return self.rule(scores) if self.fits else Outcome(torch.zeros_like(scores))
