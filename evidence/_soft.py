"""Numbers that adapt a network: what they depend on, what they're worth, and static networks of the same cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch
from _common import LAST_ONLY, right, seeded
from torch import Tensor, nn

from pliant import bind, record, rules
from pliant.core.site import Outcome
from pliant.cost import interleaved
from pliant.data import Dataset
from pliant.reproduce import Lab
from pliant.train import Fit, fit

Build = Callable[[], nn.Module]
BATCH = 32


class Same(rules.Rule):
    """The same numbers for every row."""

    reads_scores = False

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)

    def forward(self, scores: Tensor) -> Outcome:
        """They."""
        return Outcome(self.numbers.expand_as(scores), weight=True)


class Others(rules.Rule):
    """The numbers that another row would have: those of the one before."""

    def __init__(self, rule: rules.Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, scores: Tensor) -> Outcome:
        """Rows' numbers moved by one."""
        return self.rule(scores.roll(1, 0))


def race(
    lab: Lab, builds: Mapping[str, Build], data: Any, phases: Sequence[Any], seeds: Sequence[int]
) -> dict[str, list[Any]]:
    """Every network of every seed, trained alike; those of a seed begin with the same random numbers."""
    found: dict[str, list[Any]] = {name: [] for name in builds}
    for seed in seeds:
        for name, build in builds.items():
            model, done = seeded(seed, build), itertools.count(1)
            told = partial(_told, lab, f"{name}, seed {seed}", done, sum(p.epochs for p in phases))
            fit(model, data.train, LAST_ONLY, phases, options=Fit(batch_size=BATCH, seed=seed, on_epoch=told))
            found[name].append(model.eval())
    return found


def _told(lab: Lab, what: str, done: Iterator[int], of: int, epoch: Mapping[str, Any]) -> None:
    lab.progress(what, next(done), of)


def scored(nets: Mapping[str, Sequence[nn.Module]], data: Dataset) -> dict[str, list[float]]:
    """Test accuracy of each network."""
    return {name: [float(right(net, data).double().mean()) for net in each] for name, each in nets.items()}


def ahead(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """By how much, seed by seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


@torch.no_grad()
def executed(model: nn.Module, x: Tensor) -> float:
    """FLOPs that an image takes on average."""
    was = model.training
    _, trace = record(model.eval())(x)
    model.train(was)
    return float(trace.flops.double().mean())


def widened(build: Callable[[Sequence[int]], nn.Module], widths: Sequence[int], x: Tensor, flops: float) -> list[int]:
    """Widths of the cheapest static network, each up to 3 channels more than ``widths``, that takes at least ``flops``."""
    more = itertools.product(range(4), repeat=len(widths))
    tried = [[w + m for w, m in zip(widths, each, strict=True)] for each in more]
    costs = [executed(build(each), x[:1]) for each in tried]
    return min(zip(tried, costs, strict=True), key=lambda pair: (pair[1] < flops, pair[1]))[0]


@torch.no_grad()
def numbers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every site decides for every image."""
    found: dict[str, list[Tensor]] = {}
    for part in x.split(500):
        _, trace = record(model)(part)
        for site in trace:
            found.setdefault(site, []).append(trace.dense(site))
    return {site: torch.cat(parts) for site, parts in found.items()}


def at_means(model: nn.Module, x: Tensor, only: str = "") -> nn.Module:
    """``model`` with the mean of what each site decides on ``x``; ``only`` at sites whose path ends so."""
    means = {s: Same(v.mean(0)) for s, v in numbers(model, x).items() if s.endswith(only)}
    return bind(model, dict(means))


def explained(values: Tensor, y: Tensor) -> float:
    """Share of the variance of ``values`` (R, ...) that lies between classes."""
    flat = values.flatten(1).double()
    within = sum(float((flat[y == c] - flat[y == c].mean(0)).square().sum()) for c in y.unique())
    return 1 - within / max(float((flat - flat.mean(0)).square().sum()), 1e-12)


def probe(values: Tensor, y: Tensor, ridge: float = 1e-2) -> float:
    """Accuracy of a linear classifier of standardised ``values``, fitted to the first half of the rows, on the second."""
    flat = values.flatten(1).double()
    flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-9)
    flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
    half = len(flat) // 2
    seen, wanted = flat[:half], torch.eye(int(y.max()) + 1, dtype=flat.dtype)[y[:half]]
    gram = seen.T @ seen / half + ridge * torch.eye(seen.shape[1], dtype=flat.dtype)
    weights = torch.linalg.solve(gram, seen.T @ wanted / half)
    return float(((flat[half:] @ weights).argmax(1) == y[half:]).double().mean())


@torch.no_grad()
def slower(ours: nn.Module, theirs: nn.Module, x: Tensor, rounds: int = 15) -> float:
    """How many times as long ``ours`` takes on ``x``, processor time, in turn."""
    found = interleaved({"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, rounds=rounds, clock=time.thread_time)
    return found["ours"].minimum / found["theirs"].minimum


def average(values: Sequence[float]) -> str:
    """Mean and each, as signed points of a hundred."""
    return f"{100 * mean(values):+.2f} points ({', '.join(f'{100 * v:+.2f}' for v in values)})"
