"""Value-based learning: scores are values of actions, and learn what they lead to."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.losses.rewards import Reward
from pliant.losses.visits import Visits, came, scored


class QLearning:
    r"""One-step Q-learning over the visits of a trace in order: :math:`(Q(s, a) - [r + \gamma \max_{a'} Q(s', a')])^2`.

    The scores are :math:`Q`, the action is the value's. The target has no gradient; at a row's last visit it is :math:`r`.
    Rewards must be one per visit, e.g. :class:`StepPenalty`. There's no replay: what a stored row would be worth
    changes with the backbone, so each step learns from the visits of its own call.

    Shape:
        Scores :math:`(R, A)` with one-hot values, or :math:`(R,)`: those are the advantage of spending, :math:`Q(1) - Q(0)`,
        which tells no values, and are refused.

    Args:
        reward: (V, R) for the scored visits of ``sites``, in order.
        discount: :math:`\gamma` in [0, 1].
        sites: pattern on the paths of the sites that learn.

    Raises:
        PliantError: where the discount is outside [0, 1], scores aren't one per action, or rewards have another shape.

    >>> from pliant.core.decision import Decision
    >>> first = Decision(torch.tensor([[1.0, 0.0]]), scores=torch.tensor([[0.0, 5.0]]))
    >>> second = Decision(torch.tensor([[0.0, 1.0]]), scores=torch.tensor([[2.0, 1.0]]))
    >>> loss = QLearning(lambda y, trace, target: torch.tensor([[0.0], [1.0]]), discount=0.5)
    >>> loss(torch.zeros(1), Trace({"a": (first,), "b": (second,)}, (), (), 1), torch.zeros(1), 0.0)
    tensor(0.5000)

    References:
        Survey section 5.2.2 (3); Lin et al., Runtime Neural Pruning, NeurIPS 2017.

    Differs from the paper: no replay.
    """

    def __init__(self, reward: Reward, *, discount: float = 1.0, sites: str = "*") -> None:
        if not 0 <= discount <= 1:
            raise PliantError(got=f"discount {discount}", expected="within [0, 1]", do="pass e.g. 0.99")
        self.reward, self.discount, self.sites = reward, discount, sites

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean square over all visits by rows that really came; 0 where none did."""
        found = scored(trace, self.sites)
        if not found:
            return y.sum() * 0
        with torch.no_grad():
            reward = self.reward(y, trace, target)
        if reward.shape != (len(found), trace.batch):
            raise PliantError(
                got=f"rewards of shape {tuple(reward.shape)}",
                expected=f"({len(found)}, {trace.batch}): visits, rows",
                do="let the reward return one number per scored visit and row",
            )
        taken, best, here = _values(found, trace.batch)
        wanted = q_targets(reward.to(best), best.detach(), here, self.discount)
        miss = torch.where(here, taken - wanted, 0.0)
        return miss.square().sum() / here.sum().clamp_min(1)


def q_targets(reward: Tensor, best: Tensor, here: Tensor, discount: float = 1.0) -> Tensor:
    r"""One-step targets :math:`r_v + \gamma \max_{a'} Q_{v'}(a')`, :math:`v'` the next visit that the row came to.

    Shape:
        ``reward``, ``best`` (the largest :math:`Q` of each visit) and ``here`` (who came) are :math:`(V, R)`, as is the result.

    >>> q_targets(torch.zeros(2, 1), torch.tensor([[1.0], [4.0]]), torch.ones(2, 1, dtype=torch.bool), 0.5)
    tensor([[2.],
            [0.]])
    """
    coming = torch.zeros_like(best[0])
    found: list[Tensor] = []
    for r, q, came_here in zip(reward.flip(0), best.flip(0), here.flip(0), strict=True):
        found.append(r + discount * coming)
        coming = torch.where(came_here, q, coming)
    return torch.stack(found[::-1])


def _values(found: Visits, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every visit and row: the value of the action taken, the largest value, and whether the row came."""
    taken: list[Tensor] = []
    best: list[Tensor] = []
    for site, d in found:
        q = d.scores
        if q is None or q.ndim != 2 or d.value.shape != q.shape:
            raise PliantError(
                got=f"scores of shape {None if q is None else tuple(q.shape)}",
                expected="(rows, actions), with a one-hot value",
                do="let the scorer give a value to each action, and bind EpsilonGreedyOneHot", site=site,
            )  # fmt: skip
        both = torch.stack([(q * d.value.detach()).sum(-1), q.amax(-1)], -1)
        if d.rows is not None:
            both = both.new_zeros(batch, 2).index_add(0, d.rows, both)
        taken.append(both[:, 0])
        best.append(both[:, 1])
    return torch.stack(taken), torch.stack(best), torch.stack([came(d, batch) for _, d in found])
