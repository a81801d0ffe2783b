"""Policy gradients: losses of what was drawn and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.bind import sites
from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.losses.baselines import Baseline, nothing
from pliant.losses.further import Further, Other, itself
from pliant.losses.rewards import Reward, SkipNetReturns
from pliant.losses.visits import per_row, sampled, scored


def surrogate(trace: Trace, advantage: Tensor) -> Tensor:
    r"""What has the policy's gradient: :math:`-\frac{1}{R} \sum_r \sum_v A_{vr} \log \pi(a_{vr})` over the drawn visits.

    A row that never came to a site, or whose decision was forced, contributes exactly 0; so the masked and the gathered form
    give the same for the same decisions.

    Shape:
        ``advantage``: :math:`(R,)`, or :math:`(V, R)` for the :math:`V` drawn visits in order. Trailing dimensions of a
        decision share their row's.

    Args:
        trace: of a call in training mode, with estimators that tell log-probabilities.
        advantage: rewards less a baseline; no gradient passes it.

    Returns:
        A scalar; 0 for a batch without rows, or where all was forced.

    Raises:
        PliantError: where choices were made but none was drawn, or the advantage has another shape.

    >>> from pliant.core.decision import Decision
    >>> drawn = Decision(torch.ones(2), log_prob=torch.tensor([-0.5, -9.0]), reached=torch.tensor([True, False]))
    >>> surrogate(Trace({"a": (drawn,)}, (), (), 2), torch.tensor([2.0, 2.0]))
    tensor(0.5000)

    References:
        Survey section 5.2.2 (3).
    """
    found = sampled(trace)
    if not found:
        if scored(trace):
            raise PliantError(
                got="decisions without log-probabilities",
                expected="a rule that draws",
                do="bind pliant.estimators.ScoreFunction, and record in training mode",
            )
        return advantage.new_zeros(())
    if advantage.shape not in ((trace.batch,), (len(found), trace.batch)):
        raise PliantError(
            got=f"rewards of shape {tuple(advantage.shape)}",
            expected=f"({trace.batch},) or ({len(found)}, {trace.batch}): visits that were drawn, rows",
            do="let the reward return one number per row, or one per visit and row",
        )
    log_prob = torch.stack([per_row(d.log_prob, d, trace.batch) for _, d in found if d.log_prob is not None])
    return -(log_prob * advantage.detach().to(log_prob)).sum() / max(trace.batch, 1)


class Reinforce:
    r"""REINFORCE with a baseline: :math:`\nabla = -E\big[\sum_v \nabla \log \pi(a_v)\,(R_v - b_v)\big]`, the mean over rows.

    The gradient is the score function's where the value itself has none, as with ``ScoreFunction``: a straight-through estimator
    adds its own by way of the task's loss.

    Args:
        reward: of each row, or from each drawn visit on.
        baseline: ``nothing``, ``MovingAverage()``, ``LeaveOneOut()`` or ``learned``.

    Raises:
        PliantError: where choices were made but none was drawn.

    >>> from pliant.core.decision import Decision
    >>> drawn = Decision(torch.ones(2), log_prob=torch.tensor([-0.5, -1.0]))
    >>> reward = Reinforce(lambda y, trace, target: torch.tensor([1.0, 0.0]))
    >>> reward(torch.zeros(2, 4), Trace({"a": (drawn,)}, (), (), 2), torch.zeros(2), 0.0)
    tensor(0.2500)

    References:
        Survey section 5.2.2 (3); Mnih et al., Recurrent Models of Visual Attention, NeurIPS 2014.
    """

    def __init__(self, reward: Reward, *, baseline: Baseline = nothing) -> None:
        self.reward, self.baseline = reward, baseline

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The surrogate, in units of the reward times nats; 0, with no gradient, where all was forced."""
        with torch.no_grad():
            reward = self.reward(y, trace, target)
            advantage = reward - self.baseline(reward, trace)
        found = surrogate(trace, advantage)
        return found if found.requires_grad or not y.requires_grad else found + y.sum() * 0


def greedy(model: nn.Module) -> nn.Module:
    """The model once more with every rule in evaluation, so that estimators decide and don't draw; all tensors shared.

    The rest stays in the mode that it's in, so what differs is the decisions; but dropout draws anew.
    """
    other = itself(model)
    for site in sites(other).values():
        site.rule.eval()
    return other


class SelfCritical(Further):
    r"""Self-critical policy gradient: the baseline is the reward of the same policy's greedy decisions.

    .. math:: \nabla = -E\big[(R(u) - R(\hat u))\, \nabla \log \pi(u)\big], \qquad \hat u = 1[s > t]

    The greedy pass is made by ``fit`` in the same step, without gradients. Where nothing drawn differs from it in the batch,
    the gradient is exactly 0, unless the network itself draws (dropout).

    Args:
        reward: one number per row.
        other: what decides greedily: :func:`greedy`.

    Raises:
        PliantError: where the reward is one per visit: the two passes needn't visit the same sites.

    >>> from pliant.core.decision import Decision
    >>> term = SelfCritical(lambda y, trace, target: y[:, 0])
    >>> drawn = Trace({"a": (Decision(torch.ones(2), log_prob=torch.tensor([-0.5, -1.0])),)}, (), (), 2)
    >>> y, hat = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    >>> term(y, drawn, torch.zeros(2), 0.0, (hat, Trace({}, (), (), 2)))
    tensor(0.2500)

    References:
        Survey section 5.2.2 (3); Wu et al., BlockDrop, CVPR 2018; Rennie et al., CVPR 2017.
    """

    def __init__(self, reward: Reward, *, other: Other = greedy) -> None:
        super().__init__(other)
        self.reward = reward

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float, further: tuple[Any, Trace]) -> Tensor:
        """The surrogate, in units of the reward times nats."""
        critic, theirs = further

        def baseline(reward: Tensor, trace: Trace) -> Tensor:
            if reward.ndim != 1:
                raise PliantError(
                    got=f"rewards of shape {tuple(reward.shape)}", expected="one for each row",
                    do="use Reinforce with a baseline for returns of each visit",
                )  # fmt: skip
            return self.reward(critic, theirs, target)

        return Reinforce(self.reward, baseline=baseline)(y, trace, target, progress)


class Hybrid:
    r"""SkipNet's second stage: cross-entropy through what was executed, and the policy's gradient, in one.

    .. math:: \nabla = E[\nabla L] - E\big[\sum_i \nabla \log p(S_i)\, r_i\big], \qquad
        r_i = -\big[L - \tfrac{\alpha}{N} \sum_{j \ge i} (1 - S_j)\, C_j\big]

    Train a relaxed gate first (``pliant.train.relaxed_to_hybrid``). With every gate forced on it's the plain cross-entropy.

    Args:
        alpha: :math:`\alpha \ge 0`.
        costs: :math:`C_j` by pattern; none is 1 for all.
        baseline: as in :class:`Reinforce`; SkipNet has none.
        weight: of the policy's gradient, at least 0; 0.01 in SkipNet's released code.

    Raises:
        PliantError: as :class:`SkipNetReturns` and :class:`Reinforce` do, or where the weight is negative.

    >>> Hybrid(alpha=0.1)(torch.zeros(2, 4), Trace({}, (), (), 2), torch.tensor([0, 1]), 0.0)
    tensor(1.3863)

    References:
        Survey section 5.2.2 (3); Wang et al., SkipNet, ECCV 2018.
    """

    def __init__(
        self, *, alpha: float = 0.1, costs: Mapping[str, float] | None = None, baseline: Baseline = nothing, weight: float = 1.0
    ) -> None:  # fmt: skip
        if not weight >= 0:
            raise PliantError(got=f"weight={weight}", expected="at least 0", do="pass e.g. 0.01")
        self.reward, self.baseline, self.weight = SkipNetReturns(alpha=alpha, costs=costs), baseline, weight

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The sum of both, in nats."""
        if trace.batch == 0:
            return y.sum()
        with torch.no_grad():
            reward = self.reward(y, trace, target)
            advantage = reward - self.baseline(reward, trace) if len(reward) else reward
        return F.cross_entropy(y, target) + self.weight * surrogate(trace, advantage)


def bernoulli(p: Tensor) -> Tensor:
    """Entropy of coins, in nats, summed over trailing dimensions by the caller.

    >>> bernoulli(torch.tensor([0.5, 1.0]))
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(p) + torch.special.entr(1 - p)


def categorical(p: Tensor) -> Tensor:
    """Entropy of choices among the last dimension, in nats.

    >>> categorical(torch.tensor([[0.5, 0.5, 0.0]]))
    tensor([0.6931])
    """
    return torch.special.entr(p).sum(-1)


class EntropyBonus:
    r"""Against early collapse: :math:`-\frac{1}{R} \sum_r \sum_v H(\pi(\cdot \mid x_{vr}))`; its weight is the bonus.

    Args:
        of: from soft values to entropies: :func:`bernoulli` for gates, :func:`categorical` for choices among several.

    >>> from pliant.core.decision import Decision
    >>> drawn = Decision(torch.ones(1), soft=torch.tensor([0.5]), log_prob=torch.tensor([-0.7]))
    >>> EntropyBonus()(torch.zeros(1, 4), Trace({"a": (drawn,)}, (), (), 1), torch.zeros(1), 0.0)
    tensor(-0.6931)

    References:
        Survey section 5.2.2 (3); Mnih et al., Asynchronous Methods for Deep Reinforcement Learning, ICML 2016.
    """

    def __init__(self, of: Callable[[Tensor], Tensor] = bernoulli) -> None:
        self.of = of

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """Minus the mean entropy of a row, in nats; 0 where nothing was drawn."""
        found = [per_row(self.of(d.soft), d, trace.batch) for _, d in sampled(trace) if d.soft is not None]
        return -torch.stack(found).sum() / max(trace.batch, 1) if found else y.sum() * 0
