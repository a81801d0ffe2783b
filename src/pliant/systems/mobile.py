"""A small MobileNetV2 for small images, with its convolutions and activations as parts that systems exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pliant.execute.heads import PooledClassifier
from pliant.systems.backbones import conv_norm
from pliant.systems.parts import Parts

Activation = Callable[[int], nn.Module]
"""From channels to an activation."""
Branch = Callable[[int, int, int], nn.Module]
"""From (inputs, outputs, stride) to the branch of a block."""


def relu(channels: int) -> nn.Module:
    """The static activation."""
    return nn.ReLU()


def inverted(expansion: int, activation: Activation = relu) -> Branch:
    """MobileNetV2's branch: 1x1 to ``expansion`` times as many channels, 3x3 depthwise, 1x1 without activation."""

    def build(inputs: int, outputs: int, stride: int) -> nn.Module:
        wide = inputs * expansion
        return nn.Sequential(
            *conv_norm(inputs, wide, 1), activation(wide),
            *conv_norm(wide, wide, 3, stride, groups=wide), activation(wide),
            *conv_norm(wide, outputs, 1),
        )  # fmt: skip

    return build


class Shortcut(nn.Module):
    """Adds a branch to its input.

    >>> import torch
    >>> Shortcut(nn.Identity())(torch.ones(1))
    tensor([2.])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """Input plus branch."""
        return x + self.branch(x)


def mobile(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 24, 40), depth: int = 2,
    stem_stride: int = 1, branches: Sequence[Branch] | None = None, activation: Activation = relu,
) -> Parts:  # fmt: skip
    """Stages of ``depth`` inverted residual blocks, each stage but the first at half the size, and a wide 1x1 layer.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        widths: channels of the stages.
        depth: blocks of each stage.
        stem_stride: of the first convolution; 2 for larger images.
        branches: how each block's branch is made; default, ``inverted`` with expansion 4.
        activation: of the stem, the last layer and, by default, the blocks.
    """
    plan = [(width, 1 + (stage > 0 and i == 0)) for stage, width in enumerate(widths) for i in range(depth)]
    made = [inverted(4, activation)] * len(plan) if branches is None else branches
    blocks: list[nn.Module] = []
    inputs = widths[0]
    for (width, stride), branch in zip(plan, made, strict=True):
        block = branch(inputs, width, stride)
        blocks.append(Shortcut(block) if stride == 1 and inputs == width else block)
        inputs = width
    stem = nn.Sequential(*conv_norm(in_chans, widths[0], 3, stem_stride), activation(widths[0]))
    last = nn.Sequential(*conv_norm(inputs, 4 * inputs, 1), activation(4 * inputs))
    return Parts(stem, [*blocks, last], PooledClassifier(4 * inputs, num_classes))
