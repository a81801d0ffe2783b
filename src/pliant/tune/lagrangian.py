"""Thresholds by a price on compute: exact along each threshold, whatever the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.tune.held_out import HeldOut
from pliant.tune.solvers import check_budget, geometric, improved


def lagrangian(held: HeldOut, flops: float, *, rounds: int = 20) -> Tensor:
    r"""Relax the budget to a price, bisect the price, then spend what is left over, one threshold or two at a time.

    .. math:: \max_\theta \; \mathrm{acc}(\theta) - \mu\, \overline{c}(\theta), \qquad \mu \text{ such that } \overline{c} \le B

    With the other thresholds held, the best value of one is found exactly, over all held-out scores, by one sort. Never worse
    on the held-out rows than :func:`geometric`; it ends with two passes of :func:`search`, and like it spends its budget.

    Shape:
        Returns :math:`(E - 1,)` thresholds.

    Args:
        held: what the exits say.
        flops: budget, mean FLOPs per row.
        rounds: at most so many passes over the thresholds.

    Returns:
        Thresholds that keep the mean on the held-out rows within the budget.

    Raises:
        PliantError: where the budget is out of reach.

    >>> held = HeldOut(("a",), torch.tensor([[[0., 1], [1, 0]], [[0, 1], [0, 1]]]), torch.tensor([[0.1, 0.9]]),
    ...                torch.tensor([1, 1]), torch.tensor([2, 10]))
    >>> lagrangian(held, 6.0)
    tensor([0.5000])

    References:
        Survey section 5.1.1.
    """
    check_budget(held, flops)
    start = geometric(held, flops)
    if not held.sites:
        return start
    gain, cost = held.correct.double(), held.flops.double()
    found, low, high = [start], 0.0, 1.0 / max(float(cost.diff().min()), 1e-30)
    for _ in range(40):
        price = (low + high) / 2
        value = gain - price * cost[:, None]
        thresholds = _climbed(held, found[-1], value, None, rounds)
        if held.evaluate(thresholds)[1] <= flops:
            high = price
            found.append(thresholds)
        else:
            low = price
    # The relaxed optimum lies on the convex hull of all points and may leave some of the budget.
    least = min(flops - 0.02 * float(cost.max()), held.evaluate(start)[1])
    ends = [start, *(_climbed(held, begin, gain, (least, flops), rounds) for begin in (start, found[-1]))]
    spent = [t for t in ends if least <= held.evaluate(t)[1] <= flops]
    best = max(spent, key=lambda t: (held.evaluate(t)[0], -held.evaluate(t)[1]))
    return improved(held, best, flops, rounds=2)


def _climbed(
    held: HeldOut, thresholds: Tensor, value: Tensor, within: tuple[float, float] | None, rounds: int
) -> Tensor:
    """Passes over the thresholds, each set to the best of its line, until nothing changes."""
    current = thresholds.clone()
    for _ in range(rounds):
        before = current.clone()
        for k in range(len(held.sites)):
            current[k] = _best(held, current, k, value, within)
        if torch.equal(before, current):
            break
    return current


def _best(held: HeldOut, thresholds: Tensor, k: int, value: Tensor, within: tuple[float, float] | None) -> float:
    """The threshold of exit ``k`` that makes the total value largest, the others held; within the budget if there is one."""
    cost = held.flops.double()
    open_k = thresholds.clone()
    open_k[k] = float("-inf")
    later = held.leaves(open_k)  # where each row leaves if it doesn't leave here
    here = later > k  # reaches exit k; NaN scores never leave
    order = held.scores[k][here].sort()
    scores = order.values
    number = int((~scores.isnan()).sum())
    rows = here.nonzero().squeeze(1)[order.indices][:number]
    scores = scores[:number]
    if number == 0:
        return float(thresholds[k])
    own = value[k][rows] - value.gather(0, later[None]).squeeze(0)[rows]
    saved = cost[k] - cost[later[rows]]
    gains = torch.cat([own.new_zeros(1), own.cumsum(0)])
    costs = cost[later].sum() + torch.cat([saved.new_zeros(1), saved.cumsum(0)])
    # Only between different scores: rows of equal score leave together.
    possible = torch.cat([scores.new_ones(1) > 0, scores[1:] > scores[:-1], scores.new_ones(1) > 0])
    if within is not None:
        possible &= (costs >= within[0] * len(later)) & (costs <= within[1] * len(later) * (1 + 1e-12))
    if not possible.any():
        return float(thresholds[k])
    gains = gains.masked_fill(~possible, float("-inf"))
    # Of equals the one that spends least under a price, and the one before it if there's a budget to be spent.
    at = int((gains >= gains.max() - 1e-12).nonzero().max())
    if at == 0:
        return float("-inf")
    return float((scores[at - 1] + scores[at]) / 2) if at < number else float(scores[-1])
