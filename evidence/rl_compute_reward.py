"""Rewards that price computation: each against its formula, and a price that finds itself."""

from __future__ import annotations

from statistics import mean

import _flag
import torch
from torch import Tensor

from pliant import estimators, losses, rules
from pliant.core.decision import Decision
from pliant.core.trace import Exit, Trace
from pliant.losses import Total
from pliant.reproduce import Claim, Lab

SEEDS, TARGETS, STEPS = (0, 1), (0.2, 0.3, 0.4), 6000
DATA = "hand-made traces; and " + _flag.TOLD


def trace(values: list[list[float]], shape: tuple[int, ...] = ()) -> Trace:
    """A drawn decision for each site (outer) and row (inner)."""
    made = {
        str(k): (
            Decision(torch.tensor(v).reshape(-1, *shape), scores=torch.zeros(len(v)), log_prob=torch.zeros(len(v))),
        )
        for k, v in enumerate(values)
    }
    return Trace(made, (), (), len(values[0]))


def misses() -> dict[str, float]:
    """How far each reward is from its formula, worked out by hand."""
    y, target = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    loss = [torch.log1p(torch.tensor(-2.0).exp()).item(), 2 + torch.log1p(torch.tensor(-2.0).exp()).item()]
    three = trace([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found: dict[str, tuple[Tensor, list[float] | list[list[float]]]] = {}
    found["BlockDrop"] = losses.BlockDropReward(gamma=5)(y, three, target), [1 - (2 / 3) ** 2, -5.0]
    saved = [[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]  # blocks skipped from each gate on
    found["SkipNet"] = (
        losses.SkipNetReturns(alpha=0.6)(y, three, target),
        [[-(loss[r] - 0.2 * row[r]) for r in (0, 1)] for row in saved],
    )
    kept = Decision(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), scores=torch.zeros(2, 3), log_prob=torch.zeros(2))
    steps = Trace({"a": (kept,), "b": (kept,)}, (), (), 2)
    found["RNP"] = (
        losses.StepPenalty(penalty=0.1)(y, steps, target),
        [[-0.3, -0.1], [-0.3 - loss[0], -0.1 - loss[1]]],
    )
    half = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
    sure = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log()
    frames = Trace(trace([[0.0, 0.0]]).visits, (Exit(half), Exit(sure)), (), 2)
    found["video, margin gained"] = losses.MarginGain(price=0.1)(y, frames, target), [[0.8 - 0.1, -0.1]]
    found["general"] = losses.Priced(0.3, cost=losses.used)(y, three, target), [1 - 0.2, -0.1]
    return {name: (got - torch.tensor(wanted)).abs().max().item() for name, (got, wanted) in found.items()}


def priced(lab: Lab, target: float, seed: int) -> float:
    """Mean cost of the sampled decisions in the last quarter of training under a price that adapts to ``target``."""
    price, seen = losses.Dual(target, rate=0.02), []
    policy = losses.Reinforce(losses.Priced(price, gain=losses.minus_loss), baseline=losses.MovingAverage())
    terms = Total(
        {"task": (1.0, losses.CrossEntropy()), "policy": (1.0, policy), "explore": (0.1, losses.EntropyBonus())}
    )

    def loss(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        cost = losses.spent(trace)
        price.update(cost)
        seen.append(cost.mean().item())
        return sum(terms(y, trace, target, 0.0).values(), torch.zeros(()))

    net = _flag.net(estimators.ScoreFunction(rules.Threshold(0.0)), seed=seed)
    _flag.train(net, seed=seed, loss=loss, steps=STEPS)
    lab.progress("prices", len(seen), STEPS)
    return mean(seen[-len(seen) // 4 :])


def run(lab: Lab) -> list[Claim]:
    off = misses()
    costs = {target: [priced(lab, target, seed) for seed in SEEDS] for target in TARGETS}
    miss = [abs(cost / target - 1) for target, found in costs.items() for cost in found]
    said = "; ".join(
        f"{target:.0%}: " + ", ".join(f"{100 * c:.1f}" for c in found) + " %" for target, found in costs.items()
    )
    return [
        Claim("rewards of hand-made traces are their formulas' values", f"{max(off.values()):.1e} off at most", "<= 1e-6", max(off.values()) <= 1e-6,
              list(off.values()), ", ".join(off)),
        Claim("flag task: dual ascent on the price hits three mean costs without retuning (share of dense FLOPs)", said,
              "within 5 % of the target", max(miss) <= 0.05, miss, f"mean over the last quarter of {STEPS:,} steps, with an entropy bonus of 0.1."
              " Tried: no bonus, rate 0.02,"
              " 3,000 steps, targets 30, 45 and 60 %: 6.7 and 30.3, 53.5 and 53.5, 54.1 and 53.9 %; a bonus of 0.05 and rate 0.05: 30.2 and 6.6, 30.0"
              " and 30.1, 39.6 and 39.9 %; a sure policy draws nothing that a price could move, and at price 0 the task itself asks for 54 %, so"
              " nothing above can be hit"),
    ]  # fmt: skip
