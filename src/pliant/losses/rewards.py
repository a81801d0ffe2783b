"""Rewards of policies: functions of (prediction, trace, target), one number per row, or one per visit and row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.trace import Exit, Trace
from pliant.cost import expected_flops
from pliant.losses.visits import Visits, came, per_row, sampled, scored

Reward = Callable[[Tensor, Trace, Tensor], Tensor]
"""From prediction, trace and target to (R,), or (V, R) for the V visits that were choices; no gradient passes it."""
Gain = Callable[[Tensor, Tensor], Tensor]
"""From prediction and target to what each row has achieved."""
Share = Callable[[Trace], Tensor]
"""From a trace to what each row has spent, as a share of the most it could spend."""


def right(y: Tensor, target: Tensor) -> Tensor:
    """1 where the prediction is right, else 0.

    >>> right(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    tensor([1., 0.])
    """
    return (y.detach().argmax(-1) == target).to(y.dtype)


def minus_loss(y: Tensor, target: Tensor) -> Tensor:
    """Minus the cross-entropy of each row, in nats.

    >>> minus_loss(torch.zeros(1, 2), torch.tensor([0]))
    tensor([-0.6931])
    """
    return -F.cross_entropy(y.detach(), target, reduction="none")


def used(trace: Trace, sites: str = "*") -> Tensor:
    r"""Share of all free units that are on, :math:`|u|_0 / K`. Forced sites count neither above nor below the line.

    Sites inside others may go unvisited when only what was chosen runs; take :func:`spent` there.

    Shape:
        Returns :math:`(R,)`; zeros where nothing was free.

    >>> free, forced = Decision(torch.tensor([0.0]), scores=torch.zeros(1)), Decision(torch.tensor([1.0]))
    >>> used(Trace({"a": (forced,), "b": (free,)}, (), (), 1))
    tensor([0.])
    """
    found = scored(trace, sites)
    if not found:
        return torch.zeros(trace.batch)
    units = sum(d.value[0:1].numel() if len(d.value) else 1 for _, d in found)
    return torch.stack([per_row(d.value.detach(), d, trace.batch) for _, d in found]).sum(0) / units


@torch.no_grad()
def spent(trace: Trace) -> Tensor:
    r"""Share of the dense FLOPs that the decisions ask for, the same in the masked and the gathered form.

    Gathered, it's ``trace.flops / trace.dense_flops``. Masked, ``trace.flops`` is all that ran, which no decision changes.

    Shape:
        Returns :math:`(R,)`.

    >>> import pliant
    >>> model = pliant.create_model("convnet_aig", depth=8).eval()
    >>> _, trace = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(torch.zeros(1, 3, 8, 8))
    >>> bool(spent(trace) == trace.flops / trace.dense_flops)
    True
    """
    hard = {site: tuple(replace(d, soft=None) for d in trace[site]) for site in trace}
    decided = Trace(hard, (), (), trace.batch, accounts=trace.accounts)
    flops = expected_flops(decided)
    return (flops / decided.dense_flops.to(flops.device)).float()


class BlockDropReward:
    r"""BlockDrop: :math:`R = 1 - (|u|_0 / K)^2` where the prediction is right, :math:`-\gamma` where it's wrong.

    Shape:
        Returns :math:`(R,)`.

    Args:
        gamma: :math:`\gamma \ge 0`; large asks for accuracy.
        share: what is squared: :func:`used` or :func:`spent`.

    Raises:
        PliantError: where gamma is negative.

    >>> d = Decision(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), scores=torch.zeros(2, 2))
    >>> y, target = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    >>> BlockDropReward(gamma=5.0)(y, Trace({"plan": (d,)}, (), (), 2), target)
    tensor([ 0.7500, -5.0000])

    References:
        Survey section 5.2.2 (3); Wu et al., BlockDrop, CVPR 2018.
    """

    def __init__(self, *, gamma: float = 1.0, share: Share = used) -> None:
        _not_negative(gamma, "gamma")
        self.gamma, self.share = gamma, share

    def __call__(self, y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        """The reward of each row."""
        return torch.where(right(y, target) > 0, 1 - self.share(trace).to(y) ** 2, -self.gamma)


class SkipNetReturns:
    r"""SkipNet's return from each gate on: :math:`r_i = -\big[L - \frac{\alpha}{N} \sum_{j \ge i} (1 - S_j)\, C_j\big]`.

    :math:`N` counts the gates that are drawn; forced ones are in neither the sum nor the count.

    Shape:
        Returns :math:`(V, R)`, a row for each drawn visit in order.

    Args:
        alpha: :math:`\alpha \ge 0`.
        costs: :math:`C_j` by pattern on site paths, the first match counts; none is 1 for all.

    Raises:
        PliantError: where alpha is negative, or costs name no match for a gate.

    >>> def gate(value):
    ...     return (Decision(torch.tensor([value]), scores=torch.zeros(1), log_prob=torch.zeros(1)),)
    >>> trace = Trace({"a": gate(0.0), "b": gate(1.0), "c": gate(0.0)}, (), (), 1)
    >>> SkipNetReturns(alpha=0.3)(torch.zeros(1, 2), trace, torch.tensor([0])).T
    tensor([[-0.4931, -0.5931, -0.5931]])

    References:
        Survey section 5.2.2 (3); Wang et al., SkipNet, ECCV 2018.
    """

    def __init__(self, *, alpha: float = 0.1, costs: Mapping[str, float] | None = None) -> None:
        _not_negative(alpha, "alpha")
        self.alpha, self.costs = alpha, {"*": 1.0} if costs is None else dict(costs)

    def __call__(self, y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        """The return of each visit and row."""
        loss, found = -minus_loss(y, target), sampled(trace)
        if not found:
            return -loss.expand(0, -1)
        saved = torch.stack([self._saved(site, d, trace.batch) for site, d in found]).to(loss)
        return -(loss - self.alpha / len(found) * to_go(saved))

    def _saved(self, site: str, d: Decision, batch: int) -> Tensor:
        cost = next((c for pattern, c in self.costs.items() if fnmatchcase(site, pattern)), None)
        if cost is None:
            raise PliantError(
                got=f"costs for {list(self.costs)}", expected="one for each gate that is drawn",
                do='add {"*": 1.0} as the last pattern', site=site,
            )  # fmt: skip
        value = d.value.detach().flatten(1).mean(1) if d.value.ndim > 1 else d.value.detach()
        return cost * (1 - per_row(value, d, batch))


def groups(decision: Decision) -> Tensor:
    """How many of k ordered groups each row keeps, for one-hot choices: the a-th keeps a; a binary value is itself.

    >>> groups(Decision(torch.tensor([[0.0, 0.0, 1.0]])))
    tensor([3.])
    """
    value = decision.value.detach()
    if value.ndim == 1:
        return value
    return value @ torch.arange(1, value.shape[-1] + 1, device=value.device, dtype=value.dtype)


class StepPenalty:
    r"""RNP's rewards step by step: :math:`-p\, a_i` for :math:`a_i` groups kept; at a row's last step also :math:`-\alpha L`.

    Shape:
        Returns :math:`(V, R)`: rewards, for :class:`QLearning`; wrap in :func:`returns` for :class:`Reinforce`.

    Args:
        penalty: :math:`p \ge 0`, for each group kept.
        alpha: :math:`\alpha \ge 0`, of the cross-entropy.
        kept: from a decision to its groups, :func:`groups` for one-hot choices.
        visits: which visits are steps, :func:`scored` or :func:`sampled`; the same as the loss that reads this.

    Raises:
        PliantError: where penalty or alpha is negative.

    >>> d = Decision(torch.tensor([[0.0, 1.0]]), scores=torch.zeros(1, 2))
    >>> StepPenalty(penalty=0.1)(torch.zeros(1, 2), Trace({"a": (d,), "b": (d,)}, (), (), 1), torch.tensor([0]))
    tensor([[-0.2000],
            [-0.8931]])

    References:
        Survey section 5.2.2 (3); Lin et al., Runtime Neural Pruning, NeurIPS 2017.
    """

    def __init__(
        self, *, penalty: float, alpha: float = 1.0, kept: Callable[[Decision], Tensor] = groups,
        visits: Callable[[Trace], Visits] = scored,
    ) -> None:  # fmt: skip
        _not_negative(penalty, "penalty")
        _not_negative(alpha, "alpha")
        self.penalty, self.alpha, self.kept, self.visits = penalty, alpha, kept, visits

    def __call__(self, y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        """The reward of each visit and row."""
        task, found = self.alpha * minus_loss(y, target), self.visits(trace)
        if not found:
            return task.expand(0, -1)
        here = torch.stack([came(d, trace.batch) for _, d in found])
        last = here & (here.flip(0).cumsum(0).flip(0) == 1)
        kept = torch.stack([per_row(self.kept(d), d, trace.batch) for _, d in found])
        return torch.where(last, task, 0.0) - self.penalty * kept.to(task)


class MarginGain:
    r"""For looks or frames one after the other: what each adds to the best margin so far, less its price.

    .. math:: m_k = p_k(\text{target}) - \max_{c \ne \text{target}} p_k(c), \qquad r_v = \max(0, m_{v+1} - \max_{k \le v} m_k) - \lambda

    Exit :math:`v + 1` answers after the look that visit :math:`v` decided. Where a row has left, the reward is 0.

    Shape:
        Returns :math:`(V, R)`, for :math:`V + 1` exits; wrap in :func:`returns` for :class:`Reinforce`.

    Args:
        price: :math:`\lambda \ge 0`, of each look.

    Raises:
        PliantError: where the price is negative, or the exits aren't one more than the visits that were drawn.

    >>> from pliant.core.trace import Exit
    >>> d = Decision(torch.zeros(1), log_prob=torch.zeros(1))
    >>> exits = (Exit(torch.zeros(1, 2)), Exit(torch.tensor([[2.0, 0.0]])))
    >>> MarginGain(price=0.1)(torch.zeros(1, 2), Trace({"a": (d,)}, exits, (), 1), torch.tensor([0]))
    tensor([[0.6616]])

    References:
        Survey section 5.2.2 (3); Wu et al., AdaFrame, CVPR 2019.
    """

    def __init__(self, *, price: float = 0.0) -> None:
        _not_negative(price, "price")
        self.price = price

    def __call__(self, y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        """The reward of each visit and row."""
        self.check(trace, len(sampled(trace)))
        margins, here = zip(*(self.margin(e, target, trace.batch) for e in trace.exits), strict=True)
        best = torch.stack(margins).cummax(0).values
        return torch.where(torch.stack(here[1:]), best.diff(dim=0) - self.price, 0.0)

    def check(self, trace: Trace, visits: int) -> None:
        """Refuse a trace without an exit before, between and behind the visits."""
        if len(trace.exits) != visits + 1:
            raise PliantError(
                got=f"{len(trace.exits)} exits after {visits} drawn visits", expected="one more than the visits",
                do="use a chain with an exit after each look, whose places are drawn",
            )  # fmt: skip

    def margin(self, e: Exit, target: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The margin of every row of the batch at one exit, -1 where it never came, and who came."""
        p = e.logits.detach().softmax(-1)
        of = target if e.rows is None else target[e.rows]
        mine = p.gather(1, of[:, None])[:, 0]
        margin = mine - p.scatter(1, of[:, None], -1.0).amax(1)
        came_here = torch.ones_like(of, dtype=torch.bool) if e.reached is None else e.reached
        margin = torch.where(came_here, margin, -1.0)
        if e.rows is None:
            return margin, came_here
        whole = margin.new_full((batch,), -1.0).index_copy(0, e.rows, margin)
        return whole, torch.zeros(batch, dtype=torch.bool, device=margin.device).index_copy(0, e.rows, came_here)


class Priced:
    r"""The general form, for training, search and reports alike: :math:`R = \mathrm{gain} - \lambda\,\mathrm{cost}`.

    Shape:
        Returns :math:`(R,)`.

    Args:
        price: :math:`\lambda \ge 0`, or a :class:`Dual` that adapts it.
        gain: :func:`right` or :func:`minus_loss`.
        cost: of each row, :func:`spent` or :func:`used`.

    Raises:
        PliantError: where the price is negative.

    >>> d = Decision(torch.tensor([1.0, 0.0]), scores=torch.zeros(2))
    >>> y, target = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0])
    >>> Priced(0.4, cost=used)(y, Trace({"a": (d,)}, (), (), 2), target)
    tensor([0.6000, 1.0000])

    References:
        Survey section 5.2.2 (3).
    """

    def __init__(self, price: float | Dual, *, gain: Gain = right, cost: Share = spent) -> None:
        if not isinstance(price, Dual):
            _not_negative(price, "price")
        self.price, self.gain, self.cost = price, gain, cost

    def __call__(self, y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        """The reward of each row."""
        price = self.price.value.to(y) if isinstance(self.price, Dual) else self.price
        return self.gain(y, target) - price * self.cost(trace).to(y)


class Dual(nn.Module):
    r"""A price that finds itself, by dual ascent: :math:`\lambda \leftarrow \max(0, \lambda + \eta\,(\overline{c} - c^*))`.

    It changes in :meth:`update` only, which who trains calls with the costs seen: after each step of a loop of one's own, or
    from ``Fit(on_epoch=...)``. ``fit`` doesn't save it; its ``state_dict`` holds it.

    Args:
        target: :math:`c^*`, the mean cost wanted, in the unit of the costs.
        rate: :math:`\eta > 0`.
        start: :math:`\lambda` at the start.

    Raises:
        PliantError: where the rate isn't positive or the start is negative.

    >>> price = Dual(0.5, rate=0.1)
    >>> price.update(torch.tensor([1.0, 0.6]))
    >>> price.value
    tensor(0.0300)

    References:
        Survey section 5.2.2 (3), constrained reinforcement learning.
    """

    value: Tensor

    def __init__(self, target: float, *, rate: float, start: float = 0.0) -> None:
        super().__init__()
        _not_negative(start, "start")
        if not rate > 0:
            raise PliantError(got=f"rate {rate}", expected="a positive number", do="pass e.g. rate=0.01")
        self.target, self.rate = target, rate
        self.register_buffer("value", torch.tensor(float(start)))

    @torch.no_grad()
    def update(self, cost: Tensor) -> None:
        """One step, from the costs of some rows; none changes nothing."""
        if cost.numel():
            gap = cost.detach().to(self.value).mean() - self.target
            self.value.copy_((self.value + self.rate * gap).clamp_min(0))


def to_go(rewards: Tensor, discount: float = 1.0) -> Tensor:
    r"""Returns from rewards: :math:`G_v = \sum_{w \ge v} \gamma^{w - v} r_w`, visits first.

    >>> to_go(torch.tensor([[1.0], [2.0]]), 0.5)
    tensor([[2.],
            [2.]])
    """
    found = [torch.zeros_like(rewards[0])] if len(rewards) else []
    for reward in reversed(rewards.unbind(0)):
        found.append(reward + discount * found[-1])
    return torch.stack(found[:0:-1]) if len(rewards) else rewards


def returns(reward: Reward, discount: float = 1.0) -> Reward:
    """The reward that gives at each visit what ``reward`` gives from there on."""
    return lambda y, trace, target: to_go(reward(y, trace, target), discount)


def _not_negative(value: float, name: str) -> None:
    if not value >= 0:
        raise PliantError(got=f"{name} {value}", expected="at least 0", do=f"pass a {name} of 0 or more")
