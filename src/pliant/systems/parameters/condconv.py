"""CondConv: kernels mixed for each image from a few experts, by a routing function of its pooled features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.kernels import Adapted, MixedConv2d, Steps
from pliant.functional.dynamic_conv import Geometry
from pliant.rules.soft import Sigmoid
from pliant.scores.modulation import PooledLinear
from pliant.systems.mobile import Branch, inverted, mobile


def mixed(expansion: int, experts: int) -> Branch:
    """An inverted residual branch whose three convolutions are mixed by one decision."""

    def build(inputs: int, outputs: int, stride: int) -> nn.Module:
        wide = inputs * expansion
        each = Geometry(stride, 1, groups=wide)
        steps = [
            MixedConv2d(inputs, wide, 1, experts=experts), nn.BatchNorm2d(wide), nn.ReLU(),
            MixedConv2d(wide, wide, 3, experts=experts, geometry=each), nn.BatchNorm2d(wide), nn.ReLU(),
            MixedConv2d(wide, outputs, 1, experts=experts), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        return Adapted(Site(PooledLinear(inputs, experts), Sigmoid(), shape=(experts,)), Steps(steps))

    return build


def condconv(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 24, 40), depth: int = 2,
    experts: int = 8, static: int = 2, stem_stride: int = 1,
) -> nn.Module:  # fmt: skip
    r"""A small MobileNetV2 whose later blocks mix their kernels for each image.

    .. math:: r(x) = \sigma(R\,\mathrm{GAP}(x)), \qquad W(x) = \sum_e r_e(x)\, W_e

    with one convolution by :math:`W(x)`: what an ensemble of :math:`E` branches computes, for about the cost of one. A block's
    expanding, depthwise and projecting convolutions share a decision. Bind ``Softmax(30.0)`` to train under softmax weights
    whose temperature is annealed, ``Always`` for the static network of the experts' sums.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, \text{num\_classes})`.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        widths: channels of the stages.
        depth: blocks of each stage.
        experts: :math:`E`; 4 to 32 in the paper.
        static: so many of the first blocks have ordinary convolutions.
        stem_stride: of the first convolution.

    Returns:
        The network; sites at its dynamic blocks.

    Raises:
        PliantError: where no block would be dynamic.

    >>> import pliant
    >>> list(pliant.sites(condconv(widths=(4, 8), depth=1, static=1, experts=2)))
    ['blocks.1.site']

    References:
        Survey section 2.2.1 (1); Yang, Bender, Le, Ngiam, CondConv, NeurIPS 2019.

    Differs from the paper: a small network for small images, whose last linear layer is static.
    """
    blocks = depth * len(widths)
    if not 0 <= static < blocks:
        raise PliantError(
            got=f"{static} static blocks of {blocks}", expected="fewer than all", do="lower static, or add blocks"
        )
    branches = [inverted(4)] * static + [mixed(4, experts)] * (blocks - static)
    parts = mobile(num_classes, in_chans, widths=widths, depth=depth, stem_stride=stem_stride, branches=branches)
    return parts.model()
