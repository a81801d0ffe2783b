"""Deformed: a convolution whose taps are moved, and weighed, at every position."""

from __future__ import annotations

from torch import Tensor, nn

from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.functional.deform import deform_conv2d
from pliant.functional.dynamic_conv import Geometry, output_size


class DeformConv2d(nn.Module):
    """A convolution whose taps are told where to read and how much to count; ``static`` is the convolution itself.

    >>> import torch
    >>> layer, x = DeformConv2d(nn.Conv2d(1, 1, 1)), torch.rand(1, 1, 2, 2)
    >>> torch.allclose(layer(x, torch.zeros(1, 2, 2, 2), None), layer.static(x))
    True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, offsets: Tensor, mask: Tensor | None) -> Tensor:
        """The deformed convolution of ``x``."""
        return deform_conv2d(x, offsets, self.conv.weight, self.conv.bias, mask=mask, geometry=self.geometry)

    def static(self, x: Tensor) -> Tensor:
        """The convolution."""
        return self.conv(x)


class Deformed(Executor):
    r"""Two sites decide where each tap of a convolution reads and how much it counts.

    .. math:: y(p) = \sum_k W(p_k)\, m_k(p)\, x(p + p_k + o_k(p) - 1) + b

    Offsets are decided as 1 more than they are, so that ones are the plain convolution: ``Always`` at the mask is the first
    version of the paper, ``Always`` at both, and the plain form, the convolution. Nothing is skipped, so both forms are one.

    Shape:
        ``x`` :math:`(R, C, H, W)`; offsets :math:`(R, 2 D K, H', W')` as (y, x) for each of :math:`K` taps and :math:`D` groups of
        channels, mask :math:`(R, D K, H', W')`; ``given``: both.

    Args:
        conv: the convolution; its own geometry, zeros around the map.
        offsets: decides :math:`o + 1`: a :class:`pliant.scores.SideConv` that starts at 1, under ``Regressed``.
        mask: decides :math:`m`: one that starts at 0, under ``Sigmoid``; None weighs all taps 1 (the first version).
        groups: :math:`D`, groups of channels whose taps move together.

    >>> import torch, pliant
    >>> conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    >>> side = pliant.scores.SideConv
    >>> layer = Deformed(
    ...     conv, Site(side(conv, 18, start=1.0), pliant.rules.Regressed()), Site(side(conv, 9), pliant.rules.Sigmoid())
    ... )
    >>> x = torch.randn(2, 2, 5, 5)
    >>> torch.allclose(layer(x), 0.5 * conv(x), atol=1e-5)  # as it starts: offsets 0, mask 0.5
    True

    References:
        Survey section 2.2.1 (2); Dai et al., ICCV 2017; Zhu et al., Deformable ConvNets v2, CVPR 2019.
    """

    def __init__(self, conv: nn.Conv2d, offsets: Site, mask: Site | None = None, *, groups: int = 1) -> None:
        super().__init__()
        self.operation = DeformConv2d(conv)
        self.offsets = offsets
        self.mask = mask
        self.kernel, self.geometry = conv.kernel_size, self.operation.geometry
        self.taps = groups * self.kernel[0] * self.kernel[1]

    def plain(self, x: Tensor) -> Tensor:
        """The convolution."""
        return self.operation.static(x)

    def masked(self, x: Tensor, given: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """The same as gathered: moved taps cost the same."""
        return self.gathered(x, given=given)

    def gathered(self, x: Tensor, given: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """Decide, sample, multiply."""
        size = output_size(tuple(x.shape[2:]), self.kernel, self.geometry)
        plans = (None, None) if given is None else given
        offsets = self.offsets(x, given=plans[0], shape=(2 * self.taps, *size)).value - 1
        mask = None if self.mask is None else self.mask(x, given=plans[1], shape=(self.taps, *size)).value
        return self.operation(x, offsets, mask)
