"""Thresholds for ten budgets on a chain of four exits, and the solvers against an exhaustive search."""

from __future__ import annotations

import itertools

import torch
from _chains import chain
from _common import fashion, held, phase, seeded, told, trained

from pliant.reproduce import Claim, Lab, Table
from pliant.scores import MaxProbability
from pliant.tune import HeldOut, controlled, geometric, lagrangian, lost, search

ROWS, EPOCHS, SEEDS = 3_000, 4, (0, 1)
DATA = told(ROWS, "; four exits. The optimum is over made scores")
BUDGETS = [0.3 + 0.6 * k / 9 for k in range(10)]
SOLVERS = {"geometric": geometric, "search": search, "lagrangian": lagrangian}


def build():
    return chain((8, 16, 24, 32), halve=(0, 2))


def made(seed: int, rows: int = 500) -> HeldOut:
    """A made chain whose later exits are better and whose scores tell right from wrong, imperfectly."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (rows,), generator=g)
    strength = 4 * (torch.arange(1, 5)[:, None] / 4 - torch.rand(rows, generator=g) + 0.5)
    logits = torch.randn(4, rows, 5, generator=g)
    logits.scatter_add_(2, labels.expand(4, rows)[..., None], strength[..., None])
    scores = torch.stack([MaxProbability()(z) for z in logits[:-1]])
    return HeldOut(tuple("abc"), logits, scores, labels, torch.tensor([20, 45, 70, 100]))


def exhaustive(h: HeldOut, flops: float) -> float:
    """The best accuracy over 20^3 thresholds, quantiles of the scores and -inf."""
    q = torch.linspace(0, 1, 19)
    every = torch.tensor(list(itertools.product(*([*s.quantile(q).tolist(), float("-inf")] for s in h.scores))))
    left, right, cost = torch.ones(len(every), len(h.labels)), torch.zeros(len(every)), torch.zeros(len(every))
    for k in range(4):
        leaves = left * (h.scores[k] <= every[:, k : k + 1]) if k < 3 else left
        right += leaves @ h.correct[k].float()
        cost += leaves.sum(1) * h.flops[k]
        left = left - leaves
    return float(right[cost <= flops * len(h.labels)].max()) / len(h.labels)


def shuffled(h: HeldOut) -> HeldOut:
    order = torch.randperm(len(h.labels), generator=torch.Generator().manual_seed(7))
    return HeldOut(h.sites, h.logits[:, order], h.scores[:, order], h.labels[order], h.flops)


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    off: dict[str, list[float]] = {name: [] for name in SOLVERS}
    moved, rows, risks = [], [], []
    for seed in SEEDS:
        model = seeded(seed, build)
        trained(lab, f"seed {seed}", model, data, [phase(EPOCHS)], seed=seed)
        val, test = held(model, data)
        dense = float(val.flops.max())
        low = float(val.flops.min()) / dense
        for number, budget in enumerate(BUDGETS):
            for name, solve in SOLVERS.items():
                thresholds = solve(val, budget * dense)
                accuracy, flops = test.evaluate(thresholds)
                spread = test.spread(thresholds)
                off[name].append(abs(flops / dense - budget))
                rows.append(
                    [f"seed {seed}, {name}", budget, flops / dense, accuracy, *(v / dense for v in spread.values())]
                )
                if number == 4:
                    moved.append(float((solve(shuffled(val), budget * dense) != thresholds).sum()))
            lab.progress(f"seed {seed}: budgets, the first exit costs {low:.0%}", number + 1, len(BUDGETS))
        thresholds = controlled(val, 0.02, delta=0.1)
        risks.append(lost(test, test.leaves(thresholds)).mean().item())
    sets = [(made(seed), budget) for seed in range(4) for budget in (35.0, 50.0, 70.0)]
    accuracies = {name: [h.evaluate(solve(h, b))[0] for h, b in sets] for name, solve in SOLVERS.items()}
    best = [exhaustive(h, b) for h, b in sets]
    short = [b - a for a, b in zip(accuracies["lagrangian"], best, strict=True)]
    worse = [g - a for a, g in zip(accuracies["lagrangian"], accuracies["geometric"], strict=True)]
    return [
        *(Claim(f"realised test cost is within 3 points of each of ten budgets from 30 % to 90 % ({name})",
                f"{100 * max(each):.2f} points off at most", "<= 3 points", max(each) <= 0.03, each)
          for name, each in off.items()),
        Claim("on made scores the Lagrangian solver is never worse than the geometric one",
              f"{100 * max(worse):+.2f} points at the worst of {len(sets)} sets and budgets",
              "<= 0", max(worse) <= 0, worse),
        Claim("and within 0.2 point of the best of 20^3 thresholds",
              f"{100 * max(short):+.2f} points short at the worst", "<= 0.2 points", max(short) <= 0.002, short),
        Claim("thresholds that change when the held-out rows are shuffled", f"{sum(moved):.0f}", "0", not any(moved), moved),
        Claim("share of test rows that lose a right answer, thresholds controlled for 2 % with delta 10 %",
              ", ".join(f"{100 * r:.2f} %" for r in risks), "<= 2 %", max(risks) <= 0.02, risks),
        Table("Cost on the test part as a share of the dense FLOPs: asked, realised, and its spread over images",
              ("solver", "budget", "cost", "accuracy", "p50", "p95", "max"), rows, ("cost", "accuracy")),
    ]  # fmt: skip
