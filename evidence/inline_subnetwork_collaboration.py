"""Inline collaboration: later exits that read the logits before them, on a frozen trunk, against the same exits without."""

from __future__ import annotations

import copy
from statistics import mean

import torch
from _chains import accuracies, answers, cifar, four, told_cifar
from _common import percent, phase, seeded, trained

from pliant import create_model, masked, plain, record
from pliant.execute import collaborative, equilibrium
from pliant.reproduce import Claim, Lab

ROWS, EPOCHS, SEEDS = 10_000, (5, 3), (0, 1, 2)
DATA = told_cifar(ROWS)
LATER = ("heads.1.*", "heads.2.*", "heads.3.*")


def added(plain_net: torch.nn.Module, x: torch.Tensor) -> float:
    """FLOPs that collaboration adds to a chain, over those of its trunk (with the last head)."""
    cost = [
        int(record(masked(net))(x)[1].dense_flops[0]) for net in (plain_net, collaborative(copy.deepcopy(plain_net)))
    ]
    return (cost[1] - cost[0]) / int(record(plain(plain_net))(x)[1].flops[0])


def run(lab: Lab) -> list[Claim]:
    data = cifar(lab, ROWS)
    rise, moved, every = [], [], []
    for seed in SEEDS:
        base = equilibrium(seeded(seed, four))
        trained(lab, f"first stage, seed {seed}", base, data, [phase(EPOCHS[0])], seed=seed)
        first = answers(base, data)[0]
        found = []
        for name, net in (("without", copy.deepcopy(base)), ("with", collaborative(copy.deepcopy(base)))):
            later = [phase(EPOCHS[1], lr=0.02, train=LATER)]
            trained(lab, f"{name}, seed {seed}", net, data, later, seed=seed)
            moved.append(float((answers(net, data)[0] != first).sum()))
            found.append(accuracies(net, data))
        every.append([b - a for a, b in zip(*found, strict=True)])
        rise.append(mean(every[-1][1:]))
    small = added(seeded(0, four).eval(), data.test.x[:1])
    large = added(create_model("msdnet").eval(), data.test.x[:1])
    shown = ", ".join(f"{100 * mean(exit):+.2f}" for exit in zip(*every, strict=True))
    return [
        Claim("the first exit's answers don't change", f"{max(moved):.0f} of 4,000 at most", "0", max(moved) == 0, moved),
        Claim("mean accuracy of the later exits rises, against the same heads trained as long without it", f"{percent(rise)} points",
              "> 0 (mean of seeds)", mean(rise) > 0, rise, f"by exit, mean of seeds: {shown} points"),
        Claim("FLOPs added, over the trunk's: MSDNet of seven exits", f"{100 * large:.3f} %", "< 1 %", large < 0.01, [large]),
        Claim("and this chain", f"{100 * small:.3f} %", "< 1 %", small < 0.01, [small]),
    ]  # fmt: skip
