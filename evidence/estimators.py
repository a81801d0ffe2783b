"""Every estimator on one gated network: its gradient on a toy, what it learns on a made task and on Fashion-MNIST."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import _flag
import torch
from _common import LAST_ONLY, always, fashion, phase, seeded, told, trained
from _toy import mean_loss, pairs, quality, through_log_prob, through_value
from torch import Tensor, nn

import pliant
from pliant import create_model, estimators, losses, rules
from pliant.core.trace import Trace
from pliant.data import Dataset
from pliant.losses import CrossEntropy, Total
from pliant.reproduce import Claim, Lab, Table
from pliant.scores import LinearGate
from pliant.study import accuracy, batches

ROWS, SEEDS, RATE, BUDGET, EPOCHS, WEIGHT = 4_000, (0, 1, 2), 0.6, 0.6, 4, 5.0
WIDTHS = (16, 16, 16, 16, 32, 32, 32, 64, 64)  # of what each block of a ResNet-20 reads
COINS = torch.tensor([0.5, -0.3, 0.8])
DATA = told(ROWS, "; and made tasks, see evidence/_flag.py and _toy.py")


@dataclass(frozen=True)
class Way:
    """One way to train the gates.

    Args:
        make: the estimator around a threshold rule at 0.
        terms: of the task's loss beside the cross-entropy, where its gradient comes by the score function.
        baseline: exact, on the toy: what is taken off the loss; None where the gradient passes the value.
        critic: whether each scorer gets a value head.
        anneal: buffers that change over the phase.
    """

    make: Callable[[rules.Threshold], rules.Rule]
    terms: Callable[[], dict[str, tuple[float, Any]]] = dict
    baseline: Callable[[Tensor, Any], float] | None = None
    critic: bool = False
    anneal: dict[str, tuple[float, float]] | None = None


def greedy_loss(coins: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    """What the likelier side of each coin loses."""
    return loss((coins > 0).float()).item()


def reward(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
    """Minus each row's loss; what decisions cost is known exactly, and has its gradient through the soft values."""
    return losses.minus_loss(y, target)


def moving() -> dict[str, tuple[float, Any]]:
    return {"policy": (1.0, losses.Reinforce(reward, baseline=losses.MovingAverage()))}


def learned() -> dict[str, tuple[float, Any]]:
    policy = losses.Reinforce(reward, baseline=losses.learned)
    return {"policy": (1.0, policy), "value": (0.5, losses.ValueLoss(reward))}


def critical() -> dict[str, tuple[float, Any]]:
    return {"policy": (1.0, losses.SelfCritical(reward))}


WAYS = {
    "straight-through, sigmoid": Way(estimators.StraightThrough),
    "straight-through, copy": Way(lambda r: estimators.StraightThrough(r, surrogate=estimators.Copy())),
    "straight-through, stochastic": Way(estimators.StochasticStraightThrough),
    "straight-through, slope 1 to 5": Way(
        lambda r: estimators.StraightThrough(r, surrogate=estimators.HardSigmoid(1.0)), anneal={"*surrogate.slope": (1.0, 5.0)}
    ),
    "binary concrete (Gumbel), hard": Way(estimators.BinaryConcrete),
    "binary concrete, soft in training": Way(estimators.SoftBinaryConcrete),
    "hard concrete": Way(estimators.HardConcrete),
    "improved SemHash": Way(estimators.SemHash),
    "score function, moving baseline": Way(estimators.ScoreFunction, moving, mean_loss),
    "score function, learned baseline": Way(estimators.ScoreFunction, learned, mean_loss, critic=True),
    "score function, self-critical": Way(estimators.ScoreFunction, critical, greedy_loss),
}  # fmt: skip


class Probabilities:
    """The squared miss of each gate's mean probability: for values without a gradient, whose draws come at that rate."""

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        return torch.stack([(d.soft.mean() - RATE) ** 2 for site in trace for d in trace[site]]).mean()


def dense(lab: Lab, data: Dataset, seed: int) -> nn.Module:
    """The network that every estimator starts from, trained with all gates open."""
    model = seeded(seed, lambda: create_model("convnet_aig", depth=20, in_chans=1))
    trained(lab, f"dense, seed {seed}", always(model.train()), data, [phase(4)], loss=LAST_ONLY, seed=seed)
    return model


@dataclass(frozen=True)
class Got:
    """What one trained network does on the test images; ``constant`` is the share of gates that are."""

    seconds: float
    rate: float
    constant: float
    flops: float
    accuracy: float


def gated(lab: Lab, name: str, way: Way, start: nn.Module, data: Dataset, seed: int) -> Got:
    """Train the gates from ``start`` and bring the network to the budget on held-out data."""
    model: Any = pliant.bind(copy.deepcopy(start).train(), {"*": way.make(rules.Threshold(0.0))})
    for site, width in zip(pliant.sites(model).values(), WIDTHS, strict=True) if way.critic else ():
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))
        site.scorer = losses.Critic(site.scorer, head)
    rates = losses.TargetRate(RATE) if way.baseline is None else Probabilities()
    loss = Total({"task": (1.0, CrossEntropy()), "rate": (WEIGHT, rates)} | way.terms())
    began = time.process_time()
    phases = [phase(EPOCHS, lr=0.05, clip=1.0, anneal=way.anneal or {})]
    trained(lab, f"{name}, seed {seed}", model, data, phases, loss=loss, seed=seed)
    seconds = time.process_time() - began
    values: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for x in data.test.x.split(256):
            trace = pliant.record(model)(x)[1]
            for site in trace:
                values.setdefault(site, []).append(trace.dense(site))
    found = [torch.cat(v).mean().item() for v in values.values()]
    pliant.tune(model, batches(data.val), budget=BUDGET)
    got, flops, _ = accuracy(model, data.test)
    share = flops / accuracy(always(model), data.test)[1]
    return Got(seconds, mean(found), mean(float(not 0.02 < r < 0.98) for r in found), share, got)


def flag(way: Way, seed: int) -> _flag.Metrics | None:
    """The made task with a known answer; its loop makes one pass only, so none for the self-critical way."""
    terms = Total({"task": (1.0, CrossEntropy())} | way.terms())
    if terms.further:
        return None
    scorer = losses.Critic(LinearGate(_flag.WIDTH), nn.Linear(_flag.WIDTH, 1)) if way.critic else None
    net = _flag.net(way.make(rules.Threshold(0.0)), seed=seed, scorer=scorer)

    def loss(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        return sum(terms(y, trace, target, 0.0).values(), 0.4 * _flag.spent(trace).mean())

    return _flag.train(net, seed=seed, loss=loss)


def flags_told(found: Sequence[_flag.Metrics | None]) -> list[str | float]:
    """How often the gate equals the flag, and how often it collapsed."""
    known = [f for f in found if f is not None]
    return [mean(f.agreement for f in known), mean(float(f.collapsed) for f in known)] if known else ["-", "-"]


def at_random(start: nn.Module, data: Dataset) -> float:
    """Accuracy of the dense network with blocks skipped blindly at the rate of the budget."""
    coin = pliant.bind(start.eval(), {"*": rules.Random(BUDGET, torch.Generator().manual_seed(0))})
    return accuracy(coin, data.test)[0]


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    starts = {seed: dense(lab, data, seed) for seed in SEEDS}
    plain = [accuracy(always(start.eval()), data.test)[0] for start in starts.values()]
    blind = [at_random(start, data) for start in starts.values()]
    lines: list[list[str | float]] = []
    best: dict[str, float] = {}
    for name, way in WAYS.items():
        reads = through_value if way.baseline is None else through_log_prob(way.baseline(COINS, pairs))
        toy = quality(way.make(rules.Threshold(0.0)), COINS, reads=reads)
        flags = [flag(way, seed) for seed in SEEDS]
        found = [gated(lab, name, way, starts[seed], data, seed) for seed in SEEDS]
        best[name] = mean(f.accuracy for f in found)
        lines.append([
            name, toy.bias, toy.variance**0.5, *flags_told(flags),
            mean(f.constant for f in found), mean(f.rate for f in found), mean(f.flops for f in found),
            100 * best[name], 100 * min(f.accuracy for f in found), mean(f.seconds for f in found),
        ])  # fmt: skip
    lines.append(["random gates", "-", "-", "-", "-", "-", BUDGET, "-", 100 * mean(blind), 100 * min(blind), 0.0])
    lines.append(["dense", "-", "-", "-", "-", "-", 1.0, 1.0, 100 * mean(plain), 100 * min(plain), 0.0])
    unbiased = next(row for row in lines if row[0] == "score function, moving baseline")
    worst = min(best, key=lambda name: best[name])
    gap = best[worst] - mean(blind)
    return [
        Table(
            f"Estimators at the same target rate ({RATE:.0%}) on a gated ResNet-20, means of {len(SEEDS)} seeds",
            ("estimator", "bias of its gradient (toy)", "standard deviation (toy)", "flag task: gate equals flag",
             "flag task: collapsed", "constant gates", "rate of open gates at threshold 0", "FLOPs share, tuned",
             "accuracy at equal FLOPs, %", "worst seed, %", "training, s"),
            lines, ("standard deviation (toy)", "accuracy at equal FLOPs, %"),
        ),
        Claim("the score function's gradient is unbiased on the enumerable toy (bias over the exact gradient's norm)",
              f"{unbiased[1]:.3f}", "<= 0.05", float(unbiased[1]) <= 0.05, [float(unbiased[1])]),
        Claim(f"every estimator's gates beat random gates at {BUDGET:.0%} of the dense FLOPs", f"{100 * gap:+.2f} points ({worst})",
              "> 0", gap > 0, list(best.values())),
    ]  # fmt: skip
