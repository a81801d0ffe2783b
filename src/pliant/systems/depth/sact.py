"""SACT and ACT: residual networks whose stages stop, at each position or for a whole image, when enough has been seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.halting_pixels import HaltingMap, HaltingPixels
from pliant.execute.heads import PooledClassifier
from pliant.execute.loop import Halting
from pliant.execute.pixels import Branch
from pliant.rules.halting import Halting as HaltingRule
from pliant.scores.halting import HaltingHead, Remainder
from pliant.systems.backbones import conv_norm
from pliant.systems.parts import Parts

SLOPE = 0.1


def _branch(inputs: int, width: int, stride: int) -> Branch:
    """Two 3x3 convolutions, each behind its batch norm and leaky ReLU."""
    first, norm = conv_norm(inputs, width, 3, stride)
    second, _ = conv_norm(width, width)
    act = nn.LeakyReLU
    return Branch(nn.BatchNorm2d(inputs), act(SLOPE), first, norm, act(SLOPE), second)


class Unit(nn.Module):
    """A pre-activation residual unit."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = _branch(inputs, width, stride)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else conv_norm(inputs, width, 1, stride)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut plus branch."""
        return self.shortcut(x) + self.branch(x)


def _site() -> Site:
    return Site(Remainder(), HaltingRule())


def _head(width: int, bias: float) -> HaltingHead:
    return HaltingHead(width, bias=bias, norm=nn.BatchNorm1d(width))


def _positions(inputs: int, width: int, stride: int, units: int, bias: float) -> HaltingPixels:
    """A stage whose positions halt each for itself."""
    rest = range(units - 1)
    halts = [HaltingMap(width, _head(width, bias)) for _ in rest]
    return HaltingPixels(
        Unit(inputs, width, stride), [_branch(width, width, 1) for _ in rest], halts, [_site() for _ in rest]
    )


def _images(inputs: int, width: int, stride: int, units: int, bias: float) -> Halting:
    """A stage whose images halt each as a whole."""
    rest = range(units - 1)
    made = [Unit(inputs, width, stride), *(Unit(width, width) for _ in rest)]
    return Halting(made, [_head(width, bias) for _ in rest], [_site() for _ in rest])


def _network(
    stage: Callable[..., nn.Module], num_classes: int, in_chans: int, units: int, widths: Sequence[int], bias: float
) -> nn.Sequential:
    if units < 2 or not widths:
        raise PliantError(
            got=f"{units} units in {len(widths)} stages", expected="at least 2 units in at least one stage",
            do="pass units=5, widths=(16, 32, 64) for ResNet-32",
        )  # fmt: skip
    inputs = [widths[0], *widths]
    stages: list[Any] = [
        stage(a, b, 1 + (i > 0), units, bias) for i, (a, b) in enumerate(zip(inputs, widths, strict=False))
    ]
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.LeakyReLU(SLOPE), PooledClassifier(widths[-1], num_classes))
    return Parts(conv_norm(in_chans, widths[0])[0], stages, last).model()


def sact(
    num_classes: int = 10,
    in_chans: int = 3,
    *,
    units: int = 5,
    widths: Sequence[int] = (16, 32, 64),
    bias: float = -3.0,
) -> nn.Sequential:
    r"""SACT on CIFAR's pre-activation ResNet: in each stage every position halts for itself.

    Halting maps are :math:`\sigma(w * \mathrm{BN}(s) + u \cdot \mathrm{BN}(\mathrm{mean}(s)) + b)`. Train with
    ``pliant.losses.Ponder()`` at weight :math:`\tau` = 0.001 to 0.01.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        units: in each stage; 5 in three stages are ResNet-32.
        widths: channels of the stages; each but the first begins with stride 2.
        bias: of the halting logits at the start; -3 lets all units run.

    Returns:
        Stem, stages and head; the site after unit ``n`` of stage ``k`` is ``blocks.k.sites.n``.

    Raises:
        PliantError: where there are fewer than 2 units or no stage.

    >>> from pliant.core.bind import sites
    >>> list(sites(sact(units=2)))
    ['blocks.0.sites.0', 'blocks.1.sites.0', 'blocks.2.sites.0']

    References:
        Survey sections 2.1.1 (2a), 3.1.1 and 5.1.1; Figurnov et al., Spatially Adaptive Computation Time for Residual
        Networks, CVPR 2017.

    Differs from the paper: positions that halted aren't computed in evaluation; see :class:`pliant.execute.HaltingPixels`.
    """
    return _network(_positions, num_classes, in_chans, units, widths, bias)


def resnet_act(
    num_classes: int = 10,
    in_chans: int = 3,
    *,
    units: int = 5,
    widths: Sequence[int] = (16, 32, 64),
    bias: float = -3.0,
) -> nn.Sequential:
    r"""The same with one halting probability for an image, :math:`\sigma(u \cdot \mathrm{BN}(\mathrm{mean}(s)) + b)`, in each stage.

    Arguments, shapes and errors are those of :func:`sact`.

    >>> from pliant.core.bind import sites
    >>> len(sites(resnet_act(units=3)))
    6

    References:
        Survey section 2.1.1 (2a); Figurnov et al., Spatially Adaptive Computation Time for Residual Networks, CVPR 2017.

    Differs from the paper: an image that halted isn't computed in evaluation, whatever others in its batch do.
    """
    return _network(_images, num_classes, in_chans, units, widths, bias)
