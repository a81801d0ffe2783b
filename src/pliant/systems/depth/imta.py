"""IMTA: MSDNet whose exits' gradients are in equilibrium, and whose exits help one another both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pliant.execute.collaboration import collaborative
from pliant.execute.equilibrium import equilibrium, scale_last
from pliant.execute.exits import Exits
from pliant.losses import MultiExit, OneForAll, Total
from pliant.systems.depth.msdnet import msdnet
from pliant.train.phases import Phase


def imta(
    num_classes: int = 10, in_chans: int = 3, *, exits: int = 7, base: int = 4, step: int = 2, growing: int = 0,
    channels: int = 16, growth: int = 6, factors: Sequence[int] = (1, 2, 4), bottlenecks: Sequence[int] = (1, 2, 4),
    reduction: float = 0.5, prune: Literal["max", "min"] = "max", form: Literal["cifar", "imagenet"] = "cifar", head_channels: int = 128,
) -> Exits:  # fmt: skip
    r"""MSDNet with gradient equilibrium (GE) and inline subnetwork collaboration (ISC); :func:`stages` trains it.

    GE makes block :math:`k`'s gradient :math:`\frac{1}{K-k+1} g_k + \frac{K-k}{K-k+1} g_\text{deeper}` on the coarsest
    scale, the one that is classified. ISC adds
    :math:`V\, \mathrm{relu}(\mathrm{norm}(U f_{k-1} + c))` to exit :math:`k`'s logits.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        exits: number of blocks; this and all others as in ``msdnet``, with its defaults.
        base: layers in the first block.
        step: layers in each later block.
        growing: layers that each later block has more than the one before it.
        channels: of the first layer at the finest scale.
        growth: channels that each layer adds at the finest scale.
        factors: of channels and growth, per scale.
        bottlenecks: width of the 1x1 convolutions, in outputs, per scale.
        reduction: share of the channels kept where scales are dropped.
        prune: "max" or "min".
        form: "cifar" or "imagenet".
        head_channels: of the classifiers' convolutions in the "cifar" form.

    Returns:
        The chain; MSDNet's weights load into ``stages.*`` and ``heads.0.*``.

    Raises:
        PliantError: as msdnet does.

    >>> sum(p.numel() for p in imta().parameters())  # MSDNet's 2,986,690 and the six later exits' small layers
    3004354

    References:
        Survey sections 2.1.1 (1c) and 5.2.1; Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019.

    Differs from the paper: the inline layers start at 0, so that the first stage trains plain MSDNet heads in the same
    model (the released code builds a second one and copies weights); thresholds are set by ``tune``.
    """
    chain = msdnet(
        num_classes, in_chans, exits=exits, base=base, step=step, growing=growing, channels=channels, growth=growth,
        factors=factors, bottlenecks=bottlenecks, reduction=reduction, prune=prune, form=form, head_channels=head_channels,
    )  # fmt: skip
    return equilibrium(collaborative(chain), scale=scale_last)


def stages(
    epochs: tuple[int, int] = (300, 300), *, lr: float = 0.1, gamma: float = 0.1, temperature: float = 1.0, **changes: Any
) -> list[tuple[Total, list[Phase]]]:  # fmt: skip
    r"""How IMTA is trained: run ``fit(model, data, loss, phases)`` for each pair in turn.

    First the network with GE under the sum of all exits' losses, the inline layers out of use; then only the heads and
    inline layers, the last exit teaching the others. The trunk's weights and batch statistics stay to the byte.

    Args:
        epochs: of both stages.
        lr: at the start of both; divided by 10 after 1/2 and 3/4 of the epochs.
        gamma: share of distillation in earlier exits' losses (the released script's 0.1; its argument's default is 0.9).
        temperature: of distillation (the released script's 1; its argument's default is 3).
        changes: of the phases' other settings, e.g. ``schedule="cosine", milestones=()``.

    Returns:
        Loss and phases of the two stages.

    Raises:
        PliantError: as Phase and OneForAll do.

    >>> [[(p.name, p.epochs, p.train) for p in phases] for _, phases in stages((8, 4))]
    [[('equilibrium', 8, ('stages.*', 'heads.*.features.*', 'heads.*.linear.*'))], [('collaboration', 4, ('heads.*',))]]

    References:
        Survey section 5.2.1 (1); Li et al., ICCV 2019.

    Differs from the paper: distillation's KL is summed over classes, and the frozen trunk's batch norms keep their
    statistics (the released code averages over classes as well, and lets the statistics drift); the teacher is the live
    last exit, without gradient.
    """
    parts = {
        "equilibrium": ("stages.*", "heads.*.features.*", "heads.*.linear.*"),
        "collaboration": ("heads.*",),
    }
    losses = (MultiExit(), OneForAll(gamma=gamma, temperature=temperature))
    made: list[tuple[Total, list[Phase]]] = []
    for (name, train), count, loss in zip(parts.items(), epochs, losses, strict=True):
        settings: dict[str, Any] = {
            "optimizer": "sgd", "lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4,
            "schedule": "multistep", "milestones": (count // 2, count * 3 // 4),
        }  # fmt: skip
        phase = Phase(name, count, train=train, **{**settings, **changes})
        made.append((Total({"exits": (1.0, loss)}), [phase]))
    return made
