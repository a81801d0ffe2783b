"""Gradient equilibrium: its formula on a linear chain, and how large a ten-exit network's gradients are, block by block."""

from __future__ import annotations

from statistics import mean

import torch
from _chains import chain
from _common import fashion, seeded, told

from pliant import Site, masked, record, rules, scores
from pliant.execute import Exits, equilibrium
from pliant.losses import MultiExit
from pliant.reproduce import Claim, Lab

ROWS, STEPS, BLOCKS, SEEDS = 6_400, 100, 10, (0, 1, 2)
DATA = told(ROWS, "; the exact claim: normal random rows")


def apart(seed: int) -> tuple[float, float]:
    """Largest relative gap between autograd and the formula, three linear blocks, float64; and between the answers."""
    torch.manual_seed(seed)
    stages = [torch.nn.Linear(6, 6).double() for _ in range(3)]
    heads = [torch.nn.Linear(6, 4).double() for _ in range(3)]
    net = Exits(stages, heads, [Site(scores.MaxProbability(), rules.Threshold(0.5)) for _ in range(2)])
    x, weights = torch.randn(16, 6).double(), torch.randn(3, 16, 4).double()
    y, trace = record(masked(equilibrium(net)))(x)
    gap = float((y - masked(net)(x)).detach().abs().max())
    sum((e.logits * w).sum() for e, w in zip(trace.exits, weights, strict=True)).backward()
    features = [x]
    for stage in stages[:2]:
        features.append(stage(features[-1]))
    worst, reaching = 0.0, torch.zeros(16, 6).double()
    for k in (3, 2, 1):  # a mean over exits, from the last to the first
        deeper = reaching @ stages[k].weight if k < 3 else reaching
        reaching = weights[k - 1] @ heads[k - 1].weight / (4 - k) + (3 - k) / (4 - k) * deeper
        wanted = reaching.T @ features[k - 1]
        worst = max(worst, float((stages[k - 1].weight.grad - wanted).abs().max() / wanted.abs().max()))
    return worst, gap


def ratio(net: Exits, x: torch.Tensor, y: torch.Tensor) -> tuple[float, list[float]]:
    """Gradient norm of block 1 over that of block 10, and the norm of every block, means over the first steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    recorder, loss = record(net.train()), MultiExit()
    norms = []
    for rows in torch.randperm(len(x))[: STEPS * 64].split(64):
        prediction, trace = recorder(x[rows])
        optimizer.zero_grad()
        loss(prediction, trace, y[rows], 0.0).backward()
        norms.append([float(torch.cat([p.grad.flatten() for p in s.parameters()]).norm()) for s in net.stages])
        optimizer.step()
    means = torch.tensor(norms).mean(0).tolist()
    return mean(step[0] / step[-1] for step in norms), means


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    gaps, forward = zip(*(apart(seed) for seed in SEEDS), strict=True)
    found: dict[str, list[float]] = {"sum": [], "equilibrium": []}
    norms: dict[str, list[list[float]]] = {"sum": [], "equilibrium": []}
    for seed in SEEDS:
        for name in found:
            net = seeded(seed, lambda: chain((16,) * BLOCKS, halve=(0, 3)))
            value, blocks = ratio(equilibrium(net) if name == "equilibrium" else net, data.train.x, data.train.y)
            found[name].append(value)
            norms[name].append(blocks)
            lab.progress(f"{name}, seed {seed}", 1, 1)
    smaller = [a / b for a, b in zip(found["sum"], found["equilibrium"], strict=True)]
    shown = {name: ", ".join(f"{v:.2f}" for v in torch.tensor(each).mean(0).tolist()) for name, each in norms.items()}
    return [
        Claim("the gradient of every block of a linear chain with three exits is the formula's",
              f"{max(gaps):.1e} relative gap at most", "<= 1e-6", max(gaps) <= 1e-6, list(gaps)),
        Claim("answers don't change", f"{max(forward):.1e} largest difference", "0", max(forward) == 0.0, list(forward)),
        Claim("ten exits, first 100 steps: block 1's gradient over block 10's is smaller than with the plain sum",
              f"{min(smaller):.2f} times (worst seed)", ">= 2 times", min(smaller) >= 2, smaller,
              f"mean norms of blocks 1 to 10, the sum: {shown['sum']}; in equilibrium: {shown['equilibrium']}"),
    ]  # fmt: skip
