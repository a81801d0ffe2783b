"""CARAFE: a small feature pyramid for segmentation whose upsampling kernels are predicted for every position."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pliant.core.site import Site
from pliant.execute.reassembly import Reassemble
from pliant.rules.soft import Softmax
from pliant.scores.spatial import KernelPredictor
from pliant.systems.backbones import conv_norm
from pliant.systems.parts import chosen


def _carafe(channels: int) -> nn.Module:
    return Reassemble(Site(KernelPredictor(channels), Softmax()))


UPSAMPLERS: dict[str, Callable[[int], nn.Module]] = {
    "carafe": _carafe,
    "bilinear": lambda channels: nn.Upsample(scale_factor=2, mode="bilinear"),
    "nearest": lambda channels: nn.Upsample(scale_factor=2, mode="nearest"),
}


class Pyramid(nn.Module):
    """Levels, each half the size of the one before, and back: every step up adds a 1x1 view of its level."""

    def __init__(
        self, in_chans: int, num_classes: int, widths: tuple[int, ...], up: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        inputs, top = (in_chans, *widths), widths[0]
        self.down = nn.ModuleList(
            nn.Sequential(*conv_norm(a, b, 3, 1 + (i > 0)), nn.ReLU(), *conv_norm(b, b), nn.ReLU())
            for i, (a, b) in enumerate(zip(inputs, widths, strict=False))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, top, 1) for width in widths)
        self.up = nn.ModuleList(up(top) for _ in widths[1:])
        self.head = nn.Sequential(*conv_norm(top, top), nn.ReLU(), nn.Conv2d(top, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        levels: list[Tensor] = []
        for down, lateral in zip(self.down, self.lateral, strict=True):
            x = down(x)
            levels.append(lateral(x))
        y = levels.pop()
        for up in self.up:
            y = up(y) + levels.pop()
        return self.head(y)


def carafe(
    num_classes: int = 2, in_chans: int = 3, *, widths: tuple[int, ...] = (16, 24, 32, 48), upsample: str = "carafe"
) -> nn.Sequential:
    r"""A feature pyramid with content-aware upsampling, for segmentation.

    .. math:: y_p = \sum_n \mathrm{softmax}(\psi(x)_p)_n\; x_{\lfloor p / 2 \rfloor + n}, \qquad n \in [-2, 2]^2

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`, sides multiples of :math:`2^{L - 1}` for :math:`L` levels; logits
        :math:`(R, K, H, W)`.

    Args:
        num_classes: :math:`K`.
        in_chans: channels of the images.
        widths: channels of the levels; the way up has as many as the first.
        upsample: "carafe", or "bilinear" and "nearest" for comparison (these decide nothing and have no site).

    Returns:
        The network; the site of the step up ``i``, from the smallest level on, is ``0.up.i.site``.

    Raises:
        PliantError: where there is no such upsampling.

    >>> import torch
    >>> carafe(widths=(4, 8)).eval()(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 2, 8, 8])

    References:
        Survey section 3.1.2 (1); Wang et al., CARAFE: Content-Aware ReAssembly of FEatures, ICCV 2019.

    Differs from the paper: the network around the operator is ours; all channels share a kernel, there are no groups of them.
    """
    return nn.Sequential(Pyramid(in_chans, num_classes, tuple(widths), chosen(UPSAMPLERS, upsample, "upsample")))
