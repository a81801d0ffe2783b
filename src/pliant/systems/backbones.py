"""Static networks for small images as lists of parts, which systems compose: stem, blocks, head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.execute.heads import PooledClassifier
from pliant.systems.parts import Parts


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, groups: int = 1) -> list[nn.Module]:
    """Convolution (He's initialisation by the outputs' fan) and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, ReLU after; where the size changes, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.inputs = inputs
        self.branch = nn.Sequential(*conv_norm(inputs, outputs, 3, stride), nn.ReLU(), *conv_norm(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut plus branch, rectified."""
        return (self.shortcut(x) + self.branch(x)).relu()


def resnet(num_classes: int = 10, in_chans: int = 3, *, depth: int = 20, widths: Sequence[int] = (16, 32, 64)) -> Parts:
    """CIFAR's ResNet (He et al., CVPR 2016) of ``depth`` = 6n + 2 layers; its shortcuts are projections, not padding."""
    each, rest = divmod(depth - 2, 2 * len(widths))
    if rest or each < 1:
        raise PliantError(got=f"depth {depth}", expected="6n + 2 layers", do="pass e.g. 20, 32, 38, 56 or 110")
    stem = nn.Sequential(*conv_norm(in_chans, widths[0]), nn.ReLU())
    plan = [(width, 1 + (group > 0 and i == 0)) for group, width in enumerate(widths) for i in range(each)]
    inputs = [widths[0], *(width for width, _ in plan)]
    blocks: list[nn.Module] = [BasicBlock(a, b, stride) for a, (b, stride) in zip(inputs, plan, strict=False)]
    return Parts(stem, blocks, PooledClassifier(widths[-1], num_classes))


def vgg16(num_classes: int = 10, in_chans: int = 3, *, hidden: int = 512) -> Parts:
    """VGG-16 with batch norm for 32x32 images: each of its 13 convolutions is a part; two hidden layers in the head."""
    groups = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    plan = [(width, i == count - 1) for width, count in groups for i in range(count)]
    inputs = [in_chans, *(width for width, _ in plan)]
    chain = [
        nn.Sequential(*conv_norm(a, b), nn.ReLU(), *[nn.MaxPool2d(2, ceil_mode=True)] * last)
        for a, (b, last) in zip(inputs, plan, strict=False)
    ]
    head = nn.Sequential(
        PooledClassifier(512, hidden), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, num_classes),
    )  # fmt: skip
    return Parts(chain[0], list(chain[1:]), head)


def halve() -> list[nn.Module]:
    """Max-pool (an odd border is kept) and ReLU between LeNet's layers."""
    return [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()]


def lenet(num_classes: int = 10, in_chans: int = 1) -> Parts:
    """LeNet as in BranchyNet: three 5x5 convolutions (5, 10, 20 channels; padded by 3), each read before its pool."""
    blocks: list[nn.Module] = [nn.Sequential(*halve(), nn.Conv2d(a, b, 5, padding=3)) for a, b in ((5, 10), (10, 20))]
    head = nn.Sequential(*halve(), PooledClassifier(20, 84, size=6), nn.ReLU(), nn.Linear(84, num_classes))
    return Parts(nn.Conv2d(in_chans, 5, 5, padding=3), blocks, head)


def norm_pool() -> list[nn.Module]:
    """ReLU, overlapping max-pool and local response norm (constants of BranchyNet's code) between AlexNet's layers."""
    return [nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(3, alpha=1.5e-4, beta=0.75, k=2.0)]


def alexnet(num_classes: int = 10, in_chans: int = 3) -> Parts:
    """CIFAR-size AlexNet as in BranchyNet: five convolutions (32, 64, 96, 96, 64), each read before its ReLU."""
    blocks: list[nn.Module] = [
        nn.Sequential(*norm_pool(), nn.Conv2d(32, 64, 5, padding=2)),
        nn.Sequential(*norm_pool(), nn.Conv2d(64, 96, 3, padding=1)),
        nn.Sequential(nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1)),
        nn.Sequential(nn.ReLU(), nn.Conv2d(96, 64, 3, padding=1)),
    ]
    head = nn.Sequential(
        nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), PooledClassifier(64, 256, size=4), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes),
    )  # fmt: skip
    return Parts(nn.Conv2d(in_chans, 32, 5, padding=2), blocks, head)


def cnn2(num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 24)) -> Parts:
    """A small CNN: two 3x3 convolutions, each with batch norm, ReLU and pool, and a linear layer on 4x4 cells."""
    layers = [
        nn.Sequential(*conv_norm(a, b), nn.ReLU(), nn.MaxPool2d(2)) for a, b in itertools.pairwise((in_chans, *widths))
    ]
    return Parts(layers[0], list(layers[1:]), PooledClassifier(widths[-1], num_classes, size=4))


BACKBONES: dict[str, Callable[..., Parts]] = {"lenet": lenet, "alexnet": alexnet, "vgg16": vgg16, "cnn2": cnn2} | {
    f"resnet{6 * n + 2}": partial(resnet, depth=6 * n + 2) for n in range(1, 19)
}
"""Builders of parts by name: ``BACKBONES["resnet20"](num_classes=10, in_chans=3)``."""
