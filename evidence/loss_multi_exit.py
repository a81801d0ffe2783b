"""The loss of all exits: a chain with and without three early exits, and what weights of 0 leave."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import torch
from _chains import accuracies, cifar, four, told_cifar
from _common import percent, phase, seeded, trained

from pliant import plain, record
from pliant.losses import CrossEntropy, MultiExit, Total, by_depth
from pliant.reproduce import Claim, Lab

ROWS, EPOCHS, SEEDS = 10_000, 6, (0, 1, 2)
DATA = told_cifar(ROWS)
LOSSES = {
    "all exits": MultiExit(),
    "by depth": MultiExit(by_depth(4)),
    "last exit only": MultiExit([0.0, 0.0, 0.0, 1.0]),
}


def same_gradients(seed: int) -> bool:
    """Whether early weights of 0 give every stage the gradient of training without early exits, to the bit."""
    net = seeded(seed, four).train()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    prediction, trace = record(net)(x)
    LOSSES["last exit only"](prediction, trace, y, 0.0).backward()
    found = [p.grad.clone() for p in net.stages.parameters()]
    single = plain(seeded(seed, four).train())
    CrossEntropy()(single(x), None, y, 0.0).backward()
    return all(torch.equal(a, p.grad) for a, p in zip(found, single.stages.parameters(), strict=True))


def run(lab: Lab) -> list[Claim]:
    data = cifar(lab, ROWS)
    found: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    for seed in SEEDS:
        for name, term in LOSSES.items():
            net = seeded(seed, four)
            trained(
                lab, f"{name}, seed {seed}", net, data, [phase(EPOCHS)], loss=Total({"exits": (1.0, term)}), seed=seed
            )
            found[name].append(accuracies(net, data))
    steps = [min(b - a for a, b in pairwise(each)) for each in found["all exits"]]
    change = [a[-1] - b[-1] for a, b in zip(found["all exits"], found["last exit only"], strict=True)]
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{100 * mean(exit):.2f}" for exit in zip(*each, strict=True))
        for name, each in found.items()
    )
    equal = [same_gradients(seed) for seed in SEEDS]
    return [
        Claim("exits trained together are ordered by depth, up to half a point",
              f"{100 * min(steps):+.2f} points from an exit to the next, at the worst exit and seed",
              ">= -0.5 points", min(steps) >= -0.005, steps, f"accuracy of every exit, mean of seeds: {shown}"),
        Claim("change of the last exit's accuracy by training three early exits with it", f"{percent(change)} points", "reported", True, change),
        Claim("early weights of 0 give the stages the gradients of training without early exits", f"{sum(equal)} of {len(equal)} networks, to the bit",
              "all", all(equal), [float(e) for e in equal]),
    ]  # fmt: skip
