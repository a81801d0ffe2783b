"""Big/little DNN: two separate networks; the big one runs where the little one is unsure."""

from __future__ import annotations

from torch import nn

from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import Margin
from pliant.systems.backbones import BACKBONES
from pliant.systems.parts import chosen


def big_little(little: nn.Module, big: nn.Module, *, threshold: float = 0.5) -> Exits:
    r"""A cascade of any two models with one label set: little always runs, big where little's margin is small.

    A row leaves with little's answer where :math:`p_{(1)} - p_{(2)} \ge 1 - t`. Both read the raw input and share nothing, so
    a hard row pays for both: mean cost is :math:`c_l + P(\text{go on})\, c_b`. Train each as usual, alone.

    Shape:
        ``x``: whatever both models take, rows first; logits :math:`(R, C)`.

    Args:
        little: the cheap model, ``heads.0``.
        big: the costly model, ``heads.1``; ``plain(cascade)`` is big alone.
        threshold: one minus the margin, in [0, 1], at or below which little answers.

    Returns:
        The cascade; its one site is ``sites.0``.

    Raises:
        PliantError: where the threshold isn't a number.

    >>> import torch
    >>> cascade = big_little(nn.Identity(), nn.Softmax(-1), threshold=0.5).eval()
    >>> cascade(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[4.0000, 0.0000],
            [0.5000, 0.5000]])

    References:
        Survey sections 2.1.1 (1a) and 5.1.1; Park et al., Big/Little Deep Neural Network, CODES+ISSS 2015.
    """
    return Exits([nn.Identity(), nn.Identity()], [little, big], [Site(Margin(), Threshold(threshold))])


def big_little_dnn(
    num_classes: int = 10, in_chans: int = 3, *, little: str = "cnn2", big: str = "resnet20", threshold: float = 0.5
) -> Exits:
    """Big/little DNN of two backbones by name; see :func:`big_little` for a pair of your own.

    Formula: as :func:`big_little`.

    Shape:
        images (R, in_chans, H, W); logits (R, num_classes).

    Args:
        num_classes: number of classes.
        in_chans: channels of the images.
        little: name of the little network, out of ``BACKBONES``.
        big: name of the big network; the default costs about 31 times the MACs of the default little one at 32 pixels.
        threshold: one minus the margin, in [0, 1], at or below which little answers; ``tune`` sets it.

    Returns:
        The cascade; its one site is ``sites.0``.

    Raises:
        PliantError: where there is no such backbone.

    >>> [type(head).__name__ for head in big_little_dnn(in_chans=1).heads]
    ['Sequential', 'Sequential']

    References:
        Survey sections 2.1.1 (1a) and 5.1.1; Park et al., Big/Little Deep Neural Network, CODES+ISSS 2015.

    Differs from the paper: the pair and the threshold are chosen by you and by ``tune``, not by a search over pairs, and
    no controller moves the threshold at run time.
    """
    pair = [chosen(BACKBONES, name)(num_classes, in_chans).model() for name in (little, big)]
    return big_little(*pair, threshold=threshold)
