"""Score function: sample without a gradient; a loss weighs the log-probability of what was drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.site import Outcome, Rule
from pliant.estimators.base import Estimator, exponential, largest, share, uniform, wide


class ScoreFunction(Estimator):
    r"""Bernoulli samples with their log-probabilities while training; the rule itself otherwise.

    With :math:`p = \sigma(s - t)` and the exploration floor :math:`\alpha`:

    .. math:: p' = \alpha p + (1 - \alpha)(1 - p), \qquad h \sim \mathrm{Bernoulli}(p'), \qquad \nabla E[L] =
        E[(L - b)\,\nabla \log p'(h)]

    The value has no gradient, so training runs only what was chosen if the form is gathered. ``soft`` is :math:`p'`, from
    which an expected cost has its exact gradient.

    Shape:
        scores :math:`(R, ...)`; value and ``log_prob`` have the same shape.

    Args:
        rule: a threshold rule on logits.
        floor: :math:`\alpha` in [0.5, 1], a buffer: while sampling, no probability is further than that from 1/2. 1 is none,
            BlockDrop has 0.8.

    Raises:
        PliantError: where the floor is outside [0.5, 1].

    >>> import pliant
    >>> out = ScoreFunction(pliant.rules.Threshold(0.0), floor=0.8)(torch.tensor([100.0, -100.0]))
    >>> out.soft
    tensor([0.8000, 0.2000])

    References:
        Survey section 5.2.2 (3); Mnih et al., NeurIPS 2014; Wu et al., BlockDrop, CVPR 2018 (the floor).
    """

    floor: Tensor

    def __init__(self, rule: Rule, *, floor: float = 1.0) -> None:
        super().__init__(rule)
        self.register_buffer("floor", share(floor, "floor", 0.5))

    def forward(self, scores: Tensor) -> Outcome:
        """A sample while training."""
        logit = self.logit(scores)
        if not self.training:
            return Outcome(self.rule(scores).value, soft=torch.sigmoid(logit).to(scores.dtype))
        p = torch.sigmoid(logit)
        soft = self.floor * p + (1 - self.floor) * (1 - p)
        hard = (~(uniform(logit) >= soft.detach())).to(scores.dtype)
        signed = torch.where(hard > 0, logit, -logit)
        # In logarithms, since a probability rounds to 0 or 1 long before its logarithm stops mattering.
        floor = self.floor.to(logit.dtype)
        log_prob = torch.logaddexp(floor.log() + F.logsigmoid(signed), (1 - floor).log() + F.logsigmoid(-signed))
        return Outcome(hard, soft=soft.to(scores.dtype), log_prob=log_prob)


class Categorical(Rule):
    r"""One of :math:`K`, drawn with its log-probability while training; the largest score otherwise.

    .. math:: v \sim \mathrm{Categorical}(\mathrm{softmax}(s)), \qquad \log \pi = \log \mathrm{softmax}(s)_v

    The value has no gradient. For choices on which no cost hangs, such as how far to jump: tuning leaves it alone.

    Shape:
        scores :math:`(R, ..., K)`; the value is one-hot of the same shape, ``log_prob`` is :math:`(R, ...)`.

    Raises:
        PliantError: where the scores have no dimension of alternatives.

    >>> _ = torch.manual_seed(0)
    >>> out = Categorical()(torch.tensor([[0.5, 0.2, 0.3]]).log().expand(10_000, 3))
    >>> out.value.mean(0).round(decimals=1), Categorical().eval()(torch.tensor([[0.0, 2.0]])).value
    (tensor([0.5000, 0.2000, 0.3000]), tensor([[0., 1.]]))

    References:
        Survey section 5.2.2 (3); Yu, Lee, Le, Learning to Skim Text, ACL 2017.
    """

    spends = False

    def forward(self, scores: Tensor) -> Outcome:
        """A sample while training; a NaN score is drawn for sure, so its log-probability says so."""
        if not self.training:
            return Outcome(largest(scores), soft=scores.softmax(-1))
        logits = scores.to(wide(scores))
        hard = largest(logits.detach() - exponential(scores.shape, scores))
        log_prob = torch.where(hard > 0, logits.log_softmax(-1), 0.0).sum(-1)
        return Outcome(hard.to(scores.dtype), soft=scores.softmax(-1), log_prob=log_prob)


class EpsilonGreedy(Estimator):
    r"""For a binary advantage :math:`s = Q(1) - Q(0)`: the rule's value, but a fair coin with probability :math:`\epsilon`.

    Only while training; the value has no gradient.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        rule: a threshold rule; 0 compares the two values.
        epsilon: :math:`\epsilon` in [0, 1], a buffer that may be annealed.

    Raises:
        PliantError: where epsilon is outside [0, 1].

    >>> import pliant
    >>> _ = torch.manual_seed(0)
    >>> EpsilonGreedy(pliant.rules.Threshold(0.0), epsilon=0.2)(torch.ones(10_000)).value.mean().round(decimals=2)
    tensor(0.9000)

    References:
        Survey section 5.2.2 (3); Lin et al., Runtime Neural Pruning, NeurIPS 2017.
    """

    value_based = True
    epsilon: Tensor

    def __init__(self, rule: Rule, *, epsilon: float = 0.1) -> None:
        super().__init__(rule)
        self.register_buffer("epsilon", share(epsilon, "epsilon"))

    def forward(self, scores: Tensor) -> Outcome:
        """Explores while training."""
        hard = self.rule(scores).value
        if not self.training:
            return Outcome(hard)
        explore = (uniform(scores) < self.epsilon) & ~scores.isnan()
        return Outcome(torch.where(explore, (uniform(scores) < 0.5).to(hard.dtype), hard).detach())


class EpsilonGreedyOneHot(Rule):
    r"""For values :math:`Q` of :math:`K` actions: one-hot of the largest, but any action with probability :math:`\epsilon`.

    Only while training; the value has no gradient. A loss reads :math:`Q` of the action taken as the sum of scores times value.

    Shape:
        scores :math:`(R, ..., K)`; the value has the same shape.

    Args:
        epsilon: :math:`\epsilon` in [0, 1], a buffer that may be annealed.

    Raises:
        PliantError: where epsilon is outside [0, 1] or the scores have no dimension of actions.

    >>> choice = EpsilonGreedyOneHot(epsilon=0.1)
    >>> choice.eval()(torch.tensor([[0.0, 2.0, 1.0]])).value
    tensor([[0., 1., 0.]])

    References:
        Survey section 5.2.2 (3); Lin et al., Runtime Neural Pruning, NeurIPS 2017.
    """

    value_based = True
    epsilon: Tensor

    def __init__(self, *, epsilon: float = 0.1) -> None:
        super().__init__()
        self.register_buffer("epsilon", share(epsilon, "epsilon"))

    def forward(self, scores: Tensor) -> Outcome:
        """Explores while training."""
        hard = largest(scores)
        if not self.training:
            return Outcome(hard)
        explore = torch.rand(scores.shape[:-1], dtype=wide(scores), device=scores.device) < self.epsilon
        explore = explore & ~scores.isnan().any(-1)
        return Outcome(torch.where(explore[..., None], largest(uniform(scores)).to(hard.dtype), hard))
