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
    layer and isn't used yet, what this one made so far (None: nobody will ask), and the features to go on with."""

    bases: list[Tensor]
    below: list[list[Tensor]]
    made: list[list[Tensor]] | None
    x: Tensor


def narrowed(inputs: int, outputs: int, bottleneck: int) -> nn.Sequential:
    """A 1x1 bottleneck of ``bottleneck`` times the outputs, and a 3x3 convolution."""
    inner = min(inputs, bottleneck * outputs)
    return nn.Sequential(conv_norm(inputs, inner, 1), conv_norm(inner, outputs, 3))


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
    """A dense layer, a share of whose new channels comes from the matching layer of the sub-network below, enlarged."""

    def __init__(self, inputs: int, below: int, growth: int, bottleneck: int, share: float) -> None:
        super().__init__()
        up = max(1, int(growth * share))
        self.new = narrowed(inputs, growth - up, bottleneck)
        self.up = narrowed(below, up, bottleneck)

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        """Concatenated along channels."""
        up = F.interpolate(self.up(below), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([x, self.new(x), up], 1)


class Block(nn.Module):
    """Dense layers and a transition, in a sub-network's later part or in the coarsest one."""

    def __init__(self, layers: Sequence[nn.Module], transition: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.transition = transition

    def forward(self, flow: Flow) -> Flow:
        """The flow behind the block."""
        x, made = flow.x, list[Tensor]()
        for layer in self.layers:
            x = layer(x)
            made.append(x)
        return _behind(flow, made, self.transition(x), flow.below)


class FusionBlock(Block):
    """The same of fused layers: it uses up what the matching block below made."""

    def forward(self, flow: Flow) -> Flow:
        """The flow behind the block."""
        x, made = flow.x, list[Tensor]()
        for layer, below in zip(self.layers, flow.below[0], strict=True):
            x = layer(x, below)
            made.append(x)
        return _behind(flow, made, self.transition(x), flow.below[1:])


def _behind(flow: Flow, made: list[Tensor], x: Tensor, below: list[list[Tensor]]) -> Flow:
    return Flow(flow.bases, below, None if flow.made is None else [*flow.made, made], x)
