"""SkipNet: before every residual block but the first a gate says whether it runs, by what the block before it said."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from pliant.core.site import Site
from pliant.estimators.straight_through import StraightThrough
from pliant.execute.chain import Chain
from pliant.execute.skip import Residual
from pliant.rules.threshold import Threshold
from pliant.scores.gates import LinearGate
from pliant.scores.recurrent import GateMemory, RecurrentGate
from pliant.scores.spatial import ConvGate
from pliant.systems.backbones import BasicBlock, resnet
from pliant.systems.parts import chosen


def _strided(channels: int, memory: GateMemory) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), LinearGate(channels))


GATES: dict[str, Callable[[int, GateMemory], nn.Module]] = {
    "recurrent": RecurrentGate,
    "feedforward": lambda channels, memory: ConvGate(channels),
    "strided": _strided,
    "light": lambda channels, memory: LinearGate(channels),
}
"""From the channels before a block and the shared memory to its gate: RNNGate, FF-I and FF-II of the paper, a pooled linear one."""


def skipnet(
    num_classes: int = 10, in_chans: int = 3, *, depth: int = 38, widths: Sequence[int] = (16, 32, 64), gate: str = "recurrent",
    hidden: int = 10,
) -> nn.Sequential:  # fmt: skip
    r"""A CIFAR ResNet whose gates skip blocks: :math:`x_{l+1} = \mathrm{relu}(\mathrm{shortcut}(x_l) + g_l(x_l)\,F_l(x_l))`.

    Train in two stages with ``pliant.train.relaxed_to_hybrid``: straight-through gates with the task's loss, then
    ``pliant.losses.Hybrid`` on sampled ones at a lower rate; from scratch the policy's gradient collapses.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        depth: layers, 6n + 2.
        widths: of the three groups.
        gate: "recurrent" (one LSTM of 10 units along the depth, the paper's best), "feedforward" (FF-I, dear: two convolutions
            of the features' width), "strided" (FF-II, one), or "light" (a mean and a linear layer).
        hidden: units of the recurrent gates' memory.

    Returns:
        Stem, blocks and head; the site of block ``i`` is ``blocks.blocks.k.site``, ``k = 1, 3, 5 ...``.

    Raises:
        PliantError: where the depth isn't 6n + 2, or there is no such gate.

    >>> from pliant.core.bind import sites
    >>> list(sites(skipnet(depth=8)))
    ['blocks.blocks.1.site', 'blocks.blocks.3.site']

    References:
        Survey sections 2.1.1 (2b), 5.1.3 and 5.2.2; Wang et al., SkipNet: Learning Dynamic Routing in Convolutional Networks, ECCV 2018.

    Differs from the paper: a gate leaves out the branch, and the rectifier behind the sum stays, which changes skipped blocks with a
    projection alone; gates start open, and FF-II's has one logit for two; the recipe's second stage runs at a tenth of the first one's
    rate and the policy's gradient at full weight, unless told (a thousandth and 0.01 in the released code). FF-I's gate alone
    costs more than it may save.
    """
    parts, memory, build = (
        resnet(num_classes, in_chans, depth=depth, widths=widths),
        GateMemory(hidden),
        chosen(GATES, gate, "gate"),
    )
    first, *rest = parts.blocks
    gated: list[nn.Module] = []
    for block in (b for b in rest if isinstance(b, BasicBlock)):
        site = Site(build(block.inputs, memory), StraightThrough(Threshold(0.0)))
        gated += [Residual(block.branch, site, shortcut=block.shortcut), nn.ReLU()]
    return nn.Sequential(OrderedDict(stem=parts.stem, blocks=Chain([first, *gated]), head=parts.head))
