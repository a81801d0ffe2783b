"""The parts of multi-scale dense networks: a grid of layers and scales, from finest to coarsest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; weights by the outputs' fan."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel * kernel * outputs)))
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _narrowed(inputs: int, outputs: int, stride: int, bottleneck: int) -> nn.Sequential:
    """A 1x1 bottleneck and a 3x3 convolution."""
    inner = min(inputs, bottleneck * outputs)
    return nn.Sequential(conv_norm(inputs, inner, 1), conv_norm(inner, outputs, 3, stride))


class Dense(nn.Module):
    """One scale of one layer: what was there, half of the growth from the finer scale, half from its own."""

    def __init__(self, finer: int | None, own: int, growth: int, bottlenecks: tuple[int, int]) -> None:
        super().__init__()
        share = growth if finer is None else growth // 2
        self.down = None if finer is None else _narrowed(finer, share, 2, bottlenecks[0])
        self.same = _narrowed(own, share, 1, bottlenecks[1])

    def forward(self, finer: Tensor | None, own: Tensor) -> Tensor:
        """Concatenate along channels."""
        new = [self.same(own)] if self.down is None else [self.down(finer), self.same(own)]
        return torch.cat([own, *new], 1)


class Layer(nn.Module):
    """One layer over the scales that are left; a scale that is dropped still feeds the next coarser one once."""

    def __init__(self, scales: Sequence[Dense]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scales)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """From finest to coarsest."""
        dropped = len(x) - len(self.scales)
        finer: list[Tensor | None] = [None, *x]
        return [scale(finer[dropped + i], x[dropped + i]) for i, scale in enumerate(self.scales)]


class PerScale(nn.Module):
    """One module for each scale, on the coarsest scales where there are more."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(modules)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Scale by scale."""
        return [module(t) for module, t in zip(self.scales, x, strict=True)]


class Pyramid(nn.Module):
    """The first layer: a chain of strided convolutions, each step one scale."""

    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """All scales of ``x``, finest first."""
        scales: list[Tensor] = []
        for step in self.steps:
            x = step(x)
            scales.append(x)
        return scales


class Classifier(nn.Module):
    """Reads only the coarsest scale: two strided 3x3 convolutions, average pool, linear."""

    def __init__(self, channels: int, inner: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(channels, inner, 3, 2), conv_norm(inner, inner, 3, 2), nn.AdaptiveAvgPool2d(1)
        )
        self.linear = nn.Linear(inner, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Logits."""
        return self.linear(self.features(x[-1]).flatten(1))


def pyramid(in_chans: int, widths: Sequence[int], form: Literal["cifar", "imagenet"]) -> Pyramid:
    """The first layer for images of CIFAR's or ImageNet's kind, ``widths`` channels per scale."""
    stem: nn.Module = conv_norm(in_chans, widths[0], 3)
    if form == "imagenet":
        conv = nn.Conv2d(in_chans, widths[0], 7, 2, 3)
        stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return Pyramid([stem, *(conv_norm(a, b, 3, 2) for a, b in itertools.pairwise(widths))])
