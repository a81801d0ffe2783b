"""DFS: targets met in bit-operations, seven forms against two, and which forms serve as the target falls."""

from __future__ import annotations

import copy
from statistics import mean

import torch
from _common import fashion, percent, phase, right, seeded, told, trained
from torch import nn

import pliant
from pliant.data import Dataset
from pliant.functional.levels import level
from pliant.losses import CrossEntropy, LevelTarget, Total, level_shares
from pliant.reproduce import Claim, Lab, Table
from pliant.systems.depth.dfs import BITS, bit_costs, dfs, start_levels

SEEDS, ROWS, TARGETS = (0, 1, 2), 1500, (0.6, 0.4)
EPOCHS = {"backbone": 5, "gates": 1, "joint": 5}
DATA = told(ROWS, "; ResNet-14 of 8, 16 and 32 channels instead of CIFAR-10 and ResNet-38")
WEIGHT, RATE = 2.0, 0.05  # of the cost, and of joint training
TASK = (1.0, CrossEntropy())


@torch.no_grad()
def measured(model: nn.Module, data: Dataset, costs: list[float]) -> tuple[float, float, list[float]]:
    """Test accuracy, the mean share of bit-operations, and how often each form served."""
    _, trace = pliant.record(model)(data.test.x[:1000])
    levels = torch.cat([level(d.value) for site in trace for d in trace[site]])
    used = torch.bincount(levels, minlength=len(costs)).double() / len(levels)
    return float(right(model, data).float().mean()), float(level_shares(trace, costs)[0].mean()), used.tolist()


def taught(lab: Lab, data: Dataset, seed: int, bits: tuple[int, ...]) -> tuple[dict[float, nn.Module], float]:
    """The backbone, gates on it pushed to full execution, then all together for each target; and the backbone's accuracy."""
    what, found, costs = f"{len(bits) + 2} forms, seed {seed}", {}, bit_costs(bits)
    start = seeded(seed, lambda: dfs(10, 1, depth=14, widths=(8, 16, 32), bits=bits))
    task = Total({"task": TASK})
    trained(lab, f"backbone, {what}", pliant.plain(start), data, [phase(EPOCHS["backbone"])], loss=task, seed=seed)
    dense = float(right(pliant.plain(start.eval()), data).float().mean())
    start_levels(start)
    full = Total({"full": (1.0, LevelTarget(costs, 1.0))})
    trained(
        lab, f"gates, {what}", start, data, [phase(EPOCHS["gates"], lr=0.01, train=("*scorer*",))], loss=full, seed=seed
    )
    for target in TARGETS:
        model = copy.deepcopy(start)
        loss = Total({"task": TASK, "cost": (WEIGHT, LevelTarget(costs, target))})
        trained(lab, f"{target:.0%}, {what}", model, data, [phase(EPOCHS["joint"], lr=RATE)], loss=loss, seed=seed)
        found[target] = model
    return found, dense


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    missed, gained, used, rows, dense = [], [], [], [], []
    for seed in SEEDS:
        (seven, accuracy), (two, _) = (taught(lab, data, seed, bits) for bits in (BITS, ()))
        dense.append(accuracy)
        for target in TARGETS:
            ours, share, forms = measured(seven[target], data, bit_costs())
            other, theirs, _ = measured(two[target], data, bit_costs(()))
            missed.append(share - target)
            gained.append(ours - other)
            used.append(forms)
            rows.append((seed, target, share, ours, theirs, other, *forms))
    high, low = (used[k :: len(TARGETS)] for k in range(len(TARGETS)))
    bits_up = mean(sum(f[1:-1]) for f in low) - mean(sum(f[1:-1]) for f in high)
    skips_up = mean(f[0] for f in low) - mean(f[0] for f in high)
    three = [sum(v >= 0.03 for v in f) for f in used]
    return [
        Claim("share of bit-operations on test images, targets 60 and 40 %: misses", percent(missed) + " points", "within 5 points",
              max(map(abs, missed)) <= 0.05, missed),
        Claim("seven forms against skipping or not, at the same target", percent(gained) + " points", ">= 0 in the mean", mean(gained) >= 0, gained,
              f"dense backbone {percent(dense)} %; what each really spent is in the table"),
        Claim("as the target falls few-bit forms gain before skips do", f"{100 * bits_up:+.1f} points of few-bit forms, {100 * skips_up:+.1f} of skips",
              "few-bit forms gain more", bits_up > skips_up, [bits_up, skips_up]),
        Claim("forms that serve at least 3 % of the time", ", ".join(map(str, three)), ">= 3 of seven", min(three) >= 3, three,
              "computed in floating point: bit-widths save bit-operations, not FLOPs or seconds; only skips save those"),
        Table("What was spent, accuracy, and how often each form served",
              ("seed", "target", "spent", "accuracy", "two forms: spent", "accuracy", "skip", *(f"{b} bits" for b in BITS), "full"), rows),
    ]  # fmt: skip
