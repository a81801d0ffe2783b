"""The soft gate max(0, tanh): four experts, of which one is useful for each input, with and without a cost term."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from _common import percent, phase, seeded
from torch import Tensor, nn

from pliant import Rule, Site, bind, masked, record, rules, sites
from pliant.core.site import Outcome
from pliant.cost import interleaved
from pliant.execute import Chain, Residual
from pliant.losses import FlopsBudget, Total
from pliant.reproduce import Claim, Lab
from pliant.train import Fit, fit

EXPERTS, SLOT, HIDDEN, OUT, EPOCHS, WEIGHT, SHARE, SEEDS = 4, 16, 512, 8, 15, 0.5, 0.1, (0, 1, 2)
DATA = (
    f"made: 6,000 training and 2,000 test vectors of {EXPERTS} slots, one filled; each slot's expert has a map to learn"
)
ZEROS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Expert(nn.Module):
    """Reads slot ``k`` of the state and writes into its answer part; without biases, so that an empty slot gives 0."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.layers = nn.Sequential(nn.Linear(SLOT, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, OUT, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.layers(x[:, self.k * SLOT : (self.k + 1) * SLOT]), (EXPERTS * SLOT, 0))


class Gate(nn.Module):
    """A small gate on all slots; its bias starts at 1.5, so every path starts open at about 0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(EXPERTS * SLOT, 32)
        self.out = nn.Linear(32, 1)
        nn.init.normal_(self.out.weight, std=1e-2)
        nn.init.constant_(self.out.bias, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x[:, : EXPERTS * SLOT]).relu()).squeeze(-1)


class Answer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, EXPERTS * SLOT :]


class Room(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, OUT))


def network() -> nn.Module:
    blocks = [Residual(Expert(k), Site(Gate(), rules.ReluTanh())) for k in range(EXPERTS)]
    return nn.Sequential(Room(), Chain(blocks), Answer())


def made(rows: int, seed: int) -> tuple[SimpleNamespace, Tensor]:
    """Inputs with one filled slot, targets by the slot's own (hidden) map, and which slot it was."""
    maps = torch.randn(EXPERTS, SLOT, OUT, generator=torch.Generator().manual_seed(99)) / SLOT**0.5
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(EXPERTS, (rows,), generator=g)
    z = torch.randn(rows, SLOT, generator=g)
    x = torch.zeros(rows, EXPERTS, SLOT)
    x[torch.arange(rows), kind] = z
    return SimpleNamespace(x=x.flatten(1), y=torch.einsum("ri,rio->ro", z, maps[kind])), kind


def square(y: Tensor, trace: object, target: Tensor, progress: float) -> Tensor:
    return (y - target).square().mean()


class Zeros(Rule):
    """Weights of 0.9 with a given share of exact zeros, the same rows at each call of a site."""

    reads_scores = False

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, scores: Tensor) -> Outcome:
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
        value = torch.where(order < self.share * len(scores), 0.0, 0.9)
        return Outcome(value, soft=value)


def run(lab: Lab) -> list[Claim]:
    test, kind = made(2_000, 12345)
    losses = {
        "with": Total({"task": (1.0, square), "cost": (WEIGHT, FlopsBudget(SHARE))}),
        "without": Total({"task": (1.0, square)}),
    }
    zeros: dict[str, list[float]] = {name: [] for name in losses}
    useful: list[float] = []
    errors: dict[str, list[float]] = {name: [] for name in losses}
    exact, apart = [], []
    for seed in SEEDS:
        data = made(6_000, seed)[0]
        for name, loss in losses.items():
            model = seeded(seed, network)
            adam = phase(EPOCHS, optimizer="adam", lr=2e-3, momentum=0.0, nesterov=False, weight_decay=0.0)
            said = f"{name} the cost term, seed {seed}"
            fit(
                model,
                data,
                loss,
                [adam],
                options=Fit(seed=seed, on_epoch=lambda e, said=said: lab.progress(said, e["epoch"], EPOCHS)),
            )
            model.eval()
            with torch.no_grad():
                y, trace = record(model)(test.x)
                weights = torch.stack([trace.dense(site) for site in trace], 1)
                zeros[name].append((weights == 0).double().mean().item())
                errors[name].append(((y - test.y).square().mean() / test.y.square().mean()).item())
                if name == "with":
                    useful.append((weights[torch.arange(len(kind)), kind] > 0).double().mean().item())
                    everything = masked(model)
                    exact.append(all(torch.equal(model(r), everything(r)) for r in test.x[:300].split(1)))
                    apart.append(float((y - everything(test.x)).abs().max()))
    models = {str(share): bind(model, dict.fromkeys(sites(model), Zeros(share))) for share in ZEROS}
    found = interleaved(
        {share: (lambda m=m: [m(x) for x in test.x.split(250)]) for share, m in models.items()}, rounds=15
    )
    times = [found[str(share)].minimum / found["0.0"].minimum for share in ZEROS]
    tried = "a cost term that presses on a share of the dense FLOPs below what one expert costs"
    return [
        Claim("exact zeros among trained gates with the cost term", f"{percent(zeros['with'])} %", ">= 60 %", min(zeros["with"]) >= 0.6, zeros["with"],
              f"{tried}: ({WEIGHT} (E[c] / c_dense - {SHARE})^2); relative squared error {percent(errors['with'])} %"),
        Claim("exact zeros without it", f"{percent(zeros['without'])} %", "< 5 %", max(zeros["without"]) < 0.05, zeros["without"],
              f"relative squared error {percent(errors['without'])} %; useless experts do no harm here, so only the cost can close them"),
        Claim("the useful expert is open, with the cost term", f"{percent(useful)} % of inputs", ">= 95 %", min(useful) >= 0.95, useful),
        Claim("skipping zero paths changes nothing (300 inputs one by one, bit for bit)", "yes" if all(exact) else "no", "yes", all(exact), exact,
              f"in one batch of 2,000 sums are taken in another order: {max(apart):.1e} apart at most"),
        Claim("forward time falls with the share of zeros", ", ".join(f"{s:.0%}: {t:.2f}" for s, t in zip(ZEROS, times, strict=True)),
              "falls at every step", all(b < a for a, b in itertools.pairwise(times)), times, "relative to no zeros, batch 250, one thread"),
    ]  # fmt: skip
