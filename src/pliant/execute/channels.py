"""Channels: a convolution writes only the channels that a row chose, and reads only those that the one before wrote."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute import rows
from pliant.functional.channels import conv_channels
from pliant.functional.dynamic_conv import Geometry


class Chosen(NamedTuple):
    """Maps (R, C, H, W), which of their channels aren't 0 (R, C), and how likely each was."""

    maps: Tensor
    active: Tensor
    likely: Tensor


class ChannelConv(nn.Module):
    """A convolution, its batch norm, and a factor and a shift for each row's channels: all of them, or some."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, shifted: bool) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.shift = nn.Parameter(torch.full((conv.out_channels,), 0.1)) if shifted else None

    def forward(self, maps: Tensor, g: Tensor | None, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normed, boosted and shifted maps; where ``pairs`` says which channels are read and written, by running statistics."""
        if pairs is not None:
            conv = self.conv
            geometry = Geometry(_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation))
            return conv_channels(maps, conv.weight, *pairs, *self._affine(g, maps.shape[0]), geometry=geometry)
        y = self.norm(self.conv(maps))
        y = y if g is None else y * g[..., None, None]
        return y if self.shift is None else y + self.shift[:, None, None]

    def _affine(self, g: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Norm, factor and shift as a scale and a shift of each row's channels."""
        norm = self.norm
        var = self.conv.weight.new_ones(()) if norm.running_var is None else norm.running_var
        mean = var if norm.running_mean is None else norm.running_mean
        scale = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - mean * scale
        if g is not None:
            scale, shift = g * scale, g * shift
        shift = shift if self.shift is None else shift + self.shift
        return scale.expand(count, -1), shift.expand(count, -1)


class Channels(Executor):
    r"""Convolution, batch norm and ReLU for the output channels that a row chose; others are 0 and nobody reads them.

    .. math:: y = \mathrm{relu}\big(v \odot (g \odot \mathrm{norm}(W * x) + \beta)\big), \qquad v \in \{0, 1\}^O

    Chained, a layer costs (channels that the layer before wrote) x (channels that it writes). Gathered, each row convolves by the
    part of the kernel that it needs. Without ``boost`` :math:`g = 1`, :math:`\beta = 0`, and the site decides from the maps.
    While training, everything is computed in both forms, since a channel's statistics are of all rows; so it is where the
    network is exported.

    Shape:
        maps :math:`(R, I, H, W)` or :class:`Chosen`; returns :class:`Chosen` :math:`(R, O, H', W')`; ``given``: :math:`(R, O)`.

    Args:
        conv: in one group, without bias, padded by numbers.
        norm: of its channels, with running statistics.
        site: decides, with ``shape=(O,)``; from the boosts where there are some.
        boost: from maps to a factor for each output channel; the norm then has no scale of its own.

    Raises:
        PliantError: where the convolution, the norm or the site's shape is another.

    >>> import pliant
    >>> layer = Channels(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), Site(nn.Identity(), pliant.rules.TopK(2), shape=(4,)))
    >>> y = layer.eval()(torch.ones(1, 2, 3, 3), given=torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    >>> y.active.int(), y.maps[:, 1:3].any()
    (tensor([[1, 0, 0, 1]], dtype=torch.int32), tensor(False))

    References:
        Survey section 2.1.2 (3); Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, site: Site, *, boost: nn.Module | None = None) -> None:
        super().__init__()
        plain = conv.groups == 1 and conv.bias is None and not isinstance(conv.padding, str)
        if not plain or norm.running_var is None or site.shape != (conv.out_channels,):
            raise PliantError(
                got=f"{conv}, {norm} and a site of shape {site.shape}",
                expected=f"one group, no bias, padding in numbers; running statistics; shape ({conv.out_channels},)",
                do="let the norm shift, and the site decide every channel",
            )
        self.pairs = conv.in_channels * conv.out_channels
        self.layer, self.site, self.boost = ChannelConv(conv, norm, shifted=boost is not None), site, boost

    def plain(self, x: Any) -> Chosen:
        """All channels."""
        x = opened(x)
        y = self.layer(x.maps, self._boosts(x)).relu()
        ones = y.new_ones(y.shape[:2])
        return Chosen(y, ones, ones)

    def masked(self, x: Any, given: Tensor | Outcome | None = None) -> Chosen:
        """All channels, times the value."""
        x = opened(x)
        g = self._boosts(x)
        decision, likely, wanted = self._decide(x, g, given)
        with tape.part(self.site, decision.visit, "1", wanted=wanted, of=self.pairs):
            y = self.layer(x.maps, g)
        value = decision.value[..., None, None]
        y = value * y if rows.weighted(decision) else torch.where(value == 0, torch.zeros_like(y), y)
        return Chosen(y.relu(), decision.value, likely)

    def gathered(self, x: Any, given: Tensor | Outcome | None = None) -> Chosen:
        """Chosen channels alone."""
        if self.training or torch.compiler.is_exporting():
            return self.masked(x, given=given)
        x = opened(x)
        g = self._boosts(x)
        decision, likely, wanted = self._decide(x, g, given)
        reads, writes = x.active != 0, decision.value != 0
        units = None if tape.tape() is None else reads.sum(1) * writes.sum(1)
        with tape.part(self.site, decision.visit, "1", units=units, wanted=wanted, of=self.pairs):
            y = self.layer(x.maps, g, (reads, writes))
        y = y * decision.value[..., None, None] if rows.weighted(decision) else y
        return Chosen(y.relu(), decision.value, likely)

    def _boosts(self, x: Chosen) -> Tensor | None:
        return None if self.boost is None else self.boost(x.maps)

    def _decide(self, x: Chosen, g: Tensor | None, given: Any) -> tuple[Decision, Tensor, Tensor | None]:
        """The decision, how likely each channel is, and if somebody records how many pairs of them are wanted."""
        decision = self.site(x.maps if g is None else g, given=given, shape=self.site.shape)
        likely = decision.value if decision.soft is None else decision.soft
        return decision, likely, None if tape.tape() is None else x.likely.sum(1) * likely.sum(1)


class Unpacked(nn.Module):
    """A layer behind channels that reads all of them: passes the maps alone."""

    def forward(self, x: Any) -> Tensor:
        """The maps."""
        return x.maps if isinstance(x, Chosen) else x


def opened(x: Any) -> Chosen:
    """Maps of whose channels all may be read, unless they say otherwise."""
    if isinstance(x, Chosen):
        return x
    ones = x.new_ones(x.shape[:2])
    return Chosen(x, ones, ones)


def _pair(number: Any) -> tuple[int, int]:
    return number[0], number[1]
