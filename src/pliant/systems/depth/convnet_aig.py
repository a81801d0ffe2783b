"""ConvNet-AIG: a residual network in which every block has a gate of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.estimators.gumbel import Gumbel, GumbelSample
from pliant.execute.skip import Residual
from pliant.rules.threshold import Threshold
from pliant.scores.gates import MLPGate
from pliant.systems.backbones import resnet
from pliant.systems.parts import chosen

ESTIMATORS: dict[str, type[Gumbel]] = {"argmax": Gumbel, "sample": GumbelSample}


def gated(block: Any, estimator: type[Gumbel], temperature: float) -> nn.Sequential:
    """A basic block whose branch runs where a gate on the block's input says so, rectified after the sum."""
    site = Site(MLPGate(block.inputs), estimator(Threshold(0.0), temperature=temperature))
    return nn.Sequential(OrderedDict(residual=Residual(block.branch, site, shortcut=block.shortcut), relu=nn.ReLU()))


def convnet_aig(
    num_classes: int = 10, in_chans: int = 3, *, depth: int = 110, always: Sequence[int] = (), estimator: str = "argmax",
    temperature: float = 1.0,
) -> nn.Sequential:  # fmt: skip
    r"""ConvNet-AIG on CIFAR's ResNet: every residual block has a gate that reads the block's input.

    .. math:: x_l = \mathrm{relu}(\mathrm{shortcut}(x_{l-1}) + z_l F(x_{l-1})), \qquad z_l = \mathrm{gate}_l(x_{l-1}) \in \{0, 1\}

    While training, :math:`z` is a hard Gumbel sample with the relaxed gradient. Gates start about 85 % open. Their batch
    norm needs at least two rows while training (PyTorch raises a ValueError for one); in evaluation any batch works.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        depth: layers, 6n + 2: 110 in the paper (54 blocks), 20, 32, 38, 56 for less.
        always: indices of blocks, from 0, that always run and have no gate (the paper's target rate 1).
        estimator: what a trained gate does in evaluation: "argmax" runs the likelier alternative, as the paper says;
            "sample" draws, as the released code does.
        temperature: of the relaxed gradient.

    Returns:
        Stem, blocks and head; the site of block ``i`` is ``blocks.i.residual.site``.

    Raises:
        PliantError: where the depth isn't 6n + 2, a block doesn't exist, or there is no such estimator.

    >>> from pliant.core.bind import sites
    >>> list(sites(convnet_aig(depth=8, always=(0,))))
    ['blocks.1.residual.site', 'blocks.2.residual.site']

    References:
        Survey sections 2.1.1 (2b), 5.2.1 and 5.2.2; Veit and Belongie, Convolutional Networks with Adaptive Inference
        Graphs, ECCV 2018.

    Differs from the paper: a closed gate's branch isn't computed in evaluation (the released code computes it and
    multiplies by 0). The shortcut where sizes change is a 1x1 convolution with batch norm, as in the released code.
    """
    parts = resnet(num_classes, in_chans, depth=depth)
    kept = set(always)
    if not kept <= set(range(len(parts.blocks))):
        raise PliantError(
            got=f"always={sorted(kept)}", expected=f"indices from 0 to {len(parts.blocks) - 1}",
            do="name blocks of this depth",
        )  # fmt: skip
    gumbel = chosen(ESTIMATORS, estimator, "estimator")
    for i in sorted(set(range(len(parts.blocks))) - kept):
        parts.blocks[i] = gated(parts.blocks[i], gumbel, temperature)
    return parts.model()
