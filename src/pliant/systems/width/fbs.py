"""FBS: feature boosting and suppression, channels pruned anew for every input."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.channels import Channels, Unpacked
from pliant.execute.heads import PooledClassifier
from pliant.rules.topk import TopK
from pliant.scores.modulation import Saliency

CIFARNET = ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (192, 2), (192, 1), (192, 1))
"""M-CifarNet: output channels and stride of its eight convolutions."""


class Density(TopK):
    r"""Keep :math:`\lceil d\,O \rceil` of a row's :math:`O` channels, those of the highest saliency.

    Args:
        density: :math:`d` in [0, 1].

    Raises:
        PliantError: where the density is outside [0, 1].

    >>> import torch
    >>> Density(0.5)(torch.tensor([[0.3, 0.9, 0.5]])).value
    tensor([[0., 1., 1.]])

    References:
        Survey section 2.1.2 (3b); Gao et al., Dynamic Channel Pruning, ICLR 2019.
    """

    def __init__(self, density: float) -> None:
        super().__init__(share=density)

    def count(self, choices: int) -> int:
        """How many of ``choices`` are kept."""
        return math.ceil((self.share or 0.0) * choices)


def fbs(
    num_classes: int = 10, in_chans: int = 3, *, layers: Sequence[tuple[int, int]] = CIFARNET, density: float = 0.5, kernel: int = 3,
) -> nn.Sequential:  # fmt: skip
    r"""M-CifarNet whose convolutions compute each image's most salient channels alone.

    .. math:: g = \mathrm{relu}(W\,\mathrm{mean}_{hw}|x_{l-1}| + b), \quad \pi = \mathrm{top}_{\lceil d\,O \rceil}(g), \quad
              x_l = \mathrm{relu}\big(\pi \odot (g \odot \mathrm{norm}(\mathrm{conv}(x_{l-1})) + \beta)\big)

    Multiply-adds fall about with :math:`d^2`. Train at density 1 first, then lower it step by step with
    ``pliant.bind(model, {"*": Density(0.8)})``, fine-tuning each; with ``GateL1(of=scored)`` at a tiny weight.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        layers: output channels and stride of each convolution.
        density: :math:`d`, share of the output channels that are computed, in (0, 1].
        kernel: side of the convolutions, odd.

    Returns:
        The chain; the site of layer ``i`` is ``layers.i.site``.

    Raises:
        PliantError: where there is no layer, or the density isn't in (0, 1].

    >>> import torch, pliant
    >>> model = fbs(layers=[(4, 1), (6, 2)]).eval()
    >>> y, trace = pliant.record(model)(torch.zeros(1, 3, 8, 8))
    >>> trace["layers.0.site"][0].value.sum(), trace["layers.1.site"][0].value.sum()
    (tensor(2.), tensor(3.))

    References:
        Survey sections 2.1.2 (3b) and 5.1.3; Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019.

    Differs from the paper: every convolution is padded to keep its size, and nothing is dropped out; the released code's :math:`\beta`,
    0.1 at the start, stands outside the boost, as here.
    """
    if not layers or not 0 < density <= 1:
        raise PliantError(
            got=f"{len(layers)} layers and density {density}", expected="at least one layer and a density in (0, 1]", do="pass density=0.5"
        )  # fmt: skip
    made: list[nn.Module] = []
    inputs = in_chans
    for outputs, stride in layers:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        site = Site(nn.Identity(), Density(density), shape=(outputs,))
        made.append(Channels(conv, nn.BatchNorm2d(outputs, affine=False), site, boost=Saliency(inputs, outputs)))
        inputs = outputs
    head = nn.Sequential(Unpacked(), PooledClassifier(inputs, num_classes))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*made), head=head))
