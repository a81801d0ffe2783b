"""TEL: a tree ensemble in place of a CNN's dense layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from pliant.execute.trees import Trees
from pliant.rules.smooth_step import SmoothStep
from pliant.systems.backbones import conv_norm


def tel(
    num_classes: int = 10, in_chans: int = 3, *, trees: int = 10, depth: int = 4, width: float = 1.0,
    widths: Sequence[int] = (16, 32), cells: int = 2,
) -> nn.Sequential:  # fmt: skip
    r"""A small CNN whose classifier is a tree ensemble layer on batch-normalised features.

    .. math:: y = \sum_{t, l} P_{tl}(z)\, o_{tl}, \qquad z = \mathrm{BN}(\mathrm{pool}(\mathrm{conv}(x)))

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`, at least 4 by 4; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        trees: how many.
        depth: of each; it has :math:`2^\text{depth}` leaves.
        width: :math:`\gamma` of the smooth step; larger reaches more leaves.
        widths: channels of the convolutions, each with a pool.
        cells: cells per side that the features are pooled to.

    Returns:
        Features and trees; the site of level ``k`` is ``trees.sites.k``.

    Raises:
        PliantError: where there are no trees or no levels, or the width isn't positive.

    >>> from pliant.core.bind import sites
    >>> list(sites(tel(depth=2)))
    ['trees.sites.0', 'trees.sites.1']

    References:
        Survey section 2.1.3 (2b); Hazimeh et al., The Tree Ensemble Layer, ICML 2020.

    Differs from the paper: trees are summed, not concatenated; the CNN is ours; the layer (:class:`pliant.execute.Trees`) may stand behind any features.
    """
    plan = zip((in_chans, *widths), widths, strict=False)
    convs = [nn.Sequential(*conv_norm(a, b), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)) for a, b in plan]
    inputs = widths[-1] * cells * cells
    features = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(cells), nn.Flatten(), nn.BatchNorm1d(inputs))
    forest = Trees(inputs, num_classes, trees=trees, rules=[SmoothStep(width) for _ in range(depth)])
    return nn.Sequential(OrderedDict(features=features, trees=forest))
