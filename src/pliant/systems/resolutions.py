"""The parts of resolution adaptive networks: dense blocks from coarse to fine, the finer ones fed by the coarser ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.systems.multiscale import Pyramid, conv_norm


class Flow(NamedTuple):
    """Where a row stands: base features of finer sub-networks (finest first), what the sub-network below made layer by
    layer (each block's input first) and isn't used yet, what this one made so far (None: nobody will ask), and the features to go on with."""

    bases: list[Tensor]
    below: list[list[Tensor]]
    made: list[list[Tensor]] | None
    x: Tensor


def narrowed(inputs: int, outputs: int, bottleneck: int, stride: int = 1) -> nn.Sequential:
    """A 1x1 bottleneck of ``bottleneck`` times the outputs, and a 3x3 convolution."""
    inner = min(inputs, bottleneck * outputs)
    return nn.Sequential(conv_norm(inputs, inner, 1), conv_norm(inner, outputs, 3, stride))


def sized(x: Tensor, like: Tensor) -> Tensor:
    """At the sides of ``like``."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Begin(nn.Module):
    """All base features; the coarsest sub-network comes first."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, x: Tensor) -> Flow:
        """The flow before the first block."""
        *finer, coarsest = self.pyramid(x)
        return Flow(finer, [], [] if finer else None, coarsest)


class Climb(nn.Module):
    """Go on at the next finer resolution, with all that this sub-network made."""

    def forward(self, flow: Flow) -> Flow:
        """The flow before the next sub-network's first block."""
        *finer, mine = flow.bases
        return Flow(finer, flow.made or [], [] if finer else None, mine)


class Layer(nn.Module):
    """A dense layer: what was there and ``growth`` new channels."""

    def __init__(self, inputs: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.new = narrowed(inputs, growth, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated along channels."""
        return torch.cat([x, self.new(x)], 1)


class FusedLayer(nn.Module):
    """A dense layer, a share of whose new channels comes from the matching layer of the sub-network below; may halve the sides."""

    def __init__(
        self, inputs: tuple[int, int], growth: int, bottlenecks: tuple[int, int], share: float, stride: int
    ) -> None:
        super().__init__()
        below = max(1, int(growth * share))
        self.new = narrowed(inputs[0], growth - below, bottlenecks[0], stride)
        self.below = narrowed(inputs[1], below, bottlenecks[1])

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        """Concatenated along channels, at the sides of what is new."""
        new = self.new(x)
        return torch.cat([sized(x, new), sized(self.below(below), new), new], 1)


class Block(nn.Module):
    """Dense layers, in a sub-network's later part or in the coarsest one; a transition keeps a share of the channels (1: none).

    ``channels`` are those before each layer and behind the last, ``width`` those behind the block.
    """

    def __init__(self, width: int, layers: int, growth: int, bottleneck: int, kept: float) -> None:
        super().__init__()
        self.channels = [width + growth * i for i in range(layers + 1)]
        self.layers = nn.ModuleList(Layer(inputs, growth, bottleneck) for inputs in self.channels[:-1])
        self.width = int(kept * self.channels[-1])
        self.transition = _transition(self.channels[-1], self.width)

    def forward(self, flow: Flow) -> Flow:
        """The flow behind the block."""
        made = [flow.x]
        for layer in self.layers:
            made.append(layer(made[-1]))
        return _behind(flow, made, self.transition(made[-1]), flow.below)


class FusionBlock(nn.Module):
    """The same of fused layers: it uses up what the matching block below made, whose last features join before the transition.

    Its last layer has the ``stride``; ``below`` are the matching block's channels.
    """

    def __init__(
        self, width: int, below: Sequence[int], growth: int, bottlenecks: tuple[int, int], share: float, *, stride: int,
        kept: float,
    ) -> None:  # fmt: skip
        super().__init__()
        steps = [1] * (len(below) - 2) + [stride]
        self.channels = [width + growth * i for i in range(len(below))]
        self.layers = nn.ModuleList(
            FusedLayer(pair, growth, bottlenecks, share, step)
            for pair, step in zip(zip(self.channels, below, strict=True), steps, strict=False)
        )
        joins = max(1, int(share * self.channels[-1]))
        self.last = conv_norm(below[-1], joins, 1)
        self.width = int(kept * (self.channels[-1] + joins))
        self.transition = _transition(self.channels[-1] + joins, self.width)

    def forward(self, flow: Flow) -> Flow:
        """The flow behind the block."""
        made, (below, *rest) = [flow.x], flow.below
        for layer, matching in zip(self.layers, below[:-1], strict=True):
            made.append(layer(made[-1], matching))
        joined = torch.cat([made[-1], sized(self.last(below[-1]), made[-1])], 1)
        return _behind(flow, made, self.transition(joined), rest)


def _transition(inputs: int, outputs: int) -> nn.Module:
    return nn.Identity() if inputs == outputs else conv_norm(inputs, outputs, 1)


def _behind(flow: Flow, made: list[Tensor], x: Tensor, below: list[list[Tensor]]) -> Flow:
    return Flow(flow.bases, below, None if flow.made is None else [*flow.made, made], x)
