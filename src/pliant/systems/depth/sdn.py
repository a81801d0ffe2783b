"""Shallow-Deep Networks: internal classifiers along a network that may be trained already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pliant.core.site import Site
from pliant.execute.exits import Exits, MostConfident
from pliant.execute.heads import MixedPoolClassifier
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability
from pliant.systems.backbones import BACKBONES
from pliant.systems.parts import Reached, chosen


def nearest(reached: Sequence[Reached], at: float) -> int:
    """After how many blocks the share of the FLOPs spent is nearest to ``at``.

    >>> nearest([Reached(0.1, ()), Reached(0.5, ()), Reached(0.9, ())], 0.6)
    1
    """
    return min(range(len(reached)), key=lambda i: abs(reached[i].share - at))


def sdn(
    num_classes: int = 10, in_chans: int = 3, *, backbone: str = "resnet56",
    at: Sequence[float] = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9), threshold: float = 0.2, image_size: int = 32,
) -> Exits:  # fmt: skip
    r"""A Shallow-Deep Network: internal classifiers where given shares of the network's FLOPs are spent.

    A row leaves at the first exit with :math:`\max_c p_c \ge 1 - t`, one :math:`t` for all; where no exit is sure, the most
    confident of all answers. ``plain(model)`` is the host network; see :func:`exits_only` and :func:`ramp` for training.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        backbone: "resnet56", "resnet20", "vgg16" or another of ``BACKBONES``.
        at: growing shares in (0, 1) of the plain network's FLOPs, counted on fake tensors; each internal classifier
            reads after the block that comes nearest.
        threshold: doubt :math:`t = 1 - q` at or below which a row leaves, q being the paper's confidence.
        image_size: side in pixels for which the FLOPs are counted and the classifiers' pools laid out; others work
            where every map keeps at least the cells that were laid out (4 a side, or the map's own where it has fewer).

    Returns:
        Stages, internal classifiers and sites as an ``Exits``; the sites are ``sites.0`` and up.

    Raises:
        PliantError: where there is no such backbone, or two shares fall on one block.

    >>> from pliant.core.bind import sites
    >>> net = sdn(backbone="resnet20", at=(0.3, 0.6))
    >>> [len(stage) for stage in net.stages], list(sites(net))
    ([4, 2, 4], ['sites.0', 'sites.1'])

    References:
        Survey section 6 (1); Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019.

    Differs from the paper: nothing is placed by hand; the nearest block gives the released code's places on ResNet-56 and
    VGG-16 exactly. A row leaves by doubt in log space, so that confidences near 1 don't tie.
    """
    parts = chosen(BACKBONES, backbone)(num_classes, in_chans)
    reached = parts.reached((in_chans, image_size, image_size))
    after = [nearest(reached, share) for share in at]
    stages = parts.stages(after)
    maps = [reached[n].shape for n in after]
    heads = [MixedPoolClassifier(shape[0], num_classes, size=min(4, *shape[1:])) for shape in maps]
    sites = [Site(MaxProbability(), Threshold(threshold)) for _ in heads]
    return Exits(stages, [*heads, parts.head], sites, answer=MostConfident(MaxProbability()))


def exits_only(model: Exits) -> list[nn.Parameter]:
    """Freeze the host network of ``model`` and return what is left to train, the early exits' parameters.

    The host is put in evaluation mode too, for its batch norms would move with every batch: call this after every
    ``model.train()``. The host's own output then stays the same, bit for bit.

    >>> net = sdn(backbone="resnet8", at=(0.5,))
    >>> len(exits_only(net.train())), net.training, net.stages.training
    (3, True, False)
    """
    model.stages.requires_grad_(False).eval()
    model.heads[-1].requires_grad_(False).eval()
    return [p for head in list(model.heads)[:-1] for p in head.parameters()]


def ramp(at: Sequence[float], *, start: float = 0.01) -> Callable[[float], list[float]]:
    """Weights of the exits' losses by progress in [0, 1], for ``pliant.losses.MultiExit``, to train from scratch.

    Each internal classifier's grows from ``start`` to its share of the cost, the last exit's is 1.

    >>> [round(w, 3) for w in ramp([0.15, 0.9])(0.5)]
    [0.08, 0.455, 1.0]
    """
    return lambda progress: [*(start + (share - start) * progress for share in at), 1.0]
