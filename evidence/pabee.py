"""PABEE: when a text may leave, what patience keeps, and the regression form on a made task."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from _common import percent, seeded, trained
from _texts import LENGTH, adamw, news
from torch import Tensor

from pliant import bind, create_model, record, rules, scores
from pliant.data import Dataset
from pliant.execute import Exits
from pliant.losses import MultiExit, Total, by_depth
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy
from pliant.train import fit

LAYERS, EPOCHS, SEEDS = 6, 4, (0, 1)
DATA = f"AG News, small part: 5,130 training and 1,520 test articles, first {LENGTH} words; {LAYERS} layers of 64, from scratch; a made regression"


def patient(model: Exits, t: int) -> Exits:
    """The chain whose rows leave when ``t`` classifiers in a row have agreed."""
    return bind(model, {"*": (scores.Patience(t), rules.Threshold(0.0))})


@torch.no_grad()
def layer(model: Exits, x: Tensor) -> Tensor:
    """The layer after which every row left, from 1."""
    _, trace = record(model)(x)
    return 1 + torch.stack([trace.dense(site) for site in trace]).sum(0)


def differ(model: Exits, x: Tensor) -> int:
    """Rows whose layer or class isn't that of the row alone."""
    with torch.no_grad():
        whole, said = layer(model, x), model(x).argmax(-1)
        return sum(
            int(layer(model, r[None])[0] != w) + int(model(r[None]).argmax(-1)[0] != s)
            for r, w, s in zip(x, whole, said, strict=True)
        )


class Squared:
    """Every classifier's squared error, weighed by depth."""

    def __call__(self, y: Tensor, trace, target: Tensor, progress: float) -> Tensor:
        weights = by_depth(LAYERS)
        return sum(
            w * (e.logits.squeeze(1) - target).square().mean() for w, e in zip(weights, trace.exits, strict=True)
        )


class Sums(NamedTuple):
    x: Tensor
    y: Tensor


def sums(rows: int, seed: int) -> Sums:
    """Texts of 6 to 12 words out of 20, each word worth a number; the target is their sum."""
    g = torch.Generator().manual_seed(seed)
    worth = torch.randn(20, generator=torch.Generator().manual_seed(9)) / 3
    x = torch.randint(1, 20, (rows, 12), generator=g)
    x[torch.arange(12) >= torch.randint(6, 13, (rows, 1), generator=g)] = 0
    return Sums(x, (worth[x] * (x != 0)).sum(1))


def run(lab: Lab) -> list[Claim | Table]:
    data: Dataset = news(lab)
    lost, share, early, back, apart, table = [], [], [], [], [], []
    for seed in SEEDS:
        model = seeded(
            seed,
            lambda: create_model(
                "pabee",
                num_classes=len(data.classes),
                words=len(data.vocabulary),
                layers=LAYERS,
                length=LENGTH,
                dropout=0.2,
            ),
        )
        loss = Total({"exits": (1.0, MultiExit(by_depth(LAYERS)))})
        trained(lab, f"seed {seed}", model, data, [adamw(EPOCHS)], loss=loss, seed=seed)
        full, before, kept = accuracy(patient(model, LAYERS), data.test)[0], None, []
        for t in range(1, LAYERS):
            ours = patient(model, t)
            here = layer(ours, data.test.x)
            got = accuracy(ours, data.test)[0]
            kept.append((full - got, float(here.mean()) / LAYERS))
            table.append((seed, t, kept[-1][1], got, full))
            early.append(int((here < t + 1).sum()))
            back.append(0 if before is None else int((here < before).sum()))
            apart.append(differ(ours, data.test.x[:64]))
            before = here
        best = min(k for k in kept if k[1] <= 0.75)
        lost.append(best[0])
        share.append(best[1])
    errors, depths = [], []
    model = seeded(
        0, lambda: create_model("pabee", num_classes=1, words=20, layers=LAYERS, width=32, length=12, dropout=0.0)
    )
    fit(model, sums(3000, 1), Total({"task": (1.0, Squared())}), [adamw(8)])
    model.eval()
    lab.progress("regression", 1, 1)
    test = sums(1000, 3)
    taus = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
    for tau in taus:
        ours = bind(model, {"*": (scores.Steady(1, tau=tau), rules.Threshold(0.0))})
        with torch.no_grad():
            errors.append(float((ours(test.x).squeeze(1) - test.y).square().mean()))
        depths.append(float(layer(ours, test.x).mean()))
    pairs = list(pairwise(errors)), list(pairwise(depths))
    return [
        Claim("no text leaves before layer t + 1", f"{sum(early)} of all texts and patiences", "0", not any(early), early),
        Claim("a higher patience never lets a text leave earlier", f"{sum(back)}", "0", not any(back), back),
        Claim("batches have the layers and classes of single texts", f"{sum(apart)} differ of {64 * len(apart)}", "0", not any(apart), apart),
        Claim("some patience keeps the last layer's accuracy at 75 % of the layers or less", f"{percent(lost)} points lost at {percent(share)} %",
              "<= 0.3 points", max(lost) <= 0.003, lost),
        Claim("regression: the smaller tau, the deeper", ", ".join(f"{d:.2f}" for d in depths), "rising", all(a <= b for a, b in pairs[1]), depths,
              f"mean layers at tau = {taus}"),
        Claim("regression: the smaller tau, the smaller the error", ", ".join(f"{e:.4f}" for e in errors), "falling", all(a >= b for a, b in pairs[0]), errors,
              "mean squared error of a sum of words' numbers; its variance is about 1"),
        Table("Mean depth as a share of the layers, accuracy, and accuracy at full depth", ("seed", "patience", "depth", "accuracy", "full"), table),
    ]  # fmt: skip
