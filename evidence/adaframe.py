"""AdaFrame on RAMP: a policy that finds the event in four looks, a global memory that tells where it is, a utility that stops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from _clips import EVENT, LENGTH, Clips, anyhow, easyhard, images, ramp, train, truly
from _common import percent
from torch import Tensor, nn

from pliant import bind, losses, record, rules
from pliant.losses import Total
from pliant.reproduce import Claim, Lab, Table
from pliant.systems.clips import Frames, Nothing, Overview
from pliant.systems.temporal.adaframe import glancing

torch.set_num_threads(1)
SEEDS, LOOKS, HIDDEN, STEPS, TESTED, HARD, LEVELS = (0,), 4, 96, 1500, 2000, 10, (0.1, 0.3, 0.6, 1.0, 1.5)
BLIND = 0.33
DATA = (
    f"RAMP of UCI's digits (8x8): {LENGTH} frames of digits 5 to 9, {EVENT} of them one digit from 0 to 4, a gauge of eight pixels above each; "
    f"EASYHARD: {HARD} frames of one digit under noise of {min(LEVELS)} to {max(LEVELS)}; fresh clips in every step, {TESTED} test clips of test images"
)


class Rows(nn.Module):
    """Some rows of each frame, as numbers: the gauge is row 0, the digit the others."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.first : self.last, :].flatten(1)


def encoder(first: int, last: int) -> nn.Sequential:
    """Two linear layers on some rows."""
    inputs = 8 * (last - first)
    return nn.Sequential(Rows(first, last), nn.Linear(inputs, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())


def net(
    first: int, last: int, overview: Any, *, seed: int, steps: int = LOOKS, classes: int = 5, margin: float = 0.7
) -> Any:
    torch.manual_seed(seed)
    frames = Frames(encoder(first, last), 64, overview(), hidden=HIDDEN)
    return glancing(frames, classes, hidden=HIDDEN, steps=steps, std=0.1, patience=steps, margin=margin)


def overview() -> Overview:
    """A memory that sees the gauges of sixteen frames."""
    light = nn.Sequential(Rows(0, 1), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32))
    return Overview(light, 32, 16, hidden=HIDDEN)


REWARD = losses.MarginReturns(0.9)
TERMS = Total({
    "task": (1.0, losses.MultiExit()),
    "policy": (1.0, losses.Reinforce(REWARD, baseline=losses.learned)),
    "utility": (1.0, losses.ValueLoss(REWARD)),
})  # fmt: skip


def looked(model: Any, clips: Clips) -> tuple[float, float]:
    """How often a look hits the event, and the accuracy, with all looks taken."""
    with torch.no_grad():
        y, trace = record(bind(model, {"sites.*": rules.Always()}))(clips.x)
    places = [torch.full_like(clips.truth, 0.5, dtype=torch.float32)]
    places += [trace[f"stages.{k}.site"][0].value for k in range(1, len(model.stages))]
    at = (torch.stack(places, 1) * (LENGTH - 1)).round()
    hit = (at >= clips.truth[:, None]) & (at < clips.truth[:, None] + EVENT)
    return float(hit.any(1).double().mean()), float((y.argmax(1) == clips.y).double().mean())


def found(lab: Lab, what: str, model: Any, told: Any, *, seed: int) -> tuple[float, float]:
    """Hits and accuracy of a trained model."""
    draw, fresh = ramp(images("digits", "train", lab), told), ramp(images("digits", "test", lab), told)
    train(lab, what, bind(model, {"sites.*": rules.Always()}), draw, TERMS, steps=STEPS, lr=2e-3, seed=seed)
    return looked(model.eval(), fresh(TESTED, torch.Generator().manual_seed(99)))


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(t: Tensor) -> Tensor:
        _, inverse, count = t.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[inverse].double()

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def stopping(lab: Lab, seed: int) -> list[tuple[int, float, float, float, float]]:
    """On EASYHARD, for several patiences: mean looks, accuracy, the same by the last look's answer, correlation of looks with noise."""
    model = net(0, 8, Nothing, seed=seed, steps=HARD, classes=10, margin=0.5)
    draw, fresh = (easyhard(images("digits", part, lab), HARD, LEVELS) for part in ("train", "test"))
    train(
        lab,
        "easy and hard clips",
        bind(model, {"sites.*": rules.Always()}),
        draw,
        TERMS,
        steps=STEPS,
        lr=2e-3,
        seed=seed,
    )
    clips, results = fresh(TESTED, torch.Generator().manual_seed(99)), []
    for patience in (1, 2, 3, 5):
        with torch.no_grad():
            y, trace = record(bind(model.eval(), {"sites.*": rules.Threshold(0.5 - patience)}))(clips.x)
        on = [trace.dense(f"sites.{k}") for k in range(HARD - 1) if f"sites.{k}" in trace]
        looks = 1 + torch.stack(on).sum(0)
        last = torch.stack([answers(trace, k) for k in range(HARD)])[looks.long() - 1, torch.arange(TESTED)]
        right, late = (float((found == clips.y).double().mean()) for found in (y.argmax(1), last))
        results.append((patience, float(looks.mean()), right, late, spearman(looks, clips.truth)))
    return results


def answers(trace: Any, k: int) -> Tensor:
    """What each clip's answer was after look k; 0 where it had stopped before."""
    if k >= len(trace.exits):
        return torch.zeros(TESTED, dtype=torch.int64)
    found = trace.exits[k].logits.argmax(1)
    rows = trace.exits[k].rows
    return found if rows is None else torch.zeros(TESTED, dtype=torch.int64).index_copy(0, rows, found)


def run(lab: Lab) -> list[Claim | Table]:
    kinds = {"gauges": truly, "random gauges": anyhow}
    by = {
        what: [found(lab, what, net(0, 9, Nothing, seed=s), told, seed=s) for s in SEEDS]
        for what, told in kinds.items()
    }
    hits, right = ([r[i] for r in by["gauges"]] for i in range(2))
    control, _ = ([r[i] for r in by["random gauges"]] for i in range(2))
    memory = [found(lab, "global memory", net(1, 9, overview, seed=s), truly, seed=s)[0] for s in SEEDS]
    without = [found(lab, "no memory", net(1, 9, Nothing, seed=s), truly, seed=s)[0] for s in SEEDS]
    stops = [stopping(lab, s) for s in SEEDS]
    related = [min(r for *_, r in rows) for rows in stops]
    looks, accuracy = ([[row[i] for row in rows] for rows in stops] for i in (1, 2))
    rising = all(all(a < b for a, b in pairwise(r)) for r in looks)
    kept = [min(b - a for a, b in pairwise(r)) for r in accuracy]
    return [
        Claim(f"RAMP: one of {LOOKS} looks, the first in the middle, hits the event (blind: {100 * BLIND:.0f} %)",
              f"{percent(hits)} %", ">= 85 %", min(hits) >= 0.85, hits),
        Claim("accuracy", f"{percent(right)} %", ">= 85 %", min(right) >= 0.85, right),
        Claim("with random gauges the hits are those of blind looking", f"{percent(control)} %", "<= 40 %", max(control) <= 0.4, control),
        Claim("with gauges that only the global memory sees, hits stay", f"{percent(memory)} %", ">= 70 %", min(memory) >= 0.7, memory),
        Claim("and without that memory they fall to blind looking", f"{percent(without)} %", "<= 40 %", max(without) <= 0.4, without),
        Claim("EASYHARD: the look at which a clip stops goes with its noise (rank correlation, least of all patiences)",
              ", ".join(f"{r:.2f}" for r in related), ">= 0.4", min(related) >= 0.4, related),
        Claim("more patience means more looks", "; ".join(", ".join(f"{n:.2f}" for n in r) for r in looks), "rises", rising, looks[0]),
        Claim("and no less accuracy: the least change from one patience to the next", f"{percent(kept)} points", ">= 0 points", min(kept) >= 0, accuracy[0],
              "the answer is that of the look that promised most, which on EASYHARD is nearly always the first one, since what's promised holds what"
              " the look itself gained: patience then buys nothing; the last look's answer (in the table) gains from it"),
        Table("EASYHARD: what patience buys", ("patience", "mean looks", "accuracy", "accuracy of the last look's answer", "correlation with noise"), stops[0],
              plot=("mean looks", "accuracy")),
    ]  # fmt: skip
