"""BranchyNet: a chain network with a few side branches that may hold convolutions of their own."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.execute.heads import PooledClassifier
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import Entropy
from pliant.systems.backbones import BACKBONES, BasicBlock, halve, norm_pool
from pliant.systems.parts import chosen

Branches = dict[int, nn.Module]
"""From a number of blocks to the branch that reads what comes after them."""


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]


def _lenet(num_classes: int, blocks: int) -> Branches:
    return {
        0: nn.Sequential(*halve(), nn.Conv2d(5, 10, 3, padding=1), *halve(), PooledClassifier(10, num_classes, size=8))
    }


def _alexnet(num_classes: int, blocks: int) -> Branches:
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return {
        1: nn.Sequential(*norm_pool(), *_conv(64, 32), *_conv(32, 32), pool, PooledClassifier(32, num_classes, size=4)),
        2: nn.Sequential(*norm_pool(), *_conv(96, 32), pool, PooledClassifier(32, num_classes, size=2)),
    }


def _resnet(num_classes: int, blocks: int) -> Branches:
    norm, pool = nn.LocalResponseNorm(3, alpha=1.5e-4, beta=0.75, k=2.0), nn.MaxPool2d(3, 2, ceil_mode=True)
    return {
        1: nn.Sequential(norm, *_conv(16, 32), *_conv(32, 32), pool, PooledClassifier(32, num_classes, size=8)),
        blocks // 3: nn.Sequential(BasicBlock(16, 16), PooledClassifier(16, num_classes, size=8)),
    }


BRANCHES: dict[str, Callable[[int, int], Branches]] = {"lenet": _lenet, "alexnet": _alexnet} | {
    name: _resnet for name in BACKBONES if name.startswith("resnet") and name != "resnet8"
}


def branchynet(
    num_classes: int = 10, in_chans: int = 3, *, backbone: str = "lenet", threshold: float = 0.5
) -> Exits:  # fmt: skip
    r"""BranchyNet: B-LeNet (one branch), B-AlexNet or B-ResNet (two each); a row leaves where its entropy is low.

    A row leaves at exit :math:`k` where :math:`-\sum_c p_c \log p_c / \log C \le t_k`; the last exit takes the rest. In training,
    ``trace.exits`` holds the logits of every exit, the main one last, for ``pliant.losses.MultiExit`` (weight 1 each).

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`, :math:`H, W \ge 20` or so; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        backbone: "lenet", "alexnet" or "resnet14" to "resnet110"; the paper's are "lenet", "alexnet", "resnet110".
        threshold: normalised entropy in [0, 1] at or below which a row leaves, at every branch; ``tune`` sets them.

    Returns:
        Stages, branches and sites as an ``Exits``; the sites are ``sites.0`` and up.

    Raises:
        PliantError: where there is no such backbone.

    >>> net = branchynet(in_chans=1)
    >>> len(net.sites), sum(p.numel() for p in net.parameters())
    (1, 74694)

    References:
        Survey sections 2.1.1 (1b) and 5.1.1; Teerapittayanon et al., BranchyNet, ICPR 2016.

    Differs from the paper: the entropy is divided by log C (multiply a threshold by log C to compare); pools before the
    linear layers are adaptive, so that 28 and 32 pixels both work (at 28, B-LeNet's maps are the paper's); a ReLU stands
    between LeNet's last two layers and one linear layer in place of two in B-ResNet's first branch, where the released
    code has linear layers in a row; ResNet has 6n + 2 layers with projections, its branches read after the first block
    and after the first third (the released code has one block more).
    """
    parts = chosen(BACKBONES, backbone)(num_classes, in_chans)
    branches = chosen(BRANCHES, backbone)(num_classes, len(parts.blocks))
    sites = [Site(Entropy(), Threshold(threshold)) for _ in branches]
    return Exits(parts.stages(list(branches)), [*branches.values(), parts.head], sites)
