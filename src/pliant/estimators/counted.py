"""Counted: losses of cost see whether a soft gate is open, not how far."""

from __future__ import annotations

from torch import Tensor

from pliant.core.site import Outcome, Rule
from pliant.estimators.base import straight_through


class Counted(Rule):
    r"""The weights of a soft rule, whose cost is that of what runs: :math:`\text{soft} = 1[v \ne 0] + v - \mathrm{sg}(v)`.

    A soft gate of 0.1 costs as much to run as one of 0.9, and in expectation a ninth: gates near zero meet an expected budget and save
    nothing. With this rule ``FlopsBudget`` and target rates miss by what would run, and pull at the weights.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape and is a weight.

    Args:
        rule: a soft rule, such as ``ReluTanh()``.

    >>> import pliant, torch
    >>> out = Counted(pliant.rules.ReluTanh())(torch.tensor([-1.0, 0.1, 3.0]))
    >>> out.value, out.soft
    (tensor([0.0000, 0.0997, 0.9951]), tensor([0., 1., 1.]))

    References:
        Survey sections 2.1.3 (3) and 5.2.1 (2); Li et al., Learning Dynamic Routing for Semantic Segmentation, CVPR 2020.

    Differs from the paper: its budget is on the weights themselves.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, scores: Tensor) -> Outcome:
        """The rule's weights, and whether each is open."""
        out = self.rule(scores)
        runs = (out.value != 0).to(out.value.dtype)
        return Outcome(out.value, soft=straight_through(runs, out.value), log_prob=out.log_prob, weight=True)
