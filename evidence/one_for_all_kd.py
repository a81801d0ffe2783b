"""One-for-all distillation: what its gradients are, and what it gives early exits where labels are few."""

from __future__ import annotations

from statistics import mean

import torch
from _chains import answers, cifar, four, told_cifar
from _common import percent, phase, seeded, trained

from pliant import record
from pliant.losses import MultiExit, OneForAll, Total
from pliant.losses.distill import kl
from pliant.reproduce import Claim, Lab

ROWS, EPOCHS, SEEDS = 4_500, 12, (0, 1, 2)
DATA = told_cifar(ROWS, " (10 % of the labels)")
GAMMA, TEMPERATURE = 0.5, 3.0


def exact(seed: int) -> tuple[float, bool]:
    """Largest gradient of the distillation in the teacher's own parts, and whether gamma = 0 is the plain sum to the bit."""
    net = seeded(seed, four).train()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    prediction, trace = record(net)(x)
    last = trace.exits[-1].logits
    taught = torch.stack([kl(last, e.logits, TEMPERATURE).mean() for e in trace.exits[:-1]]).sum()
    own = [*net.stages[-1].parameters(), *net.heads[-1].parameters()]
    grads = torch.autograd.grad(taught, own, retain_graph=True, allow_unused=True)
    both = []
    for term in (MultiExit(), OneForAll(gamma=0.0)):
        net.zero_grad()
        term(prediction, trace, y, 0.0).backward(retain_graph=True)
        both.append([p.grad.clone() for p in net.parameters()])
    worst = max((float(g.abs().max()) for g in grads if g is not None), default=0.0)
    return worst, all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def run(lab: Lab) -> list[Claim]:
    data = cifar(lab, ROWS)
    losses = {"labels": MultiExit(), "distilled": OneForAll(gamma=GAMMA, temperature=TEMPERATURE)}
    gains, agree, last, every = [], [], [], []
    for seed in SEEDS:
        said = {}
        for name, term in losses.items():
            net = seeded(seed, four)
            trained(
                lab, f"{name}, seed {seed}", net, data, [phase(EPOCHS)], loss=Total({"exits": (1.0, term)}), seed=seed
            )
            said[name] = answers(net, data)
        right = {name: (found == data.test.y).double().mean(1) for name, found in said.items()}
        gain = (right["distilled"] - right["labels"]).tolist()
        every.append(gain)
        gains.append(mean(gain[:-1]))
        last.append(gain[-1])
        a, b = ((found[0] == found[-1]).double().mean().item() for found in said.values())
        agree.append(b - a)
    zeros, same = zip(*(exact(seed) for seed in SEEDS), strict=True)
    shown = ", ".join(f"{100 * mean(exit):+.2f}" for exit in zip(*every, strict=True))
    return [
        Claim("distillation leaves the teacher's own parts without gradient", f"{max(zeros):.0e} at most", "0", max(zeros) == 0, list(zeros)),
        Claim("gamma = 0 gives the gradients of the plain sum", f"{sum(same)} of {len(same)} networks, to the bit", "all", all(same), [float(s) for s in same]),
        Claim("early exits gain where labels are few", f"{percent(gains)} points", ">= +0.5 points (mean of seeds)", mean(gains) >= 0.005, gains,
              f"gamma {GAMMA}, T {TEMPERATURE:g}; by exit, mean of seeds: {shown} points"),
        Claim("the first exit agrees with the last more often", f"{percent(agree)} points", "> 0 (mean of seeds)", mean(agree) > 0, agree),
        Claim("change of the last exit's accuracy", f"{percent(last)} points", "reported", True, last),
    ]  # fmt: skip
