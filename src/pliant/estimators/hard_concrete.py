"""Relaxed gates: binary concrete weights, plain and stretched to exact zeros and ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.estimators.gumbel import Gumbel


class SoftBinaryConcrete(Gumbel):
    r"""Relaxed while training, :math:`v = \sigma((l + g) / \tau)` with logistic :math:`g`; the rule itself otherwise.

    The value is a weight in (0, 1), so both alternatives run while training; ``soft`` is :math:`\sigma(l)`.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape.

    Args:
        rule: a threshold rule on logits.
        temperature: :math:`\tau > 0`, a buffer that may be annealed.

    Raises:
        PliantError: where the temperature isn't positive.

    >>> import pliant
    >>> v = SoftBinaryConcrete(pliant.rules.Threshold(0.0))(torch.zeros(1000)).value
    >>> bool(((v > 0) & (v < 1)).all())
    True

    References:
        Survey section 5.2.2 (2); Maddison, Mnih, Teh, ICLR 2017.
    """

    def sample(self, scores: Tensor) -> Outcome:
        """A relaxed sample."""
        logit = self.logit(scores)
        value = torch.sigmoid(self.noisy(logit) / self.temperature)
        return Outcome(value.nan_to_num(1.0).to(scores.dtype), soft=torch.sigmoid(logit).to(scores.dtype), weight=True)


class HardConcrete(Gumbel):
    r"""Binary concrete, stretched and clipped while training, so that exact zeros occur; the rule itself otherwise.

    .. math::
        v = \max(0, \min(1, (b - a)\,\sigma((l + g) / \tau) + a)), \qquad
        \mathrm{soft} = P(v \ne 0) = \sigma(l - \tau \log(-a / b))

    A cost read from ``soft`` is so the expected number of gates that run (:math:`L_0`), in closed form.

    Shape:
        scores :math:`(R, ...)`; the value has the same shape, and is a weight in [0, 1] while training.

    Args:
        rule: a threshold rule on logits.
        temperature: :math:`\tau > 0`, a buffer that may be annealed.
        stretch: :math:`(a, b)` with :math:`a < 0` and :math:`b > 1`.

    Raises:
        PliantError: where the temperature isn't positive or the stretch doesn't contain [0, 1].

    >>> import pliant
    >>> out = HardConcrete(pliant.rules.Threshold(0.0))(torch.zeros(1000))
    >>> bool((out.value == 0).any()), bool((out.value == 1).any()), out.soft[0]
    (True, True, tensor(0.8318))

    References:
        Survey section 5.2.2 (2); Maddison, Mnih, Teh, ICLR 2017; Louizos, Welling, Kingma, ICLR 2018. In evaluation they
        multiply by the clipped mean; here the threshold decides, so that a gate in evaluation is 0 or 1.
    """

    def __init__(self, rule: Rule, *, temperature: float = 2 / 3, stretch: tuple[float, float] = (-0.1, 1.1)) -> None:
        super().__init__(rule, temperature=temperature)
        if not (stretch[0] < 0 and stretch[1] > 1 and all(map(math.isfinite, stretch))):
            raise PliantError(got=f"stretch {stretch}", expected="wider than [0, 1]", do="pass e.g. (-0.1, 1.1)")
        self.stretch = stretch

    def forward(self, scores: Tensor) -> Outcome:
        """Sampled while training, the rule's own value otherwise."""
        if self.training:
            return self.sample(scores)
        return Outcome(self.rule(scores).value, soft=self.expected_l0(self.logit(scores)).to(scores.dtype))

    def sample(self, scores: Tensor) -> Outcome:
        """A clipped sample."""
        low, high = self.stretch
        logit = self.logit(scores)
        stretched = (high - low) * torch.sigmoid(self.noisy(logit) / self.temperature) + low
        value = stretched.clamp(0, 1).nan_to_num(1.0).to(scores.dtype)
        return Outcome(value, soft=self.expected_l0(logit).to(scores.dtype), weight=True)

    def expected_l0(self, logit: Tensor) -> Tensor:
        """The probability that a sample isn't 0."""
        low, high = self.stretch
        return torch.sigmoid(logit - self.temperature * math.log(-low / high))
