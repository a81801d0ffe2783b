"""GFNet: a glance at the whole image, then looks at patches of it, until one is sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.estimators.gaussian import Gaussian
from pliant.execute.exits import Exits
from pliant.execute.regions import Look, Region, Window
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability, Pooled
from pliant.scores.place import PlacePolicy
from pliant.systems.backbones import resnet


class Seen(NamedTuple):
    """The image, the features of the last look, the classifier's memory of all looks, and the policy's."""

    image: Tensor
    maps: Tensor
    memory: Tensor
    carry: Any = None


class Glance(nn.Module):
    """The first look: the whole image, shrunk to the patches' size."""

    def __init__(self, encoder: nn.Module, memory: nn.GRUCell, size: int) -> None:
        super().__init__()
        self.encoder, self.memory, self.pool, self.size = encoder, memory, Pooled(), size

    def forward(self, x: Tensor) -> Seen:
        """What one knows after it."""
        maps = self.encoder(F.interpolate(x, size=(self.size, self.size), mode="area"))
        empty = maps.new_zeros(maps.shape[0], self.memory.hidden_size)
        return Seen(x, maps, self.memory(self.pool(maps), empty))


class Focus(nn.Module):
    """Another look: a patch at full resolution, where the policy says by what was seen last."""

    def __init__(self, region: Region, memory: nn.GRUCell) -> None:
        super().__init__()
        self.region, self.memory, self.pool = region, memory, Pooled()

    def forward(self, seen: Seen) -> Seen:
        """What one knows after it."""
        maps, carry = self.region(Look(seen.image, seen.maps, seen.carry))
        return Seen(seen.image, maps, self.memory(self.pool(maps), seen.memory), carry)


class Classify(nn.Module):
    """A linear layer on the memory."""

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, seen: Seen) -> Tensor:
        """Logits."""
        return self.linear(seen.memory)


def gfnet(
    num_classes: int = 10, in_chans: int = 3, *, size: int = 32, steps: int = 4, depth: int = 8,
    widths: Sequence[int] = (16, 32, 64), hidden: int = 128, policy: int = 64, std: float = 0.1,
) -> Exits:  # fmt: skip
    r"""Glance and focus: an exit after each look, and a policy that says where to look next.

    .. math:: m_t = \mathrm{GRU}(\mathrm{pool}(f(x_t)), m_{t-1}), \quad x_1 = \mathrm{shrunk}(x),\ x_t = \mathrm{patch}(x, v_t), \quad
        v_t = \sigma(\pi(f(x_{t-1}), \dots)) \in [0, 1]^2

    While training, places are drawn around :math:`v_t`; bind ``pliant.rules.Uniform`` to ``stages.*`` for the paper's first stage
    of training, and train ``*scorer*`` alone with a policy loss in its second.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)` with :math:`H, W \ge` ``size``; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        size: side of the patches and of the shrunk image, a multiple of 4.
        steps: looks, the glance included.
        depth: layers of each of the two encoders, ResNets without a head: 6n + 2.
        widths: of their three groups.
        hidden: units of the classifier's memory; 1024 in the paper.
        policy: units of the policy's memory; 256 or 1024 in the paper.
        std: of the places drawn in training, in shares of the way.

    Returns:
        The chain; its exits' sites are ``sites.k``, those of the places ``stages.k.region.site``.

    Raises:
        PliantError: where there is no look, or the size is no multiple of 4.

    >>> from pliant.core.bind import sites
    >>> list(sites(gfnet(steps=2)))
    ['stages.1.region.site', 'sites.0']

    References:
        Survey section 3.2.2 (1); Wang et al., Glance and Focus, NeurIPS 2020.

    Differs from the paper: encoders are CIFAR's ResNets, not pre-trained, without heads and losses of their own in the first stage;
    the glance averages areas; the policy reads maps by a 1x1 convolution, as with the paper's light networks. PPO with one epoch
    on each batch has a ratio of 1, so its gradient is that of the policy loss it's trained with here.
    """
    if steps < 1 or size < 4 or size % 4:
        raise PliantError(
            got=f"{steps} steps and size {size}", expected="at least one look, and a multiple of 4", do="pass size=32"
        )
    glance, local = (resnet(num_classes, in_chans, depth=depth, widths=widths) for _ in range(2))
    memory, head = nn.GRUCell(widths[-1], hidden), Classify(hidden, num_classes)
    encoder = nn.Sequential(local.stem, *local.blocks)
    scorer = PlacePolicy(widths[-1], size // 2 ** (len(widths) - 1), hidden=policy)

    def focus() -> Focus:
        return Focus(Region(Site(scorer, Gaussian(std=std), shape=(2,)), Window(size), encoder), memory)

    first = Glance(nn.Sequential(glance.stem, *glance.blocks), memory, size)
    stages = [first, *(focus() for _ in range(steps - 1))]
    return Exits(stages, [head] * steps, [Site(MaxProbability(), Threshold(0.5)) for _ in range(steps - 1)])
