"""STN: a network that transforms its input before it reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.heads import PooledClassifier
from pliant.execute.regions import Affine, Attention, Projective, Region, ThinPlate, Warp
from pliant.functional.gradient import scale_gradient
from pliant.rules.place import Regressed
from pliant.systems.backbones import conv_norm
from pliant.systems.parts import chosen

TRANSFORMS: dict[str, Callable[[int | None], Warp]] = {
    "attention": Attention, "affine": Affine, "projective": Projective, "thin_plate": ThinPlate,
}  # fmt: skip


class Localisation(nn.Module):
    """A small CNN that regresses a transform; at first the identity, from a last layer of weights 0 and biases 1."""

    def __init__(self, in_chans: int, places: int, pace: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 8, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(8, 16, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), PooledClassifier(16, 32, size=6), nn.ReLU(),
        )  # fmt: skip
        self.linear = nn.Linear(32, places)
        self.pace = pace
        nn.init.zeros_(self.linear.weight)
        nn.init.ones_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The transform's numbers."""
        return scale_gradient(self.linear(self.features(x)), self.pace)


class Parallel(nn.Module):
    """Several transformers side by side, their features one behind the other."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """All features of ``x``."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def reader(in_chans: int, widths: Sequence[int], features: int) -> nn.Sequential:
    """What looks at the transformed image: 3x3 convolutions, each with a pool, and a layer of features."""
    plan = zip((in_chans, *widths), widths, strict=False)
    layers = [nn.Sequential(*conv_norm(a, b), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)) for a, b in plan]
    return nn.Sequential(*layers, PooledClassifier(widths[-1], features, size=4), nn.ReLU())


def stn(
    num_classes: int = 10, in_chans: int = 3, *, transform: str = "affine", size: int | None = None, parts: int = 1,
    widths: Sequence[int] = (16, 32), pace: float = 1.0,
) -> nn.Sequential:  # fmt: skip
    r"""A spatial transformer in front of a small CNN.

    .. math:: \theta = \mathrm{loc}(x), \qquad y = W\,[f_1(x \circ T_{\theta_1}), \dots, f_P(x \circ T_{\theta_P})] + b

    Each transform is a decision: its site's value is 1 more than its distance from the identity, so ``Always``, the plain
    network, reads the image as it is and asks no localisation net.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`, at least 4 by 4; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        transform: "attention" (scale and shift), "affine", "projective" or "thin_plate" (16 knots).
        size: side of the transformed image; smaller than the image's it saves compute downstream; None keeps its size.
        parts: :math:`P`, transformers in parallel.
        widths: channels of the convolutions that read the transformed image.
        pace: factor of the localisation net's gradient; with SGD it's that of its learning rate (often 0.1).

    Returns:
        Transformers and a linear layer; the site of part ``i`` is ``looks.branches.i.site``.

    Raises:
        PliantError: where there is no such transform, or no part.

    >>> net = stn(in_chans=1).eval()
    >>> x = torch.randn(2, 1, 28, 28)
    >>> from pliant.core.bind import plain
    >>> torch.allclose(net(x), plain(net)(x), atol=1e-5)  # untrained, it leaves images as they are
    True

    References:
        Survey section 3.2.1; Jaderberg et al., Spatial Transformer Networks, NIPS 2015.

    Differs from the paper: the localisation net pools to 6 by 6 cells, so that any image size works; parts in parallel have
    localisation nets of their own; corners aren't aligned (pixels are areas), and what lies beyond the border is 0.
    """
    if parts < 1:
        raise PliantError(got=f"{parts} parts", expected="at least 1", do="pass the number of parallel transformers")
    warp, features = chosen(TRANSFORMS, transform, "transform"), 4 * widths[-1]

    def branch() -> Region:
        frame = warp(size)
        site = Site(Localisation(in_chans, frame.places, pace), Regressed(), shape=(frame.places,))
        return Region(site, frame, reader(in_chans, widths, features))

    model = nn.Sequential()
    model.add_module("looks", Parallel([branch() for _ in range(parts)]))
    model.add_module("head", nn.Linear(parts * features, num_classes))
    return model
