"""Losses of what a recorded call spends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.cost.account import expected_flops, expected_shares
from pliant.losses.rate import Miss, Target, joint_means, squared


class FlopsBudget:
    r"""Expected-cost loss, :math:`m(\overline{E[c]} / c_\text{dense} - \theta)`, with :math:`m` the square.

    Args:
        share: :math:`\theta`, the wanted share of the dense FLOPs, in (0, 1], or a function of progress, e.g.
            ``falling(0.5, over=0.8)``: gates that a sudden target shuts may have no gradient to open again.
        miss: what a miss costs: ``squared``, or ``above`` for spending too much only.

    Raises:
        PliantError: where ``share`` is outside (0, 1].

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> _, trace = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(torch.zeros(1, 3, 32, 32))
    >>> FlopsBudget(0.5)(torch.zeros(1, 4), trace, torch.zeros(1), 0.0)
    tensor(0.2500)

    References:
        Survey section 5.2.1 (2); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.
    """

    def __init__(self, share: Target, *, miss: Miss = squared) -> None:
        self.share: Target = share if callable(share) else _share(share)
        self.miss = miss

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The squared miss, no unit."""
        spent = expected_flops(trace) / trace.dense_flops.to(y.device).clamp_min(1)
        share = self.share(progress) if callable(self.share) else self.share
        return self.miss(joint_means({"share": spent}).get("share", y.sum() * 0 + share) - share).float()


class BlockBounds:
    r"""Every block's share of its own cost stays within bounds that are tight at first and then open.

    .. math:: \frac{1}{B} \sum_b \max(0, s_b - u)^2 + \max(0, l - s_b)^2, \qquad
              l = q\,\theta, \quad u = 1 - q\,(1 - \theta), \quad q = \cos^2\Big(\tfrac{\pi}{2} \min(1, p / r)\Big)

    with :math:`s_b` the batch's expected share of block :math:`b`'s costliest alternative and :math:`p` the progress. So no
    block dies or saturates before the others have learned anything.

    Args:
        share: :math:`\theta`, where all blocks start, in (0, 1].
        relax: :math:`r`, share of training after which the bounds are [0, 1].

    Raises:
        PliantError: where an argument is outside (0, 1], or nothing that is decided costs anything.

    >>> [tuple(round(b, 2) for b in BlockBounds(0.5).bounds(p)) for p in (0.0, 1 / 6, 1.0)]
    [(0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]

    References:
        Survey section 5.2.1 (2); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.
    """

    def __init__(self, share: float, *, relax: float = 1 / 3) -> None:
        self.share, self.relax = _share(share), _share(relax)

    def bounds(self, progress: float) -> tuple[float, float]:
        """The lower and the upper bound at this point of training."""
        tight = math.cos(math.pi / 2 * min(1.0, progress / self.relax)) ** 2
        return tight * self.share, 1 - tight * (1 - self.share)

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean over blocks, no unit."""
        means = joint_means(expected_shares(trace))
        if not means:
            return y.sum() * 0
        shares = torch.stack(list(means.values()))
        low, high = self.bounds(progress)
        return ((shares - high).relu() ** 2 + (low - shares).relu() ** 2).mean().float()


class ResourceAware:
    r"""Resource-aware loss of dynamic convolutions: the network's budget and the blocks' bounds, added.

    .. math:: \Big(\frac{\overline{E[c]}}{c_\text{dense}} - \theta\Big)^2 + \text{BlockBounds}(\theta)

    Args:
        share: :math:`\theta`, the wanted share of the dense FLOPs, in (0, 1].
        relax: share of training after which the blocks are free.

    Raises:
        PliantError: where an argument is outside (0, 1].

    >>> import pliant
    >>> model = pliant.create_model("convnet_aig", depth=8).train()
    >>> _, trace = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(torch.zeros(4, 3, 8, 8))
    >>> ResourceAware(0.5)(torch.zeros(4, 10), trace, torch.zeros(4), 0.0)
    tensor(0.5000)

    References:
        Survey section 5.2.1 (2); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020: weight 10 in its released code.
    """

    def __init__(self, share: float, *, relax: float = 1 / 3) -> None:
        self.parts = (FlopsBudget(share), BlockBounds(share, relax=relax))

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The sum of both, no unit."""
        budget, bounds = (part(y, trace, target, progress) for part in self.parts)
        return budget + bounds


def _share(share: float) -> float:
    if not 0 < share <= 1:
        raise PliantError(got=f"share {share}", expected="within (0, 1]", do="pass the wanted share of dense FLOPs")
    return share
