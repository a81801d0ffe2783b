"""Every exit criterion under every solver on one chain of four exits, and which figure of a score foretells its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from _chains import chain
from _common import fashion, held, phase, seeded, told, trained
from torch import Tensor

import pliant
from pliant import scores
from pliant.insight.calibration import calibration
from pliant.insight.overthinking import auroc
from pliant.reproduce import Claim, Lab, Table
from pliant.tune import HeldOut, fit_temperature, geometric, lagrangian, search

ROWS, SEEDS, BUDGETS, SLACK = 6_000, (0, 1, 2), (0.3, 0.5, 0.7), 0.005
DATA = told(ROWS, "; a chain of four exits, trained for 4 and for 12 epochs")
SOLVERS: dict[str, Callable[[HeldOut, float], Tensor]] = {
    "geometric": geometric, "search": search, "lagrangian": lagrangian,
}  # fmt: skip
CRITERIA: dict[str, Callable[[], Any]] = {
    "max probability": scores.MaxProbability, "max probability, calibrated": scores.MaxProbability,
    "entropy": scores.Entropy, "margin": scores.Margin, "patience 1": lambda: scores.Patience(1),
    "patience 2": lambda: scores.Patience(2),
}  # fmt: skip


def calibrated(model: Any, val: HeldOut) -> None:
    """Fit each exit's temperature on all held-out rows: no thresholds are chosen yet."""
    for k, site in enumerate(pliant.sites(model).values()):
        site.scorer.temperature.fill_(fit_temperature(val.logits[k], val.labels))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def blind(test: HeldOut, thresholds: Tensor) -> float:
    """Accuracy of random rows sent to the exits in the same numbers."""
    shares = torch.bincount(test.leaves(thresholds), minlength=len(test.flops)) / len(test.labels)
    return float((shares.double() * test.correct.double().mean(1)).sum())


def share_needed(val: HeldOut, test: HeldOut) -> float:
    """The least share of dense FLOPs at which thresholds from held-out data keep test accuracy near the last exit's."""
    wanted = test.correct[-1].double().mean().item() - SLACK
    low, dense = float(val.flops[0]), float(val.flops[-1])
    for k in range(1, 41):
        right, cost = test.evaluate(geometric(val, low + (dense - low) * k / 41))
        if right >= wanted:
            return cost / dense
    return 1.0


def figures(test: HeldOut) -> tuple[float, float, float]:
    """ECE of the probabilities, AUROC and area under risk and coverage of the scores: means over the inner exits."""
    found = []
    for k in range(len(test.scores)):
        wrong = ~test.correct[k]
        order = test.scores[k].argsort(stable=True)
        risk = wrong[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
        ece = calibration(test.logits[k].softmax(-1), test.labels).ece
        found.append((ece, auroc(test.scores[k], wrong), risk.mean().item()))
    return tuple(mean(f[i] for f in found) for i in range(3))  # pyright: ignore[reportReturnType]


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation, ties by their mean rank."""
    ranks = []
    for values in (a, b):
        v = torch.tensor(values, dtype=torch.float64)
        ranks.append((v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1))
    return torch.corrcoef(torch.stack([r.double() for r in ranks]))[0, 1].item()


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    gained: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    points: dict[str, list[tuple[float, ...]]] = {name: [] for name in CRITERIA}
    for seed in SEEDS:
        for epochs in (4, 12):
            net = seeded(seed, lambda: chain((16, 24, 32, 48), halve=(0, 2), size=2))
            trained(lab, f"{epochs} epochs, seed {seed}", net, data, [phase(epochs)], seed=seed)
            for name, make in CRITERIA.items():
                model = pliant.bind(net, {"*": make()})
                if "calibrated" in name:
                    calibrated(model, held(model, data)[0])
                val, test = held(model, data)
                # Probabilities as the score reads them, so that ECE is of what decides.
                if "calibrated" in name:
                    heat = torch.tensor([float(s.scorer.temperature) for s in pliant.sites(model).values()] + [1.0])  # pyright: ignore
                    test = replace(test, logits=test.logits / heat[:, None, None])
                points[name].append((*figures(test), share_needed(val, test)))
                for solver, solve in SOLVERS.items():
                    for budget in BUDGETS:
                        thresholds = solve(val, budget * float(val.flops[-1]))
                        right, _ = test.evaluate(thresholds)
                        gained.setdefault((name, solver, budget), []).append((right, right - blind(test, thresholds)))
    lines: list[list[str | float]] = []
    for name in CRITERIA:
        for solver in SOLVERS:
            cells = [gained[name, solver, budget] for budget in BUDGETS]
            lines.append([
                f"{name}, {solver}", *(100 * mean(a for a, _ in cell) for cell in cells),
                *(100 * mean(g for _, g in cell) for cell in cells),
            ])  # fmt: skip
    every = [p for found in points.values() for p in found]
    told_by = {
        figure: spearman([p[i] for p in every], [p[3] for p in every])
        for i, figure in enumerate(("ECE", "AUROC", "AURC"))
    }
    quality: list[list[str | float]] = [
        [name, *(mean(p[i] for p in found) for i in range(3)), 100 * mean(p[3] for p in found)] for name, found in points.items()
    ]  # fmt: skip
    worst = min(gained, key=lambda key: mean(g for _, g in gained[key]))
    gap = mean(g for _, g in gained[worst])
    return [
        Table(f"Exit criteria and solvers, means of {len(SEEDS)} seeds at two lengths of training",
              ("criterion, solver", *(f"accuracy at {b:.0%}, %" for b in BUDGETS), *(f"over random exits at {b:.0%}, points" for b in BUDGETS)),
              lines, ("accuracy at 30%, %", "accuracy at 70%, %")),
        Table(f"What a score is worth: mean figures of the inner exits, and FLOPs needed to come within {100 * SLACK:.1f} points of the last exit",
              ("criterion", "ECE", "AUROC", "AURC", "share of dense FLOPs, %"), quality, ("AURC", "share of dense FLOPs, %")),
        Table("Which figure foretells the cost at fixed accuracy: rank correlation over criteria, seeds and lengths of training",
              ("figure", "Spearman"), [[figure, value] for figure, value in told_by.items()]),
        Claim("every criterion beats random exits with the same histogram, under every solver, at every budget",
              f"{100 * gap:+.2f} points ({worst[0]}, {worst[1]}, {worst[2]:.0%})", "> 0", gap > 0, [gap]),
        Claim("order inside an exit (AUROC or AURC) foretells the cost better than calibration (ECE)",
              ", ".join(f"{k} {v:+.2f}" for k, v in told_by.items()), "|AUROC| or |AURC| above |ECE|",
              max(abs(told_by["AUROC"]), abs(told_by["AURC"])) > abs(told_by["ECE"]), list(told_by.values())),
    ]  # fmt: skip
