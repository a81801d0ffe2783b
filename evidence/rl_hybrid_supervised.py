"""Hybrid training of gates: relaxed first, then supervision and the policy's gradient at once."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from _common import LAST_ONLY, fashion, percent, phase, seeded, told, trained
from _gated import small, values
from torch import nn

import pliant
from pliant import estimators, losses, rules
from pliant.data import Dataset
from pliant.losses import Total
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy
from pliant.train import relaxed_to_hybrid

ROWS, SEEDS, EPOCHS, DEPTH, ALPHA = 5_000, (0, 1), (5, 5), 20, 1.5
DATA = told(ROWS, f"; a ResNet-{DEPTH} of half the width with a gate at every block (the bound's is like a ResNet-38)")
RELAXED = {"*": estimators.StraightThrough(rules.Threshold(0.0))}
SAMPLED = {"*": estimators.ScoreFunction(rules.Threshold(0.0))}


def hybrid() -> Total:
    """SkipNet's objective; the batch's other rows are the baseline, which SkipNet has none of."""
    return Total({"hybrid": (1.0, losses.Hybrid(alpha=ALPHA, baseline=losses.LeaveOneOut()))})


def after(model: Any, data: Dataset) -> tuple[float, float]:
    """Test accuracy and share of blocks that run, thresholded at probability 0.5."""
    decided = pliant.bind(model.eval(), {"*": rules.Threshold(0.0)})
    return accuracy(decided, data.test)[0], values(decided, data).mean().item()


def equal_to_plain() -> float:
    """The largest difference between the hybrid's gradient with alpha 0, all gates on, and plain training's."""
    model = seeded(0, lambda: small(8)).eval()  # batch norms by their statistics: both passes see the same
    x, target = torch.randn(8, 1, 28, 28), torch.arange(8)
    y, trace = pliant.record(pliant.bind(model, {"*": rules.Always()}))(x)
    parameters = [p for name, p in model.named_parameters() if "scorer" not in name]
    got = torch.autograd.grad(losses.Hybrid(alpha=0.0)(y, trace, target, 0.0), parameters)
    wanted = torch.autograd.grad(nn.functional.cross_entropy(pliant.plain(model)(x), target), parameters)
    return max((a - b).abs().max().item() for a, b in zip(got, wanted, strict=True))


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    settings = phase(1, lr=0.1)
    relaxed, both, scratch = [], [], []
    for seed in SEEDS:
        first, second = relaxed_to_hybrid(
            settings=settings, relaxed=RELAXED, sampled=SAMPLED, hybrid=hybrid(), epochs=EPOCHS, slower=0.5
        )
        model = trained(
            lab,
            f"relaxed, seed {seed}",
            seeded(seed, lambda: small(DEPTH)).train(),
            data,
            [first],
            loss=LAST_ONLY,
            seed=seed,
        )
        relaxed.append(after(model, data))
        both.append(
            after(trained(lab, f"hybrid, seed {seed}", model.train(), data, [second], loss=LAST_ONLY, seed=seed), data)
        )
        alone = phase(sum(EPOCHS), lr=0.1, rules=SAMPLED, loss=hybrid())
        model = seeded(seed, lambda: small(DEPTH)).train()
        scratch.append(
            after(trained(lab, f"from scratch, seed {seed}", model, data, [alone], loss=LAST_ONLY, seed=seed), data)
        )
    fewer = [a[1] - b[1] for a, b in zip(relaxed, both, strict=True)]
    lost = [a[0] - b[0] for a, b in zip(relaxed, both, strict=True)]
    ahead = [a[0] - b[0] for a, b in zip(both, scratch, strict=True)]
    miss = equal_to_plain()

    def said(found: list[tuple[float, float]]) -> str:
        return ", ".join(f"{100 * right:.2f} % with {100 * rate:.1f} % of the blocks" for right, rate in found)

    note = f"relaxed: {said(relaxed)}; hybrid: {said(both)}; from scratch: {said(scratch)}"
    return [
        Claim("the second stage runs fewer blocks than the first", f"{percent(fewer)} points", ">= 15 points", mean(fewer) >= 0.15, fewer, note),
        Claim("and accuracy stays", f"{percent(lost)} points lost", "<= 1 point", mean(lost) <= 0.01, lost),
        Claim("both stages beat the policy's gradient from scratch in as many epochs", f"{percent(ahead)} points", ">= 2 points", mean(ahead) >= 0.02, ahead,
              f"blocks run: {', '.join(f'{100 * r:.1f}' for _, r in both)} % and {', '.join(f'{100 * r:.1f}' for _, r in scratch)} %"),
        Claim("with alpha 0 and all gates on, its gradient is plain training's", f"{miss:.1e} apart", "equal (1e-6)", miss <= 1e-6, [miss]),
    ]  # fmt: skip
