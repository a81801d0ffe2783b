"""Gumbel: sample a choice among two (binary concrete) or k, pass the gradient of the relaxed one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.site import Outcome, Rule
from pliant.estimators.base import Estimator, exponential, largest, positive, straight_through, wide


class Gumbel(Estimator):
    r"""Binary concrete, straight-through, while training; the rule itself otherwise.

    With :math:`g = \log E_1 - \log E_0` logistic noise (:math:`E_i` exponential draws) and :math:`l = s - t`:

    .. math:: h = 1[l + g > 0], \qquad \tilde v = \sigma((l + g) / \tau), \qquad v = h + \tilde v - \mathrm{sg}(\tilde v)

    ``soft`` is :math:`\sigma(l)`, the probability of spending, so that an expected cost is the mean of realised ones. This is
    Gumbel-softmax with two alternatives in its cheaper form, and :class:`BinaryConcrete` is another name for it.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        rule: a threshold rule on logits.
        temperature: :math:`\tau > 0`, a buffer that may be annealed.

    Raises:
        PliantError: where the temperature isn't positive.

    >>> import pliant
    >>> gumbel = Gumbel(pliant.rules.Threshold(0.0)).eval()
    >>> gumbel(torch.tensor([2.0, -2.0])).value
    tensor([1., 0.])

    References:
        Survey section 5.2.2 (2); Jang, Gu, Poole, ICLR 2017; Maddison, Mnih, Teh, ICLR 2017 (the binary form used here, with
        temperature 2/3; 1 is the default here, as in ConvNet-AIG and DynConv).
    """

    temperature: Tensor

    def __init__(self, rule: Rule, *, temperature: float = 1.0) -> None:
        super().__init__(rule)
        self.register_buffer("temperature", positive(temperature, "temperature"))

    def forward(self, scores: Tensor) -> Outcome:
        """Sampled while training, the rule's own value otherwise."""
        if self.training:
            return self.sample(scores)
        return Outcome(self.rule(scores).value, soft=torch.sigmoid(scores - self.rule.threshold))

    def sample(self, scores: Tensor) -> Outcome:
        """A hard sample with the relaxed gradient; drawn in float32 at least, so that no noise is infinite."""
        logit = self.logit(scores)
        noisy = self.noisy(logit)
        hard = (~(noisy <= 0)).to(logit.dtype)
        value = straight_through(hard, torch.sigmoid(noisy / self.temperature)).to(scores.dtype)
        log_prob = F.logsigmoid(torch.where(hard > 0, logit, -logit))
        return Outcome(value, soft=torch.sigmoid(logit).to(scores.dtype), log_prob=log_prob)

    @staticmethod
    def noisy(logit: Tensor) -> Tensor:
        """The logit plus logistic noise."""
        one, other = exponential((2, *logit.shape), logit)
        return logit + one - other


class GumbelSample(Gumbel):
    """Samples in evaluation too, as ConvNet-AIG's released code does.

    >>> import pliant
    >>> _ = torch.manual_seed(0)
    >>> GumbelSample(pliant.rules.Threshold(0.0)).eval()(torch.zeros(1000)).value.mean().round(decimals=1)
    tensor(0.5000)
    """

    def forward(self, scores: Tensor) -> Outcome:
        """Always a sample."""
        return self.sample(scores)


BinaryConcrete = Gumbel


class GumbelSoftmax(Rule):
    r"""A relaxed one-hot choice among :math:`K` while training, the largest score otherwise.

    .. math:: y = \mathrm{softmax}((s + g) / \tau), \qquad g_k = -\log E_k

    with :math:`E_k` exponential draws in float32 at least, so that no noise is infinite. The value is a weight in (0, 1), so
    every alternative runs; ``soft`` is :math:`\mathrm{softmax}(s)`. Evaluation takes the largest score and draws nothing; a
    NaN score is the largest.

    Shape:
        scores :math:`(R, ..., K)`; the value has the same shape and sums to 1 over the last dimension.

    Args:
        temperature: :math:`\tau > 0`, a buffer that may be annealed.

    Raises:
        PliantError: where the temperature isn't positive or the scores have no dimension of alternatives.

    >>> choice = GumbelSoftmax(temperature=0.5)
    >>> y = choice(torch.zeros(4, 3)).value
    >>> torch.allclose(y.sum(-1), torch.ones(4)), choice.eval()(torch.tensor([[0.0, 2.0, 1.0]])).value
    (True, tensor([[0., 1., 0.]]))

    References:
        Survey section 5.2.2 (2); Jang, Gu, Poole, ICLR 2017.
    """

    temperature: Tensor

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("temperature", positive(temperature, "temperature"))

    def forward(self, scores: Tensor) -> Outcome:
        """Sampled while training, the largest otherwise."""
        hard = largest(scores)
        if self.training:
            return self.sample(scores)
        return Outcome(hard, soft=scores.softmax(-1))

    def sample(self, scores: Tensor) -> Outcome:
        """A relaxed sample; a row with a NaN score takes one alternative whole."""
        noisy, relaxed = self.relaxed(scores)
        value = torch.where(noisy.isnan().any(-1, keepdim=True), largest(noisy), relaxed).to(scores.dtype)
        return Outcome(value, soft=scores.softmax(-1), weight=True)

    def relaxed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The scores with noise, and their softmax."""
        noisy = scores.to(wide(scores)) - exponential(scores.shape, scores)
        return noisy, (noisy / self.temperature).softmax(-1)


class GumbelOneHot(GumbelSoftmax):
    r"""Straight-through Gumbel-softmax: forward the one-hot of the largest :math:`s + g`, backward the relaxed sample.

    One-hot samples have the probabilities :math:`\mathrm{softmax}(s)`; ``log_prob`` is that of the alternative drawn.

    Shape:
        scores :math:`(R, ..., K)`; the value has the same shape, ``log_prob`` is :math:`(R, ...)`.

    Args:
        temperature: :math:`\tau > 0`, a buffer that may be annealed.

    Raises:
        PliantError: where the temperature isn't positive or the scores have no dimension of alternatives.

    >>> _ = torch.manual_seed(0)
    >>> out = GumbelOneHot()(torch.tensor([[0.5, 0.2, 0.3]]).log().expand(10_000, 3))
    >>> out.value.mean(0).round(decimals=1), out.log_prob[0].exp()
    (tensor([0.5000, 0.2000, 0.3000]), tensor(0.3000))

    References:
        Survey section 5.2.2 (2); Jang, Gu, Poole, ICLR 2017 (there ST Gumbel-softmax).
    """

    def sample(self, scores: Tensor) -> Outcome:
        """A hard sample with the relaxed gradient."""
        noisy, relaxed = self.relaxed(scores)
        hard = largest(noisy)
        log_prob = (hard * scores.to(hard.dtype).log_softmax(-1)).sum(-1)
        return Outcome(straight_through(hard, relaxed).to(scores.dtype), soft=scores.softmax(-1), log_prob=log_prob)


def concrete_log_density(log_weights: Tensor, scores: Tensor, temperature: Tensor | float) -> Tensor:
    r"""Log-density of a relaxed choice, for KL terms, with :math:`\ell_k = \log y_k`.

    .. math::
        \log p(y) = \log (K - 1)! + (K - 1) \log \tau + \sum_k (s_k - (\tau + 1)\,\ell_k)
        - K \log \sum_k \exp(s_k - \tau\,\ell_k)

    Shape:
        ``log_weights``, ``scores``: :math:`(R, ..., K)`; returns :math:`(R, ...)`.

    Args:
        log_weights: :math:`\log y`; take ``log_softmax`` rather than the logarithm of a weight that may round to 0.
        scores: logits.
        temperature: :math:`\tau`.

    Returns:
        The log-density with respect to :math:`y_1, \dots, y_{K-1}`.

    >>> concrete_log_density(torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2), 1.0)
    tensor([0.])

    References:
        Survey section 5.2.2 (2); Maddison, Mnih, Teh, ICLR 2017.
    """
    count = scores.shape[-1]
    tau = torch.as_tensor(temperature, dtype=scores.dtype, device=scores.device)
    head = math.lgamma(count) + (count - 1) * tau.log()
    return head + (scores - (tau + 1) * log_weights).sum(-1) - count * (scores - tau * log_weights).logsumexp(-1)
