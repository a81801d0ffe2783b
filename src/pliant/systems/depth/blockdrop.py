"""BlockDrop: a policy network sees the image once and drops blocks of a pre-trained residual network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pliant.core.site import Site
from pliant.estimators.score_function import ScoreFunction
from pliant.execute.chain import Chain
from pliant.execute.planned import Planned
from pliant.execute.skip import Residual
from pliant.rules.fixed import Always
from pliant.rules.threshold import Threshold
from pliant.scores.policy import Policy, Shrink
from pliant.systems.backbones import BasicBlock, resnet
from pliant.systems.parts import Parts


def planned(parts: Parts, policy: Parts, *, width: int, floor: float = 1.0, view: int | None = None) -> Planned:
    """``parts`` with every block planned by ``policy``, a network whose features have ``width`` channels.

    >>> small = resnet(10, 3, depth=8, widths=(4, 8, 8))
    >>> planned(resnet(10, 3, depth=8), small, width=8).site.shape
    (3,)
    """
    blocks: list[Any] = [block for block in parts.blocks if isinstance(block, BasicBlock)]
    gated = [Residual(b.branch, Site(nn.Identity(), Always()), shortcut=b.shortcut) for b in blocks]
    chain = Chain([module for block in gated for module in (block, nn.ReLU())])
    seen = nn.Identity() if view is None else Shrink(view)
    scorer = Policy(nn.Sequential(seen, policy.stem, *policy.blocks), width, len(gated))
    site = Site(scorer, ScoreFunction(Threshold(0.0), floor=floor), shape=(len(gated),))
    return Planned(site, chain, stem=parts.stem, head=parts.head)


def blockdrop(
    num_classes: int = 10, in_chans: int = 3, *, depth: int = 32, widths: Sequence[int] = (16, 32, 64),
    policy: Sequence[int] = (16, 32, 64), view: int | None = None, floor: float = 0.8,
) -> Planned:  # fmt: skip
    r"""A CIFAR ResNet whose blocks a ResNet-8 plans from the image: :math:`u \sim \mathrm{Bernoulli}(\alpha s + (1 - \alpha)(1 - s))`.

    Train in three phases with ``pliant.train.agent_on_backbone``: the ResNet with every block; the policy alone on it, by
    ``SelfCritical(BlockDropReward(gamma))`` and an ``EntropyBonus`` of 0.1 under ``PlanCurriculum``, which frees blocks from the
    last one; then both, with the task's loss beside. At test :math:`u = 1[s > 0.5]`.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        depth: layers of the planned network, 6n + 2.
        widths: of its three groups.
        policy: widths of the policy network's three groups, one block each.
        view: side that the policy's image is shrunk to; None shows it all.
        floor: :math:`\alpha`; no action is less likely than :math:`1 - \alpha` while it learns.

    Returns:
        The planned network; its one site is ``site``, a value for each block.

    Raises:
        PliantError: where the depth isn't 6n + 2, or a group is missing.

    >>> from pliant.core.bind import sites
    >>> model = blockdrop(depth=8, policy=(4, 8, 8))
    >>> sites(model)["site"].shape, model.head is not None
    ((3,), True)

    References:
        Survey sections 2.1.1 (2c), 5.1.2 and 5.2.2; Wu et al., BlockDrop: Dynamic Inference Paths in Residual Networks, CVPR 2018.

    Differs from the paper: the rectifier behind a dropped block's shortcut stays, which changes those with a projection alone;
    the policy starts in favour of every block (bias 1, a probability of 0.73).
    """
    parts = resnet(num_classes, in_chans, depth=depth, widths=widths)
    small = resnet(num_classes, in_chans, depth=8, widths=policy)
    return planned(parts, small, width=policy[-1], floor=floor, view=view)
