"""Gumbel: sample a hard choice, pass the gradient of the relaxed one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.estimators.base import Estimator


class Gumbel(Estimator):
    r"""Binary Gumbel-softmax, straight-through, while training; the rule itself otherwise.

    With :math:`g = \log E_1 - \log E_0` logistic noise (:math:`E_i` exponential draws) and :math:`l = s - t`:

    .. math:: h = 1[l + g > 0], \qquad \tilde v = \sigma((l + g) / \tau), \qquad v = h + \tilde v - \mathrm{sg}(\tilde v)

    ``soft`` is :math:`\sigma(l)`, the probability of spending, so that an expected cost is the mean of realised ones.

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
        Survey section 5.2.2 (2); Jang, Gu, Poole, ICLR 2017; Maddison, Mnih, Teh, ICLR 2017 (the binary form used here).
    """

    temperature: Tensor

    def __init__(self, rule: Rule, *, temperature: float = 1.0) -> None:
        super().__init__(rule)
        if not temperature > 0:
            raise PliantError(got=f"temperature {temperature}", expected="a positive number", do="pass e.g. 1.0")
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, scores: Tensor) -> Outcome:
        """Sampled while training, the rule's own value otherwise."""
        if self.training:
            return self.sample(scores)
        return Outcome(self.rule(scores).value, soft=torch.sigmoid(scores - self.rule.threshold))

    def sample(self, scores: Tensor) -> Outcome:
        """A hard sample with the relaxed gradient; drawn in float32 at least, so that no noise is infinite."""
        logit = scores - self.rule.threshold
        wide = torch.promote_types(logit.dtype, torch.float32)
        draws = torch.empty((2, *logit.shape), dtype=wide, device=logit.device).exponential_()
        noise = draws.clamp_min(torch.finfo(wide).tiny).log()
        noisy = logit.to(wide) + noise[0] - noise[1]
        hard = (~(noisy <= 0)).to(wide)
        relaxed = torch.sigmoid(noisy / self.temperature)
        # A NaN score spends: its value stays 1.
        value = (hard + (relaxed - relaxed.detach()).nan_to_num()).to(scores.dtype)
        signed = torch.where(hard > 0, logit, -logit)
        return Outcome(value, soft=torch.sigmoid(logit), log_prob=F.logsigmoid(signed))


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
