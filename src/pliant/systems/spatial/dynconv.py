"""DynConv: a residual network whose blocks run at the positions that a mask unit picks for each image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule, Site
from pliant.estimators.gumbel import Gumbel
from pliant.estimators.straight_through import StraightThrough
from pliant.execute.heads import PooledClassifier
from pliant.execute.pixels import Pixels
from pliant.rules.threshold import Threshold
from pliant.scores.spatial import SqueezeMaskHead
from pliant.systems.backbones import conv_norm
from pliant.systems.parts import Parts, chosen


class NoiseFree(StraightThrough):
    """The last fifth of DynConv's training: no Gumbel noise, and the budget counts the very positions that run.

    >>> import torch
    >>> NoiseFree(Threshold(0.0)).train()(torch.tensor([2.0, -2.0])).value
    tensor([1., 0.])
    """

    def forward(self, scores: Tensor) -> Outcome:
        """Hard values with the sigmoid's gradient, which is the cost's gradient too."""
        return Outcome(super().forward(scores).value)


def _basic(inputs: int, width: int, stride: int) -> tuple[nn.Sequential, int]:
    layers = [*conv_norm(inputs, width, 3, stride), nn.ReLU(), *conv_norm(width, width)]
    return nn.Sequential(*layers), width


def _bottleneck(inputs: int, width: int, stride: int) -> tuple[nn.Sequential, int]:
    layers = [
        *conv_norm(inputs, width, 1), nn.ReLU(), *conv_norm(width, width, 3, stride), nn.ReLU(), *conv_norm(width, 4 * width, 1),
    ]  # fmt: skip
    return nn.Sequential(*layers), 4 * width


def _inverted(inputs: int, width: int, stride: int) -> tuple[nn.Sequential, int]:
    hidden = 6 * inputs
    depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
    layers = [
        *conv_norm(inputs, hidden, 1), nn.ReLU6(), depthwise, nn.BatchNorm2d(hidden), nn.ReLU6(), *conv_norm(hidden, width, 1),
    ]  # fmt: skip
    return nn.Sequential(*layers), width


BLOCKS: dict[str, Callable[[int, int, int], tuple[nn.Sequential, int]]] = {
    "basic": _basic, "bottleneck": _bottleneck, "inverted": _inverted,
}  # fmt: skip


def masked_block(inputs: int, branch: nn.Sequential, outputs: int, stride: int, rule: Rule, dense_above: float) -> Any:
    """A residual block under a mask unit that reads its input; rectified after the sum."""
    same = stride == 1 and inputs == outputs
    shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))
    site = Site(SqueezeMaskHead(inputs, stride=stride), rule)
    pixels = Pixels(branch, site, shortcut=shortcut, dense_above=dense_above)
    return nn.Sequential(OrderedDict(pixels=pixels, relu=nn.ReLU()))


def dynconv(
    num_classes: int = 10, in_chans: int = 3, *, blocks: int = 5, block: str = "basic", width: int = 16,
    temperature: float = 1.0, dense_above: float = 1.0,
) -> nn.Sequential:  # fmt: skip
    r"""DynConv on CIFAR's ResNet: in every residual block a mask unit picks the positions where the branch runs.

    .. math:: x_l = \mathrm{relu}(\mathrm{shortcut}(x_{l-1}) + m_l \odot F(x_{l-1})), \qquad
              m_l = 1[\mathrm{conv}_{3 \times 3}(x_{l-1}) + u \cdot \mathrm{mean}_{hw}(x_{l-1}) + b > 0]

    While training, :math:`m` is a hard Gumbel sample with the relaxed gradient. Train with
    ``pliant.losses.ResourceAware(theta)`` at weight 10, the last fifth of the epochs with :class:`NoiseFree` bound.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        blocks: in each of the three groups; 5 basic ones are ResNet-32, 1 is ResNet-8.
        block: "basic" (two 3x3 convolutions), "bottleneck" (four times the width outside) or "inverted" (depthwise 3x3).
        width: of the first group; the others have two and four times as much.
        temperature: of the relaxed gradient; 1 on CIFAR, 5 falling to 1 on ImageNet.
        dense_above: share of active positions in a batch above which a block is computed densely, see
            :class:`pliant.execute.Pixels`.

    Returns:
        Stem, blocks and head; the site of block ``i`` is ``blocks.i.pixels.site``.

    Raises:
        PliantError: where there is no such block, or no block at all.

    >>> from pliant.core.bind import sites
    >>> list(sites(dynconv(blocks=1)))
    ['blocks.0.pixels.site', 'blocks.1.pixels.site', 'blocks.2.pixels.site']

    References:
        Survey sections 3.1.1 (1), 5.1.3 and 5.2.2; Verelst and Tuytelaars, Dynamic Convolutions: Exploiting Spatial Sparsity
        for Faster Inference, CVPR 2020.

    Differs from the paper: mask units start open (bias 1); while training, batch norm learns from executed positions only; the
    budget is a share of all FLOPs, those that no mask controls and the mask units included, and counts expected positions while
    there is noise, where the paper's counts those of the blocks alone and its code the sampled positions; the shortcut where sizes change is a 1x1 convolution
    that runs everywhere.
    """
    if blocks < 1:
        raise PliantError(got=f"blocks={blocks}", expected="at least 1 in each group", do="pass e.g. 5")
    build, widths = chosen(BLOCKS, block, "block"), (width, 2 * width, 4 * width)
    stem = nn.Sequential(*conv_norm(in_chans, width), nn.ReLU())
    made: list[nn.Module] = []
    inputs = width
    for group, here in enumerate(widths):
        for i in range(blocks):
            stride = 2 if group and i == 0 else 1
            branch, outputs = build(inputs, here, stride)
            rule = Gumbel(Threshold(0.0), temperature=temperature)
            made.append(masked_block(inputs, branch, outputs, stride, rule, dense_above))
            inputs = outputs
    return Parts(stem, made, PooledClassifier(inputs, num_classes)).model()
