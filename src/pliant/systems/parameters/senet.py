"""SENet: every block's channels scaled by weights that the image decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pliant.core.site import Score, Site
from pliant.execute.kernels import Adapted, Scaled
from pliant.rules.soft import Sigmoid
from pliant.scores.modulation import Excitation
from pliant.systems.backbones import BasicBlock, resnet
from pliant.systems.parts import chosen

Attention = Callable[[int], Score]
"""From channels to a score of each of them."""


def after(block: nn.Module, inputs: int, outputs: int, attention: Attention) -> nn.Module:
    """Graph A: the weights are decided from the block's output."""
    return nn.Sequential(block, Adapted(Site(attention(outputs), Sigmoid(), shape=(outputs,)), Scaled()))


def beside(block: nn.Module, inputs: int, outputs: int, attention: Attention) -> nn.Module:
    """Graph B: from the block's input, which needs as many channels; where it hasn't, graph C."""
    if inputs != outputs:
        return through(block, inputs, outputs, attention)
    return Adapted(Site(attention(outputs), Sigmoid(), shape=(outputs,)), Scaled(block))


def through(block: nn.Module, inputs: int, outputs: int, attention: Attention) -> nn.Module:
    """Graph C: from the block's input behind a 1x1 convolution."""
    widen = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    scorer = nn.Sequential(widen, attention(outputs))
    return Adapted(Site(scorer, Sigmoid(), shape=(outputs,)), Scaled(block))


GRAPHS = {"after": after, "beside": beside, "through": through}


def senet(
    num_classes: int = 10, in_chans: int = 3, *, depth: int = 20, widths: Sequence[int] = (16, 32, 64),
    reduction: int = 16, graph: str = "after",
) -> nn.Module:  # fmt: skip
    r"""CIFAR's ResNet with squeeze-and-excitation on every residual branch, before the shortcut is added.

    .. math:: y' = \sigma(W_2\,\mathrm{relu}(W_1\,\mathrm{GAP}(y)))\; y

    ``Always``, and the plain form, is the ResNet.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, \text{num\_classes})`.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        depth: layers, 6n + 2.
        widths: channels of the three groups.
        reduction: of the bottleneck between :math:`W_1` and :math:`W_2`.
        graph: what the weights are decided from: "after" (A: the branch's output, SENet), "beside" (B: its input), "through"
            (C: its input behind a 1x1 convolution). ``GRAPHS`` attach any attention to any block.

    Returns:
        The network; a site in every block.

    Raises:
        PliantError: where there is no such graph, or ``depth`` isn't 6n + 2.

    >>> import pliant
    >>> list(pliant.sites(senet(depth=8)))[0]
    'blocks.0.branch.1.site'

    References:
        Survey section 2.2.3 (1), Eqs. 9-10; Hu, Shen, Sun, Squeeze-and-Excitation Networks, CVPR 2018; the graphs: Guo et al.,
        SPANet, ICME 2020.

    Differs from the paper: a bottleneck has at least 4 units.
    """
    attach = chosen(GRAPHS, graph, "graph")
    parts = resnet(num_classes, in_chans, depth=depth, widths=widths)
    blocks: list[Any] = [block for block in parts.blocks if isinstance(block, BasicBlock)]
    for block in blocks:
        outputs = block.branch[-1].num_features
        block.branch = attach(block.branch, block.inputs, outputs, lambda c: Excitation(c, reduction=reduction))
    return parts.model()
