"""SCSampler: a light network looks at every clip of a video, the heavy one at the most salient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pliant.core.site import Site
from pliant.execute.heads import PooledClassifier
from pliant.execute.select import Select
from pliant.rules.topk import Ranked
from pliant.scores.policy import Shrink
from pliant.scores.saliency import ElementSaliency
from pliant.systems.backbones import conv_norm, resnet


def scsampler(
    num_classes: int = 10, in_chans: int = 3, *, keep: int = 4, depth: int = 20, widths: Sequence[int] = (16, 32, 64),
    size: int = 8, light: Sequence[int] = (16, 32),
) -> Select:  # fmt: skip
    r"""A sampler of salient clips: :math:`y = \frac{1}{K} \sum_{t \in \mathrm{top}_K s} f(x_t)`, :math:`s_t = \max_c \mathrm{softmax}(g(x_t))_c`.

    Train :math:`f` (``network``) on single clips and freeze it, then :math:`g` (``site.scorer``): by the cross-entropy of its
    ``logits`` on every clip, or in the order of :math:`f`'s own scores (:func:`pliant.losses.saliency_ranking`). :math:`K` is
    free afterwards: bind ``pliant.rules.TopK(k)``.

    Shape:
        videos :math:`(R, T, \text{in\_chans}, H, W)` with :math:`T \ge K`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the frames.
        keep: :math:`K`, clips that the heavy network sees; 10 in the paper.
        depth: layers of the heavy network, a ResNet without temporal convolutions: 6n + 2.
        widths: of its three groups.
        size: side of the thumbnails that the sampler sees.
        light: channels of the sampler's 3x3 convolutions.

    Returns:
        The executor; its site is ``site``.

    >>> from pliant.core.bind import sites
    >>> list(sites(scsampler(depth=8)))
    ['site']

    References:
        Survey section 4.2.2 (2); Korbar, Tran, Torresani, SCSampler, ICCV 2019.

    Differs from the paper: a clip is one frame; the sampler sees thumbnails in place of what a compressed stream holds (motion
    vectors, residuals), and no audio.
    """
    layers = [
        layer
        for k, (before, after) in enumerate(pairwise((in_chans, *light)))
        for layer in (*conv_norm(before, after, 3, 2 if k else 1), nn.ReLU())
    ]
    sampler = nn.Sequential(Shrink(size), *layers, PooledClassifier(light[-1], num_classes, size=2))
    heavy = resnet(num_classes, in_chans, depth=depth, widths=widths).model()
    return Select(Site(ElementSaliency(sampler), Ranked(keep)), heavy)
