"""Solvers: thresholds for a budget in mean FLOPs, from what every exit says about held-out rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.tune.held_out import HeldOut


def check_budget(held: HeldOut, flops: float) -> None:
    """Refuse a budget that no thresholds can meet, naming the range that they can."""
    low, high = int(held.flops.min()), int(held.flops.max())
    if not low <= flops <= high * (1 + 1e-9):
        raise PliantError(
            got=f"a budget of {flops:,.0f} FLOPs per row ({flops / high:.1%} of dense)",
            expected=f"between the first exit's {low:,} ({low / high:.1%}) and the last one's {high:,} (100 %)",
            do="ask for a budget in that range, or put an exit earlier",
        )


def geometric_shares(exits: int, q: float) -> Tensor:
    r"""Exit shares :math:`q_k \propto q^k`, from early (small q) to late (large q)."""
    shares = torch.tensor(q, dtype=torch.float64) ** torch.arange(1, exits + 1, dtype=torch.float64)
    return shares / shares.sum()


def thresholds_for_shares(held: HeldOut, shares: Tensor) -> Tensor:
    """Walk the exits in order; each takes its share of all rows, the surest of those that are left.

    Ties are broken by value alone: rows with equal scores leave together, so the order of the rows doesn't matter.
    """
    left = torch.ones_like(held.labels, dtype=torch.bool)
    out = []
    for k in range(len(held.sites)):
        wanted = int(shares[k] * len(held.labels))
        scores = held.scores[k][left].sort().values
        if wanted == 0 or len(scores) == 0:
            out.append(float("-inf"))
        else:
            # Halfway to the next score: a threshold on a row's very score would hang on the last bit of another machine.
            at = min(wanted, len(scores)) - 1
            nearest = scores[at]
            above = scores[scores > nearest]
            out.append(float((nearest + above[0]) / 2 if len(above) else nearest))
        left &= ~(held.scores[k] <= out[-1])
    return torch.tensor(out)


def geometric(held: HeldOut, flops: float) -> Tensor:
    r"""MSDNet's budgeted-batch protocol: one :math:`q`, shares :math:`\propto q^k`, the largest mean cost within the budget.

    Shape:
        Returns :math:`(E - 1,)` thresholds.

    Args:
        held: what the exits say.
        flops: budget, mean FLOPs per row.

    Returns:
        Thresholds that keep the mean on the held-out rows within the budget.

    Raises:
        PliantError: where the budget is out of reach.

    References:
        Survey section 5.1.1; Huang et al., Multi-Scale Dense Networks, ICLR 2018.

    Differs from the public code: q is found by bisection for the budget instead of swept, and thresholds stand halfway
    between two scores.
    """
    check_budget(held, flops)
    best = torch.full((len(held.sites),), float("inf"))
    low, high = -12.0, 12.0  # of log q
    for _ in range(60):
        middle = (low + high) / 2
        found = thresholds_for_shares(held, geometric_shares(len(held.flops), float(torch.tensor(middle).exp())))
        if held.evaluate(found)[1] <= flops:
            best, low = found, middle
        else:
            high = middle
    return best


def search(held: HeldOut, flops: float, *, steps: int = 24, rounds: int = 6) -> Tensor:
    r"""Direct search: from the geometric solution, move one threshold or two against each other while accuracy grows.

    .. math:: \max_\theta \mathrm{acc}(\theta) \quad \text{s.t.} \quad B - 0.02\, c_E \le \overline{c}(\theta) \le B

    Never worse on the held-out rows than :func:`geometric`. A budget is there to be spent: what the held-out rows say of
    cheaper thresholds may be luck, and who wants the cheapest safe point asks for a risk instead.

    Shape:
        Returns :math:`(E - 1,)` thresholds.

    Args:
        held: what the exits say.
        flops: budget, mean FLOPs per row.
        steps: candidates per threshold, quantiles of its scores.
        rounds: at most so many sweeps over all pairs.

    Returns:
        Thresholds that keep the mean on the held-out rows within the budget.

    Raises:
        PliantError: where the budget is out of reach.

    References:
        Survey section 5.1.1.
    """
    return improved(held, geometric(held, flops), flops, steps=steps, rounds=rounds)


def improved(held: HeldOut, current: Tensor, flops: float, *, steps: int = 24, rounds: int = 6) -> Tensor:
    """From ``current``, within the budget, move one threshold or two against each other while accuracy grows."""
    exits = len(held.sites)
    if exits == 0:
        return current
    q = torch.linspace(0, 1, steps + 1)[1:].double()
    # A NaN score never leaves, so it is no candidate; where all are NaN, nor is anything else.
    middle = [s.double().nanquantile(q, interpolation="midpoint").float() for s in held.scores]
    candidates = torch.stack(middle).nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    candidates = torch.cat([torch.full((exits, 1), float("-inf")), candidates], 1)
    evaluate = _Evaluator(held)
    best = evaluate(current)
    least = min(flops - 0.02 * float(held.flops.max()), -best[1])
    for _ in range(rounds):
        before = best
        for i in range(exits):
            for j in range(i, exits):
                for a in candidates[i]:
                    trials = current.repeat(1 if i == j else candidates.shape[1], 1)
                    trials[:, i] = a
                    if i != j:
                        trials[:, j] = candidates[j]
                    accuracy, cost = evaluate.many(trials)
                    accuracy[(cost > flops) | (cost < least)] = -1
                    top = (accuracy - 1e-12 * cost).argmax()
                    found = (float(accuracy[top]), -float(cost[top]))
                    if found > best:
                        best, current = found, trials[top].clone()
        if best == before:
            break
    return current


class _Evaluator:
    """Accuracy and cost of many threshold vectors at once."""

    def __init__(self, held: HeldOut) -> None:
        self.scores = held.scores
        self.correct = held.correct.float()
        self.flops = held.flops.double()

    def many(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) accuracies and costs of (T, E - 1) thresholds."""
        left = torch.ones(len(thresholds), self.scores.shape[1])
        accuracy = torch.zeros(len(thresholds), dtype=torch.float64)
        cost = torch.zeros(len(thresholds), dtype=torch.float64)
        for k, scores in enumerate(self.scores):
            leaves = left * (scores <= thresholds[:, k : k + 1])
            accuracy += (leaves @ self.correct[k]).double()
            cost += leaves.sum(1).double() * self.flops[k]
            left = left - leaves
        accuracy += (left @ self.correct[-1]).double()
        cost += left.sum(1).double() * self.flops[-1]
        return accuracy / left.shape[1], cost / left.shape[1]

    def __call__(self, thresholds: Tensor) -> tuple[float, float]:
        accuracy, cost = self.many(thresholds[None])
        return float(accuracy[0]), -float(cost[0])


def cheapest(held: HeldOut, risk: float, *, points: int = 25) -> Tensor:
    """Thresholds of the least mean cost whose held-out accuracy is within ``risk`` of the dense network's.

    Accuracy needn't be monotone in the budget, so budgets are tried from the cheapest up, not bisected.
    """
    target = held.correct[-1].double().mean().item() - risk
    low, high = float(held.flops.min()), float(held.flops.max())
    for k in range(points):
        found = search(held, low + (high - low) * k / points, steps=12, rounds=2)
        if held.evaluate(found)[0] >= target:
            return found
    return torch.full((len(held.sites),), float("-inf"))
