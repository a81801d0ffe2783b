"""Deformable ConvNets v2: the later 3x3 convolutions read where the image asks them to, and weigh what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.deformed import Deformed
from pliant.rules.place import Regressed
from pliant.rules.soft import Sigmoid
from pliant.scores.modulation import SideConv
from pliant.systems.backbones import BasicBlock, resnet
from pliant.systems.parts import chosen

Deform = Callable[[nn.Conv2d, float], Deformed]


def moved(conv: nn.Conv2d, pace: float) -> Deformed:
    """Version 1: taps are moved."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return Deformed(conv, Site(SideConv(conv, 2 * taps, start=1.0, pace=pace), Regressed()))


def modulated(conv: nn.Conv2d, pace: float) -> Deformed:
    """Version 2: taps are moved and weighed."""
    layer = moved(conv, pace)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return Deformed(conv, layer.offsets, Site(SideConv(conv, taps, pace=pace), Sigmoid()))


VERSIONS: dict[str, Deform] = {"v1": moved, "v2": modulated}


def deform_conv_v2(
    num_classes: int = 10, in_chans: int = 3, *, depth: int = 20, widths: Sequence[int] = (16, 32, 64),
    version: str = "v2", static: int | None = None, pace: float = 0.1,
) -> nn.Module:  # fmt: skip
    r"""CIFAR's ResNet whose later 3x3 convolutions are deformable and modulated.

    .. math:: y(p) = \sum_k W(p_k)\, m_k\, x(p + p_k + \Delta_k)

    with offsets :math:`\Delta` and modulation :math:`m \in (0, 1)` from convolutions beside each one, of weights 0 at the start:
    then a layer is half the plain one. Sites decide :math:`1 + \Delta` and :math:`m`, so ``Always`` at the masks ("*.mask") is
    version 1, ``Always`` everywhere, and the plain form, the ResNet.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, \text{num\_classes})`.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        depth: layers, 6n + 2.
        widths: channels of the three groups.
        version: "v2", or "v1" without modulation.
        static: so many of the first blocks have ordinary convolutions; default, those of the first group.
        pace: of offset and mask layers, as a share of the others' learning rate (with SGD).

    Returns:
        The network; two sites at every deformable convolution.

    Raises:
        PliantError: where no block would be deformable, there is no such version, or ``depth`` isn't 6n + 2.

    >>> import pliant
    >>> [path for path in pliant.sites(deform_conv_v2(depth=8)) if "blocks.1" in path and "branch.0" in path]
    ['blocks.1.branch.0.offsets', 'blocks.1.branch.0.mask']

    References:
        Survey section 2.2.1 (2), Table 2 and 3.1.2; Zhu, Hu, Lin, Dai, Deformable ConvNets v2, CVPR 2019.

    Differs from the paper: a classifier of small images; no RoI pooling, and no feature mimicking, which is for detectors.
    """
    deform = chosen(VERSIONS, version, "version")
    parts = resnet(num_classes, in_chans, depth=depth, widths=widths)
    blocks: list[Any] = [block for block in parts.blocks if isinstance(block, BasicBlock)]
    first = len(blocks) // len(widths) if static is None else static
    if not 0 <= first < len(blocks):
        raise PliantError(
            got=f"{first} static blocks of {len(blocks)}", expected="fewer than all", do="lower static, or add layers"
        )
    for block in blocks[first:]:
        layers = [deform(m, pace) if isinstance(m, nn.Conv2d) else m for m in block.branch]
        block.branch = nn.Sequential(*layers)
    return parts.model()
