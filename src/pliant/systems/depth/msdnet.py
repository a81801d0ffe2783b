"""MSDNet: multi-scale dense network with exits that don't hurt one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel * kernel * outputs)))
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _narrowed(inputs: int, outputs: int, stride: int, bottleneck: int) -> nn.Sequential:
    """A 1x1 bottleneck and a 3x3 convolution."""
    inner = min(inputs, bottleneck * outputs)
    return nn.Sequential(_conv(inputs, inner, 1), _conv(inner, outputs, 3, stride))


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
        self.features = nn.Sequential(_conv(channels, inner, 3, 2), _conv(inner, inner, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.linear = nn.Linear(inner, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Logits."""
        return self.linear(self.features(x[-1]).flatten(1))


def msdnet(
    num_classes: int = 10, in_chans: int = 3, *, exits: int = 7, base: int = 4, step: int = 2, growing: int = 0,
    channels: int = 16, growth: int = 6, factors: Sequence[int] = (1, 2, 4), bottlenecks: Sequence[int] = (1, 2, 4),
    reduction: float = 0.5, prune: Literal["max", "min"] = "max", form: Literal["cifar", "imagenet"] = "cifar",
) -> Exits:  # fmt: skip
    r"""MSDNet, a grid of scales and densely connected layers with an exit after each block.

    Layer :math:`l` at scale :math:`s`: :math:`x_s^l = [\,x_s^{l-1},\; \tilde h(x_{s-1}^{l-1}),\; h(x_s^{l-1})\,]`.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        exits: number of blocks, each with an exit.
        base: layers in the first block.
        step: layers in each later block; block ``i`` has ``step + growing * (i - 1)`` of them.
        growing: 0 for the anytime form, 1 with ``step=2, base=1`` for the budgeted one.
        channels: of the first layer at the finest scale.
        growth: channels that each layer adds at the finest scale.
        factors: of channels and growth, per scale.
        bottlenecks: width of the 1x1 convolutions, in outputs, per scale.
        reduction: share of the channels kept where scales are dropped; 0 for no transition.
        prune: "max" drops a scale after each 1/S of the depth, "min" only those that no exit would read.
        form: "cifar" (3x3 stem, classifiers of 128 channels) or "imagenet" (7x7 stem with pooling).

    Raises:
        PliantError: where the lists have no entry per scale, or there are too few layers.

    >>> sum(p.numel() for p in msdnet().parameters())
    2986690

    References:
        Survey sections 2.1.1 (1c), 5.1.1 and 5.2.1; Huang et al., Multi-Scale Dense Networks, ICLR 2018.

    Differs from the paper: the classifiers' last pool is adaptive (the same numbers at 32 and 224 pixels), so that any
    image size works; thresholds start at 0.5 doubt and are set by ``tune``.
    """
    scales = len(factors)
    if len(bottlenecks) != scales or scales < 1 or exits < 1 or base < 1 or step < 1:
        raise PliantError(
            got=f"{exits} exits, base {base}, step {step}, {scales} factors and {len(bottlenecks)} bottlenecks",
            expected="positive counts, and one factor and one bottleneck per scale",
            do="pass e.g. factors=(1, 2, 4), bottlenecks=(1, 2, 4)",
        )
    steps = [base, *(step + growing * i for i in range(exits - 1))]
    total, at, width = sum(steps), 0, channels
    cut = math.ceil(total / scales)
    stages: list[nn.Module] = []
    heads: list[nn.Module] = []
    for count in steps:
        layers: list[nn.Module] = [_pyramid(in_chans, [channels * f for f in factors], form)] if at == 0 else []
        for _ in range(count):
            at += 1
            if prune == "max":
                before, after = scales - max(0, at - 2) // cut, scales - (at - 1) // cut
                reduce = before > after
            else:
                before, after = min(scales, total - at + 2), min(scales, total - at + 1)
                reduce = at in (total // 3, 2 * total // 3)
            first = scales - after
            layers.append(Layer([
                Dense(
                    width * factors[s - 1] if s > first or before > after else None, width * factors[s],
                    growth * factors[s], (bottlenecks[max(s - 1, 0)], bottlenecks[s]),
                )
                for s in range(first, scales)
            ]))  # fmt: skip
            width += growth
            if reduce and reduction > 0:
                kept = int(reduction * width)
                layers.append(PerScale([_conv(width * f, kept * f, 1) for f in factors[first:]]))
                width = kept
        stages.append(nn.Sequential(*layers))
        heads.append(Classifier(width * factors[-1], 128 if form == "cifar" else width * factors[-1], num_classes))
    return Exits(stages, heads, [Site(MaxProbability(), Threshold(0.5)) for _ in range(exits - 1)])


def _pyramid(in_chans: int, widths: Sequence[int], form: Literal["cifar", "imagenet"]) -> Pyramid:
    stem: nn.Module = _conv(in_chans, widths[0], 3)
    if form == "imagenet":
        conv = nn.Conv2d(in_chans, widths[0], 7, 2, 3)
        stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return Pyramid([stem, *(_conv(a, b, 3, 2) for a, b in zip(widths, widths[1:], strict=False))])
