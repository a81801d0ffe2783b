"""RANet: sub-networks from the lowest resolution to the highest, each with exits and fed by the one below."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability
from pliant.systems.multiscale import Classifier, pyramid
from pliant.systems.resolutions import Begin, Block, Climb, FusionBlock


def ranet(
    num_classes: int = 10, in_chans: int = 3, *, blocks: int = 2, more: int = 2, step: int = 4, channels: int = 16,
    growth: int = 6, factors: Sequence[int] = (4, 2, 1), share: float = 0.25, reduction: float = 0.5, head_channels: int = 128,
) -> Exits:  # fmt: skip
    r"""RANet, a chain of dense sub-networks of growing resolution; a row climbs to the next one only while it's in doubt.

    Layer :math:`l` of sub-network :math:`s`: :math:`x_s^l = [\,x_s^{l-1},\; h(x_s^{l-1}),\; \mathrm{up}(g(x_{s-1}^l))\,]`, the last
    part only in its first blocks, as many as the sub-network below has. Where those end that any sub-network below has, the sides are
    halved, so that all classify on maps as small as the coarsest. Exits stand behind the blocks that the one below doesn't have.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        blocks: of the coarsest sub-network.
        more: blocks that each next one has more; as many exits.
        step: layers in a block.
        channels: of the base features, at factor 1.
        growth: channels that each layer adds, at factor 1.
        factors: of both and of the bottlenecks, one for each sub-network from coarse to fine.
        share: of a fused layer's new channels that comes from below.
        reduction: share of the channels that a transition keeps.
        head_channels: of the classifiers' convolutions.

    Returns:
        The chain; ``blocks + more * (len(factors) - 1)`` exits.

    Raises:
        PliantError: where a count isn't positive or a share is outside (0, 1), or growth leaves no channel of its own.

    >>> net = ranet()
    >>> len(net.heads), sum(p.numel() for p in net.parameters())
    (6, 2451158)

    References:
        Survey sections 2.1.1 (1c), 3.3.2 and 5.1.1; Yang et al., Resolution Adaptive Networks, CVPR 2020.

    Differs from the paper: pixels are areas where maps are resized (corners aren't aligned, as they are in the released code, which
    also runs every sub-network and simulates).
    """
    counts = [blocks + more * s for s in range(len(factors))]
    if (
        min(blocks, more, step, channels, growth * min(factors) - 1, head_channels, *factors) < 1
        or not 0 < share < 1
        or not 0 < reduction <= 1
    ):
        raise PliantError(
            got=f"blocks={blocks}, more={more}, step={step}, growth={growth}, factors={tuple(factors)}, share={share}, reduction={reduction}",
            expected="positive counts, at least 2 new channels a layer, and shares in (0, 1)", do="pass e.g. blocks=2, more=2, step=4, factors=(4, 2, 1)",
        )  # fmt: skip
    stages: list[nn.Module] = []
    heads: list[nn.Module] = []
    pending: list[nn.Module] = [Begin(pyramid(in_chans, [channels * f for f in reversed(factors)], "cifar"))]
    below: list[list[int]] = []
    for s, (count, factor) in enumerate(zip(counts, factors, strict=True)):
        width, made = channels * factor, list[list[int]]()
        thin = {(i + 1) * count // (s + 1) for i in range(s)}  # blocks with a transition, counted from 1
        for b in range(1, count + 1):
            kept = reduction if b in thin else 1.0
            if b <= len(below):
                both, stride = (factor, factors[s - 1]), 2 if b in counts[:s] else 1
                block = FusionBlock(width, below[b - 1], growth * factor, both, share, stride=stride, kept=kept)
                pending.append(block)
            else:
                block = Block(width, step, growth * factor, factor, kept)
                stages.append(nn.Sequential(*pending, block))
                heads.append(Classifier(block.width, head_channels, num_classes))
                pending = []
            width = block.width
            made.append(block.channels)
        below, pending = made, [Climb()]
    return Exits(stages, heads, [Site(MaxProbability(), Threshold(0.5)) for _ in heads[1:]])
