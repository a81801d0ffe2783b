"""Baselines of policy gradients: what is taken off a reward so that its gradient varies less and its mean stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.errors import PliantError
from pliant.core.site import Score
from pliant.core.trace import Trace
from pliant.losses.rewards import Reward
from pliant.losses.visits import came, per_row, sampled

Baseline = Callable[[Tensor, Trace], Tensor]
"""From rewards, (R,) or (V, R), and the trace to what is taken off them: any shape that broadcasts."""


def nothing(reward: Tensor, trace: Trace) -> Tensor:
    """No baseline."""
    return reward.new_zeros(())


class MovingAverage:
    r"""The mean reward of the steps before: :math:`b \leftarrow \kappa\, b + (1 - \kappa)\, \overline{R}`, 0 in the first step.

    It's state of the loss, changed each time the loss is computed: ``fit`` doesn't save it, so that a resumed run starts from
    0 again. A :class:`Critic` whose head is constant is a moving average that is saved.

    Args:
        keep: :math:`\kappa` in [0, 1).

    Raises:
        PliantError: where keep is outside [0, 1).

    >>> baseline = MovingAverage(0.5)
    >>> [float(baseline(torch.tensor([1.0, 3.0]), None)) for _ in range(3)]
    [0.0, 2.0, 2.0]

    References:
        Survey section 5.2.2 (3).
    """

    def __init__(self, keep: float = 0.9) -> None:
        if not 0 <= keep < 1:
            raise PliantError(got=f"keep {keep}", expected="within [0, 1)", do="pass e.g. 0.9")
        self.keep = keep
        self.mean: Tensor | None = None

    def __call__(self, reward: Tensor, trace: Trace | None) -> Tensor:
        """The mean before this step; what it brought is known from the next one on, so nothing is biased."""
        before = self.mean
        if reward.numel():
            now = reward.detach().mean()
            self.mean = now if before is None else self.keep * before + (1 - self.keep) * now
        return reward.new_zeros(()) if before is None else before


class LeaveOneOut:
    r"""The mean reward of the others: :math:`b_m = \frac{1}{M - 1} \sum_{m' \ne m} R_{m'}`.

    The others are the whole batch, or the :math:`M` samples of the same input: record ``x.repeat(M, ...)``, which puts whole
    copies of the batch one behind the other. A batch of one row, or one sample, has no others, and 0 for them.

    Unbiased where a row's reward doesn't depend on what other rows draw: a batch norm in training mode breaks that a little.

    Args:
        samples: :math:`M`, or None for the whole batch.

    Raises:
        PliantError: where the rows aren't a multiple of the samples, or there are fewer than 1.

    >>> LeaveOneOut()(torch.tensor([0.0, 1.0, 5.0]), None)
    tensor([3.0000, 2.5000, 0.5000])
    >>> LeaveOneOut(2)(torch.tensor([0.0, 1.0, 5.0, 7.0]), None)
    tensor([5., 7., 0., 1.])

    References:
        Survey section 5.2.2 (3); Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free, 2019.
    """

    def __init__(self, samples: int | None = None) -> None:
        if samples is not None and samples < 1:
            raise PliantError(got=f"{samples} samples", expected="at least 1", do="pass how often inputs are repeated")
        self.samples = samples

    def __call__(self, reward: Tensor, trace: Trace | None) -> Tensor:
        """One for each reward."""
        rows = reward.shape[-1]
        samples = max(rows, 1) if self.samples is None else self.samples
        if rows % samples:
            raise PliantError(
                got=f"{rows} rows for {samples} samples of each input", expected="a multiple",
                do="record x.repeat(samples, 1, ...)",
            )  # fmt: skip
        if samples == 1:
            return reward.new_zeros(())
        each = reward.unflatten(-1, (samples, rows // samples))
        return ((each.sum(-2, keepdim=True) - each) / (samples - 1)).flatten(-2)


class Valued(NamedTuple):
    """What a critic expects of each row, beside the scorer's own carry."""

    value: Tensor
    carry: Any


class Critic(Score):
    r"""A scorer with a value head beside it: :math:`b(x) = \mathrm{head}(x)`, learned by :class:`ValueLoss`.

    It stands in the model, where the scorer did, so ``fit`` trains and saves it with the policy. No gradient of it reaches the
    features. The head runs while training only; then its FLOPs are part of the score's.

    Shape:
        The head maps what the scorer sees to :math:`(R,)` or :math:`(R, 1)`.

    Args:
        scorer: the policy's scores.
        head: the value.

    >>> critic = Critic(nn.Linear(2, 1), nn.Linear(2, 1))
    >>> scores, carry = critic.step(torch.zeros(3, 2), None)
    >>> carry.value.shape
    torch.Size([3])

    References:
        Survey section 5.2.2 (3); Mnih et al., Recurrent Models of Visual Attention, NeurIPS 2014.
    """

    def __init__(self, scorer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.scorer, self.head = scorer, head

    def forward(self, x: Any) -> Tensor:
        """The scores."""
        return self.scorer(x)

    def step(self, x: Any, carry: Any) -> tuple[Tensor, Any]:
        """The scores, and the scorer's carry with the value while training."""
        inner = carry.carry if isinstance(carry, Valued) else carry
        scores, inner = self.scorer.step(x, inner) if isinstance(self.scorer, Score) else (self.scorer(x), inner)
        if not self.training:
            return scores, inner
        value = self.head(self.seen(x))
        return scores, Valued(value.squeeze(-1) if value.ndim == 2 else value, inner)

    def seen(self, x: Any) -> Any:
        """What the head is shown: the features without their gradient."""
        return pytree.tree_map(lambda t: t.detach(), x)


class JointCritic(Critic):
    """A critic whose loss teaches the features too, where their memory has to hold what's expected (AdaFrame).

    >>> critic = JointCritic(nn.Linear(2, 1), nn.Linear(2, 1))
    >>> x = torch.zeros(3, 2, requires_grad=True)
    >>> critic.step(x, None)[1].value.sum().backward()
    >>> x.grad.shape
    torch.Size([3, 2])
    """

    def seen(self, x: Any) -> Any:
        """The features as they are."""
        return x


def values(trace: Trace) -> Tensor:
    """What the critics expected at each drawn visit, (V, R), with their gradient; 0 where a row never came.

    Raises:
        PliantError: where a drawn visit has no critic.
    """
    found: list[Tensor] = []
    for site, d in sampled(trace):
        if not isinstance(d.carry, Valued):
            raise PliantError(
                got="a drawn decision without a value", expected="a Critic as the scorer, in training mode",
                do="make the site with pliant.losses.Critic(scorer, head)", site=site,
            )  # fmt: skip
        found.append(per_row(d.carry.value, d, trace.batch))
    return torch.stack(found) if found else torch.zeros(0, trace.batch)


def learned(reward: Tensor, trace: Trace) -> Tensor:
    """What a :class:`Critic` expected; the policy's loss gives it no gradient, :class:`ValueLoss` does."""
    return values(trace).detach().to(reward)


class ValueLoss:
    r"""The critics' loss, :math:`(b(x) - R)^2`, the mean over all visits by rows that really came.

    Args:
        reward: the one that the policy's loss has.

    Raises:
        PliantError: where a drawn visit has no critic.

    References:
        Survey section 5.2.2 (3).
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean square, in squared units of the reward; 0 where nothing was drawn."""
        with torch.no_grad():
            reward = self.reward(y, trace, target)
        found, expected = sampled(trace), values(trace)
        if not found:
            return y.sum() * 0
        here = torch.stack([came(d, trace.batch) for _, d in found])
        miss = torch.where(here, expected - reward.to(expected), 0.0)
        return miss.square().sum() / here.sum().clamp_min(1)
