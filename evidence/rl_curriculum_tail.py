"""Curriculum over decisions: what is forced is no choice, and a plan of fifteen blocks learns from the tail."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant import estimators, losses, rules
from pliant.core.trace import Trace
from pliant.execute import Chain, Planned, Residual
from pliant.reproduce import Claim, Lab
from pliant.train import PlanCurriculum

torch.set_num_threads(1)
BLOCKS, NEEDED, BATCH, STEPS, PERIOD, SEEDS = 15, 4, 128, 2000, 100, (0, 1, 2)
DATA = f"made: a plan of {BLOCKS} blocks; an input names {NEEDED} of them, and is answered right where all of these ran"


class Stamp(nn.Module):
    """A block that leaves its mark."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("mark", nn.functional.one_hot(torch.tensor(k), BLOCKS).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("mark").expand_as(x)


class Blank(nn.Module):
    """Before any block has run."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


RULE = estimators.ScoreFunction(rules.Threshold(0.0), floor=0.8)


def net(seed: int) -> Any:
    """A policy that plans all blocks from the input."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(BLOCKS, 64), nn.ReLU(), nn.Linear(64, BLOCKS))
    chain = Chain([Residual(Stamp(k), pliant.Site(nn.Identity(), rules.Always())) for k in range(BLOCKS)])
    return Planned(pliant.Site(policy, RULE, shape=(BLOCKS,)), chain, stem=Blank()).train()


def inputs(g: torch.Generator) -> Tensor:
    """Ones at the blocks that each row needs."""
    chosen = torch.rand(BATCH, BLOCKS, generator=g).topk(NEEDED).indices
    return torch.zeros(BATCH, BLOCKS).scatter(1, chosen, 1.0)


def reward(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
    """BlockDrop's, with gamma 1: ``y`` holds the marks, ``target`` the ones that are needed."""
    right = (y * target).sum(1) == NEEDED
    return torch.where(right, 1 - losses.used(trace, "site") ** 2, -1.0)


def train(seed: int, curriculum: bool) -> list[float]:
    """Rewards of the greedy plan over training, once a period."""
    model, g = net(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    freed = PlanCurriculum("site", BLOCKS, RULE) if curriculum else lambda epoch: {}
    term, seen = losses.SelfCritical(reward), []
    for step in range(STEPS):
        if step % PERIOD == 0:
            now = pliant.bind(model, freed(step // PERIOD)) if curriculum else model
            with torch.no_grad():
                x = inputs(torch.Generator().manual_seed(99))
                y, trace = pliant.record(losses.greedy(now))(x)
                seen.append(reward(y, trace, x).mean().item())
        x = inputs(g)
        y, trace = pliant.record(now)(x)
        with torch.no_grad():
            further = pliant.record(term.other(now))(x)
        optimizer.zero_grad()
        term(y, trace, x, 0.0, further).backward()
        optimizer.step()
    with torch.no_grad():
        y, trace = pliant.record(model.eval())(x)
        seen.append(reward(y, trace, x).mean().item())
    return seen


def forced() -> tuple[float, float]:
    """The largest log-probability, and the largest gradient of its scores, in columns that are forced on."""
    model = pliant.bind(net(0), PlanCurriculum("site", BLOCKS, RULE)(2))
    x = inputs(torch.Generator().manual_seed(0))
    y, trace = pliant.record(model)(x)
    d = trace["site"][0]
    loss = losses.Reinforce(reward)(y, trace, x, 0.0) + losses.EntropyBonus()(y, trace, x, 0.0)
    (gradient,) = torch.autograd.grad(loss, d.scores)  # pyright: ignore[reportArgumentType]
    return d.log_prob[:, :-3].abs().max().item(), gradient[:, :-3].abs().max().item()  # pyright: ignore[reportOptionalSubscript]


def run(lab: Lab) -> list[Claim]:
    log_prob, gradient = forced()
    pairs = []
    for seed in SEEDS:
        pairs.append((train(seed, True), train(seed, False)))
        lab.progress("plans", len(pairs), len(SEEDS))
    better = [with_[-1] > without[-1] for with_, without in pairs]
    said = "; ".join(f"{with_[-1]:.3f} against {without[-1]:.3f}" for with_, without in pairs)
    early = mean(without[3] for _, without in pairs)
    return [
        Claim("decisions that are forced on have log-probability 0 and no gradient", f"{log_prob:g}, {gradient:g}", "exactly 0",
              log_prob == 0 and gradient == 0, [log_prob, gradient]),
        Claim(f"after {STEPS:,} steps the reward with the curriculum exceeds that without", f"in {sum(better)} of {len(SEEDS)} seeds", ">= 2 of 3",
              sum(better) >= 2, [a[-1] for a, _ in pairs] + [b[-1] for _, b in pairs],
              f"{said}; without it, {early:.2f} after {3 * PERIOD} steps; the best there is is {1 - (NEEDED / BLOCKS) ** 2:.3f}"),
    ]  # fmt: skip
