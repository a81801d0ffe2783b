"""Dynamic routing for segmentation: cells on a lattice of layers and scales, whose paths open by image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.routes import Node, Routes
from pliant.rules.soft import ReluTanh
from pliant.scores.routes import RouteGate
from pliant.systems.backbones import conv_norm


class Cell(nn.Module):
    """Two separable 3x3 convolutions and a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_separable(channels), nn.ReLU(), *_separable(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.layers(x) + x


def _separable(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), *conv_norm(channels, channels, 1)]


class Stem(nn.Module):
    """Strided convolutions to the finest scale of the lattice, as the only node of its first layer."""

    def __init__(self, in_chans: int, channels: int, stride: int) -> None:
        super().__init__()
        inputs, layers, self.stride = in_chans, list[nn.Module](), stride
        for step in [2] * (stride.bit_length() - 1) or [1]:
            layers += [*conv_norm(inputs, channels, 3, step), nn.ReLU()]
            inputs = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """A list of one."""
        return [self.layers(x)]


class Decoder(nn.Module):
    """From the coarsest scale to the finest: a 1x1 convolution, twice the size, added; then a class for each pixel."""

    def __init__(self, widths: Sequence[int], num_classes: int, stride: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Sequential(*conv_norm(b, a, 1)) for a, b in itertools.pairwise(widths))
        self.classify = nn.Conv2d(widths[0], num_classes, 1)
        self.stride = stride

    def forward(self, scales: list[Tensor]) -> Tensor:
        """Logits of every pixel of the image."""
        *finer, x = scales
        for into, up in zip(reversed(finer), reversed(self.up), strict=True):  # pyright: ignore[reportArgumentType, reportCallIssue]
            x = into + twice(up(x))
        y = self.classify(x.relu())
        return (
            y if self.stride == 1 else F.interpolate(y, scale_factor=self.stride, mode="bilinear", align_corners=False)
        )


def twice(x: Tensor) -> Tensor:
    """Bilinearly enlarged."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Up(nn.Module):
    """ReLU, a 1x1 convolution to half the channels, twice the size."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), *conv_norm(channels, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """At the finer scale."""
        return twice(self.layers(x))


def dynamic_routing_seg(
    num_classes: int = 10, in_chans: int = 3, *, layers: int = 16, scales: int = 4, channels: int = 64, stride: int = 4,
    shrink: int = 1,
) -> nn.Sequential:  # fmt: skip
    r"""A lattice of cells; each sends what it made on at its own scale, to the finer and to the coarser one, by gates in [0, 1).

    .. math:: x_s^{l+1} = \sum_{s'} a_{s' \to s}^l\, F_{s' \to s}(\mathrm{cell}(x_{s'}^l)), \qquad a = \max(0, \tanh(\mathrm{gate}(x_{s'}^l)))

    A path of gate 0 isn't run; a cell all of whose paths are closed isn't either, and its input passes on. With a loss on the
    expected cost (:class:`pliant.losses.FlopsBudget`, switched on late) gates close by image.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`, sides a multiple of ``stride * 2 ** (scales - 1)``; logits :math:`(R, C, H, W)`.

    Args:
        num_classes: :math:`C`, of pixels.
        in_chans: channels of the images.
        layers: of cells; 16 or 33 in the paper.
        scales: of the lattice; layer :math:`l` has the :math:`l` finest ones.
        channels: of the finest scale; each coarser one has twice as many.
        stride: of the stem: 1, 2 or 4 (the paper's).
        shrink: gates see maps so many times smaller; 4 is the paper's small gate.

    Returns:
        Stem, lattice and decoder; the site of layer ``l``'s node ``s`` is ``lattice.l.sites.s``.

    Raises:
        PliantError: where a number is out of range.

    >>> from pliant.core.bind import sites
    >>> list(sites(dynamic_routing_seg(layers=2, scales=2, channels=4)))
    ['lattice.0.sites.0', 'lattice.1.sites.0', 'lattice.1.sites.1']

    References:
        Survey section 2.1.3 (3); Li et al., Learning Dynamic Routing for Semantic Segmentation, CVPR 2020.

    Differs from the paper: a cell is skipped where its gates are exactly 0 (there: below 1e-4 in sum); closed paths aren't computed for
    batches either (its code multiplies them by 0, and drops a cell only where all images agree); budgets count stem, gates and decoder too.
    """
    if layers < 1 or scales < 1 or channels < 2 or stride not in (1, 2, 4):
        raise PliantError(
            got=f"layers={layers}, scales={scales}, channels={channels}, stride={stride}",
            expected="positive counts, at least 2 channels, and a stride of 1, 2 or 4", do="pass e.g. layers=16, scales=4",
        )  # fmt: skip
    widths = [channels * 2**scale for scale in range(scales)]

    def node(scale: int) -> Node:
        width = widths[scale]
        edges: list[tuple[int, nn.Module]] = [(scale, nn.ReLU())]
        if scale > 0:
            edges.append((scale - 1, Up(width, widths[scale - 1])))
        if scale < scales - 1:
            edges.append((scale + 1, nn.Sequential(nn.ReLU(), *conv_norm(width, widths[scale + 1], 1, 2))))
        site = Site(RouteGate(width, len(edges), shrink=shrink), ReluTanh(), shape=(len(edges),))
        return Node(site, edges, Cell(width), keep=scale)

    lattice = [Routes([node(scale) for scale in range(min(layer + 1, scales))]) for layer in range(layers)]
    reached = min(layers + 1, scales)
    model = nn.Sequential()
    model.add_module("stem", Stem(in_chans, channels, stride))
    model.add_module("lattice", nn.Sequential(*lattice))
    model.add_module("decoder", Decoder(widths[:reached], num_classes, stride))
    return model
