"""Straight-through: a hard value forward, a surrogate's gradient backward."""

from __future__ import annotations

from torch import Tensor

from pliant.core.site import Outcome, Rule
from pliant.estimators.base import Estimator, straight_through, uniform
from pliant.estimators.surrogates import Sigmoid, Surrogate


class StraightThrough(Estimator):
    r"""Forward the rule's hard value, backward the gradient of a surrogate: :math:`v = h + f(s - t) - \mathrm{sg}(f(s - t))`.

    ``soft`` is the probability that goes with the surrogate, with the same gradient as the value: so a cost pulls as hard as
    the task does.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        rule: a threshold rule on logits.
        surrogate: :math:`f`; default, the sigmoid.

    Raises:
        PliantError: where ``rule`` isn't a threshold.

    >>> import pliant, torch
    >>> s = torch.tensor([1.0, -1.0], requires_grad=True)
    >>> out = StraightThrough(pliant.rules.Threshold(0.0))(s)
    >>> out.value.sum().backward()
    >>> out.value.detach(), s.grad
    (tensor([1., 0.]), tensor([0.1966, 0.1966]))

    References:
        Survey section 5.2.2 (1); Bengio, Leonard, Courville, 2013.
    """

    def __init__(self, rule: Rule, *, surrogate: Surrogate | None = None) -> None:
        super().__init__(rule)
        self.surrogate = Sigmoid() if surrogate is None else surrogate

    def forward(self, scores: Tensor) -> Outcome:
        """Hard value, soft gradient."""
        logit = self.logit(scores)
        hard = self.rule(scores).value
        soft = self._soft(logit).to(scores.dtype)
        if not self.training:
            return Outcome(hard, soft=soft)
        return Outcome(straight_through(hard, self.surrogate(logit).to(scores.dtype)), soft=soft)

    def _soft(self, logit: Tensor) -> Tensor:
        """The probability, with the surrogate's gradient."""
        return straight_through(self.surrogate.probability(logit).detach(), self.surrogate(logit))


class StochasticStraightThrough(StraightThrough):
    r"""Sampled while training, :math:`h = 1[u < p]` with :math:`u \sim U(0, 1)`; the rule itself in evaluation.

    The probability :math:`p` is the surrogate's: a hard sigmoid's own value, else :math:`\sigma(s - t)`.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        rule: a threshold rule on logits.
        surrogate: as in :class:`StraightThrough`.

    Raises:
        PliantError: where ``rule`` isn't a threshold.

    >>> import pliant, torch
    >>> _ = torch.manual_seed(0)
    >>> estimator = StochasticStraightThrough(pliant.rules.Threshold(0.0))
    >>> estimator(torch.zeros(1000)).value.mean().round(decimals=1), estimator.eval()(torch.ones(2)).value
    (tensor(0.5000), tensor([1., 1.]))

    References:
        Survey section 5.2.2 (1); Bengio, Leonard, Courville, 2013.
    """

    def forward(self, scores: Tensor) -> Outcome:
        """A sample while training."""
        if not self.training:
            return super().forward(scores)
        logit = self.logit(scores)
        probability = self.surrogate.probability(logit)
        hard = (~(uniform(logit) >= probability.detach())).to(scores.dtype)
        log_prob = self.surrogate.log_probability(logit, hard)
        value = straight_through(hard, self.surrogate(logit).to(scores.dtype))
        return Outcome(value, soft=self._soft(logit).to(scores.dtype), log_prob=log_prob)
