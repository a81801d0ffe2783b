"""MSDNet: multi-scale dense network with exits that don't hurt one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability
from pliant.systems.multiscale import Classifier, Dense, Layer, PerScale, conv_norm, pyramid


def msdnet(
    num_classes: int = 10, in_chans: int = 3, *, exits: int = 7, base: int = 4, step: int = 2, growing: int = 0,
    channels: int = 16, growth: int = 6, factors: Sequence[int] = (1, 2, 4), bottlenecks: Sequence[int] = (1, 2, 4),
    reduction: float = 0.5, prune: Literal["max", "min"] = "max", form: Literal["cifar", "imagenet"] = "cifar", head_channels: int = 128,
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
        head_channels: of the classifiers' convolutions in the "cifar" form; in the "imagenet" form they keep their input's.
        form: "cifar" (3x3 stem) or "imagenet" (7x7 stem with pooling).

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
        layers: list[nn.Module] = [pyramid(in_chans, [channels * f for f in factors], form)] if at == 0 else []
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
                layers.append(PerScale([conv_norm(width * f, kept * f, 1) for f in factors[first:]]))
                width = kept
        stages.append(nn.Sequential(*layers))
        heads.append(
            Classifier(width * factors[-1], head_channels if form == "cifar" else width * factors[-1], num_classes)
        )
    return Exits(stages, heads, [Site(MaxProbability(), Threshold(0.5)) for _ in range(exits - 1)])
