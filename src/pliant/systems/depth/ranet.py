"""RANet: sub-networks from the lowest resolution to the highest, each with exits and fed by the one below."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability
from pliant.systems.multiscale import Classifier, conv_norm, pyramid
from pliant.systems.resolutions import Begin, Block, Climb, FusedLayer, FusionBlock, Layer


def ranet(
    num_classes: int = 10, in_chans: int = 3, *, blocks: int = 2, more: int = 2, step: int = 4, channels: int = 16,
    growth: int = 6, factors: Sequence[int] = (4, 2, 1), share: float = 0.25, reduction: float = 0.5, head_channels: int = 128,
) -> Exits:  # fmt: skip
    r"""RANet, a chain of dense sub-networks of growing resolution; a row climbs to the next one only while it's in doubt.

    Layer :math:`l` of sub-network :math:`s`: :math:`x_s^l = [\,x_s^{l-1},\; h(x_s^{l-1}),\; \mathrm{up}(g(x_{s-1}^l))\,]`, the last
    part only in its first blocks, as many as the sub-network below has. Those of them at the end lower the resolution until all
    classify on maps as small as the coarsest. Exits stand behind the blocks that the sub-network below doesn't have.

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
        PliantError: where a count isn't positive or a share is outside (0, 1), or a sub-network has too few blocks to come down.

    >>> net = ranet()
    >>> len(net.heads), sum(p.numel() for p in net.parameters())
    (6, 1841382)

    References:
        Survey sections 2.1.1 (1c), 3.3.2 and 5.1.1; Yang et al., Resolution Adaptive Networks, CVPR 2020.

    Differs from the paper: a block that lowers the resolution does so in its transition (3x3, stride 2), for all its channels at
    once. Transitions stand behind every block but a sub-network's last. Released code runs every sub-network and simulates.
    """
    counts = [blocks + more * s for s in range(len(factors))]
    if (
        min(blocks, more, step, channels, growth, head_channels, *factors) < 1
        or not 0 < share < 1
        or not 0 < reduction <= 1
    ):
        raise PliantError(
            got=f"blocks={blocks}, more={more}, step={step}, factors={tuple(factors)}, share={share}, reduction={reduction}",
            expected="positive counts and shares in (0, 1)", do="pass e.g. blocks=2, more=2, step=4, factors=(4, 2, 1)",
        )  # fmt: skip
    if any(below < s for s, below in enumerate(counts[:-1], 1)):
        raise PliantError(
            got=f"{counts} blocks", expected="in each sub-network at least as many below it as it has to come down",
            do="raise blocks or more",
        )  # fmt: skip
    stages: list[nn.Module] = []
    heads: list[nn.Module] = []
    pending: list[nn.Module] = [Begin(pyramid(in_chans, [channels * f for f in reversed(factors)], "cifar"))]
    below: list[list[int]] = []
    for s, (count, factor) in enumerate(zip(counts, factors, strict=True)):
        width, grow, made = channels * factor, growth * factor, list[list[int]]()
        fused = len(below)
        for b in range(count):
            inputs = [width + grow * i for i in range(step + 1)]
            width = inputs[-1] if b == count - 1 else int(reduction * inputs[-1])
            down = fused - s <= b < fused
            ends = nn.Identity() if b == count - 1 else conv_norm(inputs[-1], width, 3 if down else 1, 2 if down else 1)
            if b < fused:
                pairs = zip(inputs, below[b], strict=False)
                pending.append(FusionBlock([FusedLayer(a, low, grow, factor, share) for a, low in pairs], ends))
            else:
                pending.append(Block([Layer(a, grow, factor) for a in inputs[:-1]], ends))
                stages.append(nn.Sequential(*pending))
                heads.append(Classifier(width, head_channels, num_classes))
                pending = []
            made.append(inputs[1:])
        below, pending = made, [Climb()]
    return Exits(stages, heads, [Site(MaxProbability(), Threshold(0.5)) for _ in heads[1:]])
