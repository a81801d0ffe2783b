"""A small chain of convolutions with an exit after every stage, for the claims about losses of exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant import Site, gathered, masked, record, rules, scores, sites
from pliant.data import Dataset, load
from pliant.execute import Exits
from pliant.execute.heads import PooledClassifier
from pliant.reproduce import Lab
from pliant.systems.backbones import conv_norm


def chain(
    widths: Sequence[int], *, halve: Sequence[int] = (), classes: int = 10, in_chans: int = 1, size: int = 1
) -> Exits:
    """One convolution with batch norm and ReLU per stage, stride 2 in the stages ``halve``; every exit pools and classifies."""
    inputs = [in_chans, *widths]
    stages: list[nn.Module] = [
        nn.Sequential(*conv_norm(a, b, 3, 2 if k in halve else 1), nn.ReLU())
        for k, (a, b) in enumerate(zip(inputs, widths, strict=False))
    ]
    heads: list[nn.Module] = [PooledClassifier(b, classes, size=size) for b in widths]
    return Exits(stages, heads, [Site(scores.MaxProbability(), rules.Threshold(0.5)) for _ in widths[1:]])


def four(**changes: Any) -> Exits:
    """Four stages of 24, 32, 48 and 64 channels for CIFAR-10; the first three halve the sides."""
    return chain((24, 32, 48, 64), halve=(0, 1, 2), in_chans=3, **changes)


def fashion_four(**changes: Any) -> Exits:
    """Four stages of 24, 48, 64 and 96 channels for Fashion-MNIST, heads on 2x2 cells; exits cost 1, 34, 56 and 100 % of the chain."""
    return chain((24, 48, 64, 96), halve=(0, 2), size=2, **changes)


def cifar(lab: Lab, rows: int) -> Dataset:
    """CIFAR-10 with the first ``rows`` training images, 2,000 held-out and 4,000 test images."""
    data = load("cifar10", lab.root, limit=rows)
    return replace(data, val=data.val.take(2000), test=data.test.take(4000))


def told_cifar(rows: int, more: str = "") -> str:
    """How the data is named in results."""
    return f"CIFAR-10: first {rows:,} training and 4,000 test images{more}"


@torch.no_grad()
def answers(model: Exits, data: Dataset) -> Tensor:
    """Every exit's class for every test image, (exits, images)."""
    recorder = record(masked(model.eval()))
    parts = [torch.stack([e.logits.argmax(-1) for e in recorder(x)[1].exits]) for x in data.test.x.split(500)]
    return torch.cat(parts, 1)


def accuracies(model: Exits, data: Dataset) -> list[float]:
    """Of every exit, on the test part."""
    return (answers(model, data) == data.test.y).double().mean(1).tolist()


@torch.no_grad()
def in_batches(model: Exits, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class and exit of every row, run in batches of ``size``, and how near its scores came to a threshold."""
    recorder, found = record(gathered(model)), []
    thresholds = [site.rule.threshold for site in sites(model).values()]
    for part in x.split(size):
        y, trace = recorder(part)
        exits, near = torch.zeros(len(part), dtype=torch.int64), torch.full((len(part),), torch.inf)
        # A site that no row of the batch reached isn't in the trace.
        for site, threshold in zip(trace, thresholds, strict=False):
            decision = trace[site][0]
            rows = torch.arange(len(part)) if decision.rows is None else decision.rows
            exits[rows] += decision.value.long()
            near[rows] = near[rows].minimum((decision.scores - threshold).abs())
        found.append((y.argmax(-1), exits, near))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # pyright: ignore[reportReturnType]


def differing(model: Exits, x: Tensor, *, sizes: Sequence[int] = (1, 7, 64), clear_of: float = 1e-6) -> list[int]:
    """Rows whose class or exit isn't the one they have alone, by size of batch; those with a score nearer than ``clear_of`` to its
    threshold don't count."""
    alone = in_batches(model, x, 1)
    counts = []
    for size in sizes:
        said = in_batches(model, x, size)
        clear = torch.minimum(alone[2], said[2]) > clear_of
        counts.append(int((((alone[0] != said[0]) | (alone[1] != said[1])) & clear).sum()))
    return counts
