"""A made task and a net that looks twice: a small digit on a cluttered canvas, seen coarsely, then through a proposed box."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import Site, rules, scores
from pliant.data import load
from pliant.execute import Exits
from pliant.functional import box_mask, square, zoom
from pliant.reproduce import Lab
from pliant.systems.backbones import conv_norm

CANVAS, DIGIT, PIECE, PIECES, VIEW, CHANNELS = 64, 16, 8, 10, 20, 32
SHARPNESS, QUICK, PEAK = 1.0, 15.0, 30.0
TOLD = (
    f"made: a digit of UCI's (8x8, drawn {DIGIT} pixels wide) anywhere on a canvas of {CANVAS}, with {PIECES} pieces of {PIECE} pixels "
    f"torn from other digits; scale 1 sees the whole canvas on {VIEW} pixels"
)
Seen = tuple[Tensor, Tensor]
"""The canvas, and the features of what was seen of it last."""


def made(lab: Lab, rows: int, *, seed: int, part: str = "train") -> SimpleNamespace:
    """Canvases ``x``, classes ``y``, and the digits' true boxes."""
    split = getattr(load("digits", lab.root), part)
    g = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(split.x), (rows,), generator=g)
    digits = F.interpolate(split.x - split.x.min(), size=DIGIT, mode="bilinear")
    x = torch.zeros(rows, 1, CANVAS, CANVAS)
    torn = torch.randint(len(split.x), (rows, PIECES), generator=g)
    cut = torch.randint(0, DIGIT - PIECE + 1, (rows, PIECES, 2), generator=g)
    put = torch.randint(0, CANVAS - PIECE + 1, (rows, PIECES, 2), generator=g)
    at = torch.randint(0, CANVAS - DIGIT + 1, (rows, 2), generator=g)
    for r in range(rows):
        for k in range(PIECES):
            (i, j), (top, left) = cut[r, k].tolist(), put[r, k].tolist()
            x[r, :, top : top + PIECE, left : left + PIECE] = digits[torn[r, k], :, i : i + PIECE, j : j + PIECE]
        top, left = at[r].tolist()
        x[r, :, top : top + DIGIT, left : left + DIGIT] = digits[pick[r]]
    boxes = torch.cat([at.flip(1), at.flip(1) + DIGIT], 1) / CANVAS
    return SimpleNamespace(x=x / x.std(), y=split.y[pick], boxes=boxes)


def features() -> nn.Sequential:
    """Three convolutions, to maps of half the side."""
    plan = ((1, 12, 1), (12, 24, 2), (24, CHANNELS, 1))
    return nn.Sequential(*(m for a, b, stride in plan for m in (*conv_norm(a, b, 3, stride), nn.ReLU())))


class Whole(nn.Module):
    """Scale 1: the whole canvas, shrunk."""

    def __init__(self) -> None:
        super().__init__()
        self.features = features()

    def forward(self, x: Tensor) -> Seen:
        return x, self.features(F.interpolate(x, size=VIEW, mode="area"))


class Proposal(nn.Module):
    """From a feature map to a square box: its centre is a soft arg-max, which begins where three by three cells respond most.

    ``QUICK`` has the size learn faster than the place: a large box holds the digit anywhere, so at first only its size matters.
    """

    def __init__(self, *, half: float, least: float = 0.06, most: float = 0.4) -> None:
        super().__init__()
        self.where, self.size = nn.Conv2d(CHANNELS, 1, 3, padding=1), nn.Linear(CHANNELS, 1)
        self.least, self.most = least, most
        nn.init.constant_(self.where.weight, PEAK / (9 * CHANNELS))
        nn.init.zeros_(self.size.weight)
        share = (half - least) / (most - least)
        nn.init.constant_(self.size.bias, math.log(share / (1 - share)) / QUICK)

    def forward(self, maps: Tensor) -> Tensor:
        side = maps.shape[-1]
        weights = self.where(maps).flatten(1).softmax(1).view(-1, side, side)
        places = (torch.arange(side) + 0.5) / side
        centre = torch.stack([weights.sum(1) @ places, weights.sum(2) @ places], 1)
        near = (maps * weights[:, None]).flatten(2).sum(2)
        return square(centre, self.least + (self.most - self.least) * (QUICK * self.size(near)).sigmoid())


class Shaken(nn.Module):
    """Boxes of other sizes and places, where the classifier is trained: one that knows a single size wants no other.

    While the proposal is trained (its boxes want a gradient) they stay, else it would learn to make room for the shaking.
    """

    def forward(self, boxes: Tensor) -> Tensor:
        if not self.training or boxes.requires_grad:
            return boxes
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:3] - boxes[:, :1]) / 2
        moved = centre + half * torch.empty_like(centre).uniform_(-0.3, 0.3)
        return square(moved, half * torch.empty_like(half).uniform_(0.6, 1.1))


class Closer(nn.Module):
    """Scale 2: the masked canvas through the proposed box."""

    def __init__(self, *, half: float) -> None:
        super().__init__()
        self.attention, self.shaken, self.features = Proposal(half=half), Shaken(), features()

    def forward(self, seen: Seen) -> Seen:
        x, maps = seen
        return x, self.features(look(x, self.shaken(self.attention(maps.detach()))))


def look(x: Tensor, boxes: Tensor) -> Tensor:
    """What scale 2 is shown."""
    return zoom(x * box_mask(boxes, CANVAS, CANVAS, sharpness=SHARPNESS), boxes, VIEW, VIEW)


class Read(nn.Module):
    """A linear layer on the strongest response of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, 10)

    def forward(self, seen: Seen) -> Tensor:
        return self.linear(seen[1].amax((2, 3)))


def twice(*, half: float = 0.3) -> Exits:
    """Two scales, each with an exit; the first box is ``2 * half`` of the canvas wide."""
    return Exits([Whole(), Closer(half=half)], [Read(), Read()], [Site(scores.MaxProbability(), rules.Threshold(0.5))])
