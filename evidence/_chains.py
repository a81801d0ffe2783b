"""A small chain of convolutions with an exit after every stage, for the claims about losses of exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant import Site, masked, record, rules, scores
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
