"""Q-learning: a chain of states with known values, and how many channel groups each image keeps in every layer."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from _common import LAST_ONLY, fashion, percent, phase, seeded, told, trained
from torch import Tensor, nn

import pliant
from pliant import losses
from pliant.core.decision import Decision
from pliant.core.trace import Trace
from pliant.data import Dataset
from pliant.estimators import EpsilonGreedy, EpsilonGreedyOneHot
from pliant.execute.heads import PooledClassifier
from pliant.execute.routes import Node, Routes
from pliant.losses import Total
from pliant.reproduce import Claim, Lab
from pliant.rules import Threshold
from pliant.study import accuracy
from pliant.systems.routing.supernet_routing import Single

ROWS, SEEDS, GROUPS, WIDTHS, EPOCHS, PENALTY = 8_000, (0, 1), 4, (16, 32, 48, 64), (10, 4), 0.02
KNOB = (-0.08, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2)
DATA = told(ROWS, "; and a made chain of five states")
STATES, PAYS, DISCOUNT = 5, torch.tensor([0.1, 0.7, 0.1, 0.2, 0.3]), 0.8


def chain(seed: int) -> float:
    """The largest relative error of the values: stop for what a state pays, or go on to the last one, which pays 1."""
    torch.manual_seed(seed)
    q = nn.Parameter(torch.zeros(STATES, 2))
    explore, optimizer = EpsilonGreedy(Threshold(0.0), epsilon=0.5).train(), torch.optim.Adam([q], lr=0.02)
    loss = losses.QLearning(lambda y, trace, target: y, discount=DISCOUNT)
    for _ in range(400):
        here, visits, rewards = torch.ones(256, dtype=torch.bool), [], []
        for state in range(STATES):
            scores = q[state].expand(256, 2)
            on = explore((scores[:, 1] - scores[:, 0]).detach()).value
            visits.append(Decision(torch.stack([1 - on, on], 1), scores=scores, reached=here, visit=state))
            rewards.append(torch.where(on > 0, float(state == STATES - 1), PAYS[state]))
            here = here & (on > 0)
        optimizer.zero_grad()
        loss(torch.stack(rewards), Trace({"s": tuple(visits)}, (), (), 256), here, 0.0).backward()
        optimizer.step()
    best, miss = 1.0, 0.0
    for state in reversed(range(STATES)):
        for got, wanted in zip(q[state].tolist(), (PAYS[state].item(), best), strict=True):
            miss = max(miss, abs(got / wanted - 1))
        best = DISCOUNT * max(PAYS[state].item(), best)
    return miss


class FirstGroups(nn.Module):
    """A convolution of which only the first channels are computed; the others are 0."""

    def __init__(self, conv: nn.Conv2d, kept: int) -> None:
        super().__init__()
        self.conv, self.kept = conv, kept

    def extra_repr(self) -> str:
        return f"kept={self.kept}"

    def forward(self, x: Tensor) -> Tensor:
        n = self.kept
        y = F.conv2d(x, self.conv.weight[:n], self.conv.bias[:n], self.conv.stride, self.conv.padding).relu()  # pyright: ignore
        return F.pad(y, (0, 0, 0, 0, 0, self.conv.out_channels - n))


class Values(nn.Sequential):
    """One value for each number of groups, from pooled features."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 64), nn.ReLU(), nn.Linear(64, GROUPS)
        )


def net() -> nn.Module:
    """A stem and three layers that keep 1 to 4 of 4 channel groups, by image."""

    def layer(before: int, width: int) -> nn.Module:
        conv = nn.Conv2d(before, width, 3, stride=1 if width == WIDTHS[2] else 2, padding=1)
        site = pliant.Site(Values(before), EpsilonGreedyOneHot(epsilon=1.0), shape=(GROUPS,))
        return Single(Routes([Node(site, [(0, FirstGroups(conv, width * (k + 1) // GROUPS)) for k in range(GROUPS)])]))

    stem = nn.Sequential(nn.Conv2d(1, WIDTHS[0], 3, padding=1), nn.ReLU())
    layers = [layer(*pair) for pair in itertools.pairwise(WIDTHS)]
    return nn.Sequential(stem, *layers, PooledClassifier(WIDTHS[-1], 10))


def turned(model: nn.Module, knob: float) -> nn.Module:
    """Each group kept costs ``knob`` more than in training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for site in pliant.sites(model).values():
            site.scorer[-1].bias -= knob * torch.arange(GROUPS)  # pyright: ignore[reportIndexIssue]
    return model.eval()


def fixed(model: nn.Module, data: Dataset) -> list[tuple[float, float]]:
    """FLOPs and accuracy with the same number of groups in every layer, for every image; gates unpaid."""
    found = []
    for k in range(GROUPS):
        choice = copy.deepcopy(model).eval()
        for site in pliant.sites(choice).values():
            site.scorer = Constant(k)
        right, flops, _ = accuracy(choice, data.test)
        found.append((flops, right))
    return found


class Constant(nn.Module):
    """Always the same number of groups."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(x),), self.k), GROUPS).to(x)


def between(line: list[tuple[float, float]], flops: float) -> float:
    """Accuracy of the fixed numbers of groups at these FLOPs, interpolated."""
    for (a, low), (b, high) in itertools.pairwise(line):
        if flops <= b:
            return low + (high - low) * max(0.0, (flops - a) / (b - a))
    return line[-1][1]


def run(lab: Lab) -> list[Claim]:
    miss = [chain(seed) for seed in SEEDS]
    data = fashion(lab, ROWS)
    settings = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    ratio, ahead, falls, said = [], [], [], []
    for seed in SEEDS:
        model: Any = seeded(seed, net)
        trained(
            lab,
            f"backbone, seed {seed}",
            model.train(),
            data,
            [phase(EPOCHS[0], **settings)],
            loss=LAST_ONLY,
            seed=seed,
        )
        agent = Total({"q": (1.0, losses.QLearning(losses.StepPenalty(penalty=PENALTY)))})
        exploring = pliant.bind(model.train(), {"*": EpsilonGreedyOneHot(epsilon=0.2)})
        trained(
            lab,
            f"values, seed {seed}",
            exploring,
            data,
            [phase(EPOCHS[1], train=("*scorer*",), **settings)],
            loss=agent,
            seed=seed,
        )
        line = fixed(model, data)
        found = [accuracy(turned(exploring, knob), data.test)[:2] for knob in KNOB]
        costs = [flops for _, flops in found]
        falls.append(all(b <= a for a, b in itertools.pairwise(costs)))
        ratio.append(max(costs) / min(costs))
        inside = [(right - between(line, flops)) for right, flops in found if line[0][0] <= flops <= line[-1][0]]
        ahead.append(max(inside))
        said.append(
            "fixed " + ", ".join(f"{100 * r:.1f} % at {f / line[-1][0]:.2f}" for f, r in line)
            + "; adaptive " + ", ".join(f"{100 * r:.1f} % at {f / line[-1][0]:.2f}" for r, f in found)
        )  # fmt: skip
    return [
        Claim("chain of five states: learned values against the known ones", f"{100 * max(miss):.2f} % off at most", "<= 5 %", max(miss) <= 0.05, miss),
        Claim("channel groups: the price of a group, turned after training, moves the FLOPs monotonically over this range",
              f"{min(ratio):.2f}x", ">= 1.5x, monotonic", min(ratio) >= 1.5 and all(falls), ratio,
              "accuracy at a share of all groups' FLOPs: " + " | ".join(said)),
        Claim("at equal FLOPs it's more accurate than a fixed number of groups", f"{percent(ahead)} points", ">= 1 point", min(ahead) >= 0.01, ahead,
              "the best place of the sweep, values' own cost included; the fixed ones pay for none"),
    ]  # fmt: skip
