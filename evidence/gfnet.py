"""GFNet: a small digit in a large cluttered scene, found by a policy and read at full resolution."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from _common import LAST_ONLY, percent, phase, seeded, trained
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import bind, create_model, record, rules, sites
from pliant.core.site import Outcome
from pliant.cost import interleaved
from pliant.data import Split, load
from pliant.execute.heads import PooledClassifier
from pliant.losses import Critic, MultiExit, Reinforce, Total, ValueLoss, learned
from pliant.losses.rewards import to_go
from pliant.reproduce import Claim, Lab, Table
from pliant.study import batches
from pliant.systems.backbones import resnet
from pliant.tune import collect, search
from pliant.tune.held_out import run as really

torch.set_num_threads(1)
ROWS, SEEDS, SIDE, DRAWN, SIZE, STEPS, PIECES = 3_500, (0,), 96, 18, 32, 4, 10
EPOCHS = {"random places": 6, "policy": 6, "fine-tuned": 2, "backbone": 3}
DATA = (
    f"made of UCI's digits: one drawn {DRAWN} pixels wide anywhere on {SIDE} by {SIDE}, with {PIECES} pieces of 9 pixels torn from others; "
    f"patches of {SIZE}; {ROWS:,} training, 1,500 held-out and 2,000 test scenes"
)
WIDTHS = (8, 16, 32)


def scenes(lab: Lab, part: str, rows: int, seed: int) -> Split:
    """Scenes and the classes of their digits."""
    split = getattr(load("digits", lab.root), part)
    g = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    digits = F.interpolate((split.x - split.x.min()) / (split.x.max() - split.x.min()), size=DRAWN, mode="bilinear")
    pick, torn = draw(len(digits), rows), draw(len(digits), rows, PIECES)
    cut, put, at = draw(DRAWN - 8, rows, PIECES, 2), draw(SIDE - 8, rows, PIECES, 2), draw(SIDE - DRAWN + 1, rows, 2)
    x = torch.zeros(rows, 1, SIDE, SIDE)
    for r in range(rows):
        for k in range(PIECES):
            (i, j), (top, left) = cut[r, k].tolist(), put[r, k].tolist()
            x[r, :, top : top + 9, left : left + 9] = digits[torn[r, k], :, i : i + 9, j : j + 9]
        top, left = at[r].tolist()
        x[r, :, top : top + DRAWN, left : left + DRAWN] = digits[pick[r]]
    return Split(x - 0.1, split.y[pick])


class Gains:
    """What each look brings: the true class's probability less that before it, discounted from there on, normalised."""

    def __call__(self, y: Tensor, trace: Any, target: Tensor) -> Tensor:
        p = torch.stack([e.logits.softmax(-1).gather(1, target[:, None])[:, 0] for e in trace.exits])
        found = to_go(p[1:] - p[:-1], 0.7)
        return (found - found.mean()) / (found.std() + 1e-6)


class Middle(rules.Rule):
    """The middle, always."""

    reads_scores = False

    def forward(self, scores: Tensor) -> Outcome:
        return Outcome(torch.full_like(scores, 0.5), weight=True)


ALL = Total({"exits": (1.0, MultiExit())})
POLICY = Total({"policy": (1.0, Reinforce(Gains(), baseline=learned)), "value": (0.5, ValueLoss(Gains()))})


def adam(name: str, **more: Any) -> Any:
    return phase(EPOCHS[name], name=name, optimizer="adam", momentum=0.0, nesterov=False, weight_decay=0.0, **more)


def glancing() -> nn.Module:
    """GFNet with a critic beside its policy."""
    model = create_model("gfnet", in_chans=1, size=SIZE, steps=STEPS, widths=WIDTHS, hidden=64, policy=64)
    regions = [site for path, site in sites(model).items() if "region" in path]
    critic = Critic(regions[0].scorer, PooledClassifier(WIDTHS[-1], 1))
    for site in regions:
        site.scorer = critic
    return model


def run(lab: Lab) -> list[Claim | Table]:
    train, val, test = scenes(lab, "train", ROWS, 0), scenes(lab, "train", 1500, 1), scenes(lab, "test", 2000, 2)
    data: Any = SimpleNamespace(train=train, val=val, test=test)
    anywhere = {"stages.*": rules.Uniform()}
    model = seeded(0, glancing)
    phases = [
        adam("random places", lr=2e-3, schedule="cosine", rules=anywhere, train=("*", "!*scorer*")),
        adam("policy", lr=1e-3, schedule="constant", train=("*scorer*",), loss=POLICY),
        adam("fine-tuned", lr=1e-3, schedule="cosine", train=("*", "!*scorer*")),
    ]
    trained(lab, "GFNet", model, data, phases, loss=ALL)
    steps = {"policy": by_step(model, test)}
    steps["random"] = by_step(bind(model, {"stages.*": rules.Uniform(torch.Generator().manual_seed(0))}), test)
    steps["centre"] = by_step(bind(model, {"stages.*": Middle()}), test)
    base = seeded(0, lambda: resnet(10, 1, depth=8, widths=WIDTHS).model())
    trained(lab, "backbone on whole scenes", base, data, [adam("backbone", lr=2e-3, schedule="cosine")], loss=LAST_ONLY)
    held, tested = collect(model, batches(val)), collect(model, batches(test))
    off, gain, rows = [], [], []
    for share in (0.4, 0.55, 0.7, 0.85):
        budget = share * float(held.flops[-1])
        set_(model, held.sites, search(held, budget))
        right, flops, _ = really(model, batches(test))
        mean = float(flops.double().mean())
        off.append(abs(mean / budget - 1))
        same = tested.correct[int((tested.flops - mean).abs().argmin())].double().mean()
        gain.append(right - float(same))
        rows.append((share, mean / 1e6, right, float(same)))
    whole = [
        float((torch.cat([base(x).argmax(-1) for x in part.x.split(250)]) == part.y).double().mean())
        for part in (val, test)
    ]
    point, times = timed(model, base, held, test, whole[0])
    p, r, c = (steps[name] for name in ("policy", "random", "centre"))
    return [
        Claim("accuracy rises with every look", percent(p), "rises", all(b > a for a, b in pairwise(p)), p),
        Claim("from the second look on the policy's places are better than random ones", percent([a - b for a, b in zip(p[1:], r[1:], strict=True)]),
              "> 0 points", all(a > b for a, b in zip(p[1:], r[1:], strict=True)), r),
        Claim("and than the centre", percent([a - b for a, b in zip(p[1:], c[1:], strict=True)]), "> 0 points",
              all(a > b for a, b in zip(p[1:], c[1:], strict=True)), c),
        Claim("with thresholds for a mean cost from held-out scenes, the cost on test scenes is near it", f"{percent(off)} % off",
              "<= 5 %", max(off) <= 0.05, off, "off the cost that was asked for"),
        Claim("and accuracy is above always taking the number of looks of the nearest cost", f"{percent(gain)} points", "> 0", min(gain) > 0, gain),
        Claim("time per scene (one by one) at the whole-scene backbone's accuracy is below the backbone's",
              f"{times[0] / times[1]:.2f} times at {100 * point:.2f} % against {100 * whole[1]:.2f} %", "< 1 times, no less accurate",
              times[0] < times[1] and point >= whole[1], [*times, point, whole[1]],
              "the cheapest budget that is as accurate on held-out scenes, or all looks where none is"),
        Table("Accuracy after each look", ("places", *(f"look {k + 1}" for k in range(STEPS))), [(name, *found) for name, found in steps.items()]),
        Table("Budgets", ("share of all looks", "MFLOPs", "accuracy", "accuracy of a fixed number of looks"), rows),
    ]  # fmt: skip


@torch.no_grad()
def by_step(model: nn.Module, test: Split) -> list[float]:
    """Accuracy after each look, all taken."""
    every = record(bind(model, {"sites.*": rules.Always()}))
    found = [torch.stack([e.logits.argmax(-1) for e in every(x)[1].exits]) for x in test.x.split(250)]
    return (torch.cat(found, 1) == test.y).double().mean(1).tolist()


def set_(model: nn.Module, paths: Any, thresholds: Tensor) -> None:
    for path, threshold in zip(paths, thresholds, strict=True):
        sites(model)[path].rule.threshold.fill_(threshold)


@torch.no_grad()
def timed(
    model: nn.Module, base: nn.Module, held: Any, test: Split, wanted: float
) -> tuple[float, tuple[float, float]]:
    """At the cheapest budget that is as accurate on held-out scenes as wanted: test accuracy, and seconds of both, one by one."""
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        thresholds = search(held, max(share * float(held.flops[-1]), float(held.flops[0])))
        if held.evaluate(thresholds)[0] >= wanted:
            break
    set_(model, held.sites, thresholds)
    one = test.x[:200].split(1)
    calls = {"ours": lambda: [model(x) for x in one], "whole": lambda: [base(x) for x in one]}
    found = interleaved(calls, rounds=5, clock=time.thread_time)
    return really(model, batches(test))[0], (found["ours"].minimum / 200, found["whole"].minimum / 200)
